// SPDX-License-Identifier: Apache-2.0

// Package buildtest is the conformance suite of builders: a driver that passes
// it may be chosen by klatch-forge build. It builds on a real kernel and takes
// minutes. Start with Run; Subject is what a driver's test must say. Replace
// shows in the lab what the file does not: that one livepatch replaces another.
package buildtest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/module"
	"klatch/internal/forge/compose"
	"klatch/internal/livepatch"
)

// Subject is a driver under test, with plans for one kernel build.
type Subject struct {
	// Builder is the driver, in a cache where nobody else builds: the suite
	// looks for what a build leaves behind.
	Builder build.Builder
	// Elsewhere makes the same driver in another folder, which shares no
	// result of a build with Builder.
	Elsewhere func(t *testing.T) build.Builder
	// Hasty is the driver with so little time for one program that none of
	// those that Good needs can end.
	Hasty build.Builder

	Good      compose.Plan         // builds
	Functions []livepatch.Function // that Good replaces, sorted
	Other     compose.Plan         // builds, from other inputs than Good
	Refused   []Refused            // at least a source that does not compile
	Unbuilt   compose.Plan         // touches only files that the kernel was not built from

	Scratch string   // folder of the builds on their way; empty between them
	Tree    string   // source tree, which no build may change
	Watched []string // files of Tree to look at; those that the plans touch
}

// Refused is a plan that the driver must refuse.
type Refused struct {
	Name string
	Plan compose.Plan
	Code fault.Code
	// Function says that the refusal names the function too.
	Function string
}

// limit of one build, on two cores that others use too.
const limit = 10 * time.Minute

// Run runs the suite.
func Run(t *testing.T, s Subject) {
	if s.Builder == nil || s.Elsewhere == nil || s.Hasty == nil || len(s.Functions) == 0 || len(s.Watched) == 0 ||
		!slices.ContainsFunc(s.Refused, func(r Refused) bool { return r.Code == "does_not_compile" }) {
		t.Fatal("the subject lacks something")
	}
	before := s.watch(t)

	var good build.Result
	t.Run("a good plan is built", func(t *testing.T) {
		good = s.build(t, s.Builder, s.Good, t.TempDir())
		checkBuilt(t, good, s.Good)
		if !slices.Equal(good.Functions, s.Functions) {
			t.Errorf("functions %v, want %v", good.Functions, s.Functions)
		}
	})
	if good.Result != build.Built {
		return // what follows would only tell of its consequences
	}
	t.Run("the same inputs give the same bytes in another folder", func(t *testing.T) {
		res := s.build(t, s.Elsewhere(t), s.Good, t.TempDir())
		sameModule(t, res, good)
	})
	t.Run("builds run side by side", func(t *testing.T) { s.testParallel(t, good) })
	for _, r := range s.Refused {
		t.Run("refused: "+r.Name, func(t *testing.T) { s.testRefused(t, r) })
	}
	t.Run("a kernel without the touched files is not affected", func(t *testing.T) {
		data := t.TempDir()
		res := s.build(t, s.Builder, s.Unbuilt, data)
		if res.Result != build.NotAffected || len(res.NotBuilt) == 0 || len(res.Refusals) != 0 || res.Module != nil {
			t.Errorf("result %s, not built %v, refusals %+v", res.Result, res.NotBuilt, res.Refusals)
		}
		s.nothingLeft(t, data)
	})
	t.Run("a canceled build is broken", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		s.testBroken(ctx, t, s.Builder)
	})
	t.Run("a build canceled on its way is broken", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		s.testBroken(ctx, t, s.Builder)
	})
	t.Run("a program over its time breaks the build", func(t *testing.T) {
		s.testBroken(t.Context(), t, s.Hasty)
	})
	t.Run("a build after broken ones works", func(t *testing.T) {
		sameModule(t, s.build(t, s.Builder, s.Good, t.TempDir()), good)
	})
	t.Run("the source tree is untouched", func(t *testing.T) {
		for name, sum := range s.watch(t) {
			if before[name] != sum {
				t.Errorf("%s was changed", name)
			}
		}
	})
}

// build runs a plan as klatch-forge does.
func (s Subject) build(t *testing.T, b build.Builder, p compose.Plan, data string) build.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	res, err := build.Run(ctx, b, p, data, build.NewClock(nil))
	if err != nil {
		t.Error(err)
		return res
	}
	if res.Result == build.Broken {
		t.Errorf("broken: %s", res.Error)
	}
	for _, r := range append(slices.Clone(res.Refusals), res.Warnings...) {
		listed(t, r)
	}
	return res
}

// checkBuilt looks at everything that a result and its module promise.
func checkBuilt(t *testing.T, res build.Result, p compose.Plan) {
	t.Helper()
	if res.Result != build.Built || res.Module == nil {
		t.Errorf("result %s, module %v, refusals %+v", res.Result, res.Module, res.Refusals)
		return
	}
	digest, err := p.Digest()
	if err != nil || res.Plan != digest {
		t.Errorf("plan %q, want %q (%v)", res.Plan, digest, err)
	}
	if !slices.Equal(res.Fixes, p.Fixes()) || res.Sequence != p.Sequence || res.KernelBuild() != p.Kernel.Build() {
		t.Errorf("fixes %v, sequence %d, kernel %v", res.Fixes, res.Sequence, res.KernelBuild())
	}
	byName := func(a, b livepatch.Function) int { return strings.Compare(a.String(), b.String()) }
	if len(res.Functions) == 0 || !slices.IsSortedFunc(res.Functions, byName) || len(slices.Compact(slices.Clone(res.Functions))) != len(res.Functions) {
		t.Errorf("functions %v are none, unsorted or not each once", res.Functions)
	}
	for _, f := range res.Functions { // what the report proves is what is replaced
		n := 0
		for _, m := range res.Match.Replaced {
			if m.Object == f.Object && m.Function == f.Name && m.File != "" && m.Bytes > 0 {
				n++
			}
		}
		if n != 1 {
			t.Errorf("the match report has %s %d times: %+v", f, n, res.Match.Replaced)
		}
	}
	if len(res.Match.Replaced) != len(res.Functions) || res.Match.Checked < len(res.Functions) || res.Match.Identical < len(res.Functions) {
		t.Errorf("match report %+v for %v", res.Match, res.Functions)
	}
	b, err := os.ReadFile(res.Module.Path)
	if err != nil {
		t.Error(err)
		return
	}
	sum := sha256.Sum256(b)
	if res.Module.SHA256 != hex.EncodeToString(sum[:]) || res.Module.Bytes != int64(len(b)) {
		t.Errorf("module %+v has %d bytes, SHA-256 %x", res.Module, len(b), sum)
	}
	if name := p.Sequence.ModuleName() + ".ko"; filepath.Base(res.Module.Path) != name {
		t.Errorf("module %s, want %s", res.Module.Path, name)
	}
	checkModule(t, b, p)
}

func checkModule(t *testing.T, b []byte, p compose.Plan) {
	t.Helper()
	info, err := module.Info(b)
	if err != nil {
		t.Error(err)
		return
	}
	var fixes []string
	for _, f := range p.Fixes() {
		fixes = append(fixes, string(f))
	}
	for _, w := range [][2]string{{"name", p.Sequence.ModuleName()}, {"livepatch", "Y"}, {"klatch_fixes", strings.Join(fixes, ",")},
		{"klatch_build_id", p.Kernel.BuildID.String()}, {"klatch_sequence", strings.TrimPrefix(p.Sequence.ModuleName(), "klatch_")}, {"depends", ""}} {
		if have := info[w[0]]; !slices.Equal(have, w[1:]) {
			t.Errorf("the module says %s=%q, want %q", w[0], have, w[1])
		}
	}
	if v := info["vermagic"]; len(v) != 1 || !strings.HasPrefix(v[0], string(p.Kernel.Release)+" ") {
		t.Errorf("vermagic %q, want %s", v, p.Kernel.Release)
	}
	if l := info["license"]; len(l) == 0 || !strings.HasPrefix(l[0], "GPL") {
		t.Errorf("license %q", l)
	}
}

// testParallel builds the good plan again, with the same bytes, while another
// one is built with the longest name that there is.
func (s Subject) testParallel(t *testing.T, good build.Result) {
	last := s.Other
	last.Sequence = math.MaxUint32
	var wg sync.WaitGroup
	var again, other build.Result
	data := t.TempDir() // one for both, as a publisher has it
	wg.Go(func() { again = s.build(t, s.Builder, s.Good, data) })
	wg.Go(func() { other = s.build(t, s.Builder, last, data) })
	wg.Wait()
	sameModule(t, again, good)
	checkBuilt(t, other, last)
	if again.Module != nil && other.Module != nil && again.Module.SHA256 == other.Module.SHA256 {
		t.Error("two plans gave one module")
	}
}

func (s Subject) testRefused(t *testing.T, r Refused) {
	data := t.TempDir()
	res := s.build(t, s.Builder, r.Plan, data)
	if res.Result != build.Refused || len(res.Refusals) == 0 || res.Module != nil {
		t.Fatalf("result %s, refusals %+v", res.Result, res.Refusals)
	}
	i := slices.IndexFunc(res.Refusals, func(f build.Refusal) bool {
		return f.Code == r.Code && (r.Function == "" || f.Function == r.Function)
	})
	if i < 0 {
		t.Errorf("refusals %+v, want %s %s", res.Refusals, r.Code, r.Function)
	}
	for _, f := range res.Refusals {
		if f.File == "" {
			t.Errorf("refusal without a place: %+v", f)
		}
	}
	s.nothingLeft(t, data)
}

// testBroken wants the builder blamed and nothing left behind.
func (s Subject) testBroken(ctx context.Context, t *testing.T, b build.Builder) {
	data := t.TempDir()
	res, err := build.Run(ctx, b, s.Good, data, build.NewClock(nil))
	if err != nil {
		t.Fatal(err)
	}
	if res.Result != build.Broken || res.Error == "" || res.ExitStatus() != 75 || len(res.Refusals) != 0 || res.Module != nil {
		t.Errorf("result %s, error %q, refusals %+v", res.Result, res.Error, res.Refusals)
	}
	s.nothingLeft(t, data)
}

// nothingLeft looks into the publisher's data folder and the builds' own.
func (s Subject) nothingLeft(t *testing.T, data string) {
	t.Helper()
	for _, dir := range []string{data, s.Scratch} {
		err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if os.IsNotExist(err) && p == dir {
				return nil
			}
			if err == nil && (!d.IsDir() || dir == s.Scratch && p != dir) {
				t.Errorf("left behind: %s", p)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

func sameModule(t *testing.T, have, want build.Result) {
	t.Helper()
	if have.Result != build.Built {
		t.Errorf("result %s, refusals %+v, error %q", have.Result, have.Refusals, have.Error)
		return
	}
	if have.Module.SHA256 != want.Module.SHA256 || have.Plan != want.Plan {
		t.Errorf("module %s of plan %s, before %s of plan %s", have.Module.SHA256, have.Plan, want.Module.SHA256, want.Plan)
	}
}

// listed wants a refusal or a warning that a person can look up.
func listed(t *testing.T, f build.Refusal) {
	t.Helper()
	i := slices.IndexFunc(build.Catalog, func(r build.Rule) bool { return r.Code == f.Code })
	if i < 0 || f.Rule == "" || f.Hint == "" {
		t.Errorf("not as the list of refusals has it: %+v", f)
	}
}

// watch takes the digests of the watched files.
func (s Subject) watch(t *testing.T) map[string][32]byte {
	t.Helper()
	sums := map[string][32]byte{}
	for _, name := range s.Watched {
		b, err := os.ReadFile(filepath.Join(s.Tree, name))
		if err != nil {
			t.Fatal(err)
		}
		sums[name] = sha256.Sum256(b)
	}
	return sums
}
