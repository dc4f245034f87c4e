// SPDX-License-Identifier: Apache-2.0

// Package objbuild is the default driver: for a stock distribution kernel it
// compiles only the touched files, unpatched and patched, proves with package
// match that the unpatched ones are what the kernel runs, lets
// create-diff-object extract the changed functions, and links them into one
// livepatch with replace set.
//
// Start reading at Build. All foreign programs run in package sandbox.
package objbuild

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/sandbox"
	"klatch/internal/livepatch"
)

// Driver builds in a cache folder.
type Driver struct {
	Cache   string // holds kernels/ and objects/
	Tools   Tools
	Timeout time.Duration // for one program; 0 means DefaultTimeout
}

// DefaultTimeout ends a program of a build that hangs. A large object takes
// ten seconds on two cores.
const DefaultTimeout = 10 * time.Minute

// Flags of the compilations. -g0 leaves the code as it is (the match proof
// would show otherwise) and saves half of the time. Separate sections let
// create-diff-object see which function changed.
const (
	flagsAsShipped = "-g0"
	flagsForDiff   = "-g0 -ffunction-sections -fdata-sections"
)

// job is one build on its way.
type job struct {
	Driver
	plan     compose.Plan
	tree     kerneltree.Tree
	dir      string // result folder
	scratch  string
	clock    *build.Clock
	kernel   *match.Kernel
	result   build.Result
	compiler string // what it calls itself now
}

// Build implements build.Builder.
func (d Driver) Build(ctx context.Context, p compose.Plan, dir string, clock *build.Clock) (build.Result, error) {
	j := &job{Driver: d, plan: p, tree: kerneltree.At(d.Cache, p.Kernel), dir: dir, clock: clock,
		result: build.Result{Match: match.Empty()}}
	if !j.tree.Ready() {
		return j.result, fault.New(fault.NotFound, "no_tree", "kernel %s is not prepared in cache %s", p.Kernel.Release, d.Cache).
			WithHint("klatch-forge kernel add --release %s", p.Kernel.Release)
	}
	if err := os.MkdirAll(filepath.Join(d.Cache, "builds"), 0o755); err != nil {
		return j.result, err
	}
	scratch, err := os.MkdirTemp(filepath.Join(d.Cache, "builds"), string(p.Kernel.Release)+"-")
	if err != nil {
		return j.result, err
	}
	defer os.RemoveAll(scratch) //nolint:errcheck // scratch
	if err := os.Chmod(scratch, 0o755); err != nil {
		return j.result, err
	}
	j.scratch = filepath.Join(scratch, "overlay")

	objects := j.objects()
	if len(j.result.Refusals) > 0 {
		return j.refused(), nil
	}
	for _, step := range []func(context.Context, []object) error{
		j.linkedFrom, j.environment, j.compileOriginal, j.applyAndCompile, j.prove, j.extract, j.link,
	} {
		if err := step(ctx, objects); err != nil {
			return j.result, err
		}
		if len(j.result.Refusals) > 0 {
			return j.refused(), nil
		}
	}
	j.result.Result = build.Built
	return j.result, nil
}

func (j *job) refused() build.Result {
	j.result.Result = build.Refused
	return j.result
}

func (j *job) refuse(r build.Refusal) { j.result.Refusals = append(j.result.Refusals, r) }

// object is one object file of the kernel on its way through the build.
type object struct {
	source  string   // .c file
	changed []string // functions that the livepatch replaces, by their name in the object
}

func (o object) name() string { return strings.TrimSuffix(o.source, ".c") + ".o" }

// objects maps the touched files to object files and refuses what this driver
// cannot do.
func (j *job) objects() []object {
	var out []object
	for _, f := range j.plan.Files() {
		switch path.Ext(f) {
		case ".c":
			out = append(out, object{source: f})
		case ".h":
			j.refuse(build.Refusal{Code: "header_changed", File: f,
				Rule: "a changed header changes every file that includes it, and these are not known yet",
				Hint: "reduce the source patch to .c files, for example by defining the new item in the .c file that uses it"})
		case ".S":
			j.refuse(build.Refusal{Code: "assembly", File: f,
				Rule: "assembly has no function borders that the kernel's livepatch interface could redirect",
				Hint: "update the kernel package and reboot"})
		default:
			j.refuse(build.Refusal{Code: "not_code", File: f,
				Rule: "only C source can be livepatched; this file changes how the kernel is built or generated",
				Hint: "leave the file out of the source patch if the fix does not need it"})
		}
	}
	return out
}

// linkedFrom refuses files that are no part of this kernel.
func (j *job) linkedFrom(_ context.Context, objects []object) (err error) {
	if j.kernel, err = match.Open(j.tree.Vmlinux()); err != nil {
		return err
	}
	for _, o := range objects {
		if !j.kernel.HasFile(o.source) {
			j.refuse(build.Refusal{Code: "not_built", File: o.source,
				Rule: "the kernel was not linked from this file: it is not built in this configuration, or it is part of a module",
				Hint: "a fix in a file that is not built needs no livepatch; modules are not supported yet"})
		}
	}
	return nil
}

// make runs make on the tree with our scratch folder over it.
func (j *job) make(ctx context.Context, args ...string) (sandbox.Result, error) {
	if j.plan.Kernel.ExtraCFlags != "" {
		for i, a := range args {
			if flags, ok := strings.CutPrefix(a, "KCFLAGS="); ok {
				args[i] = "KCFLAGS=" + j.plan.Kernel.ExtraCFlags + " " + flags
			}
		}
	}
	return j.run(ctx, sandbox.Command{Argv: kerneltree.Make(j.plan.Kernel, args...)})
}

// run runs one program in the sandbox of this build.
func (j *job) run(ctx context.Context, c sandbox.Command) (sandbox.Result, error) {
	timeout := j.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	c.Tree, c.Scratch = j.tree.Source(), j.scratch
	if c.Dir == "" {
		c.Dir = j.tree.Source()
	}
	if c.Env == nil {
		c.Env = sandbox.BaseEnv()
	}
	return sandbox.Run(ctx, c)
}

// upper is where a file of the tree is found after a program wrote it.
func (j *job) upper(rel string) string { return sandbox.Command{Scratch: j.scratch}.Upper(rel) }

// compile compiles objects and copies them to a folder of the build.
func (j *job) compile(ctx context.Context, objects []object, flags, into string) (sandbox.Result, error) {
	args := []string{"KCFLAGS=" + flags}
	for _, o := range objects {
		args = append(args, o.name())
	}
	res, err := j.make(ctx, args...)
	if err != nil || res.Exit != 0 {
		return res, err
	}
	for _, o := range objects {
		b, err := durable.ReadFile(j.upper(o.name()), livepatch.MaxModule)
		if err != nil {
			return res, err
		}
		if err := j.write(filepath.Join(into, o.name()), b); err != nil {
			return res, err
		}
	}
	return res, nil
}

// file is a file of the build's own, readable by the build user and seen at
// the same path from inside the sandbox.
func (j *job) file(rel string) string { return filepath.Join(filepath.Dir(j.scratch), rel) }

func (j *job) write(rel string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(j.file(rel)), 0o755); err != nil {
		return err
	}
	return os.WriteFile(j.file(rel), b, 0o644) //nolint:forbidigo // scratch
}

// compileOriginal compiles the touched files unpatched: as shipped, for the
// match proof, and in separate sections, for the differ. Both are kept in the
// cache, because they do not depend on the source patches.
func (j *job) compileOriginal(ctx context.Context, objects []object) error {
	done := j.clock.Step("compile_original", fmt.Sprintf("compile %d touched file(s) unpatched", len(objects)))
	reused := 0
	for _, v := range []struct{ flags, into string }{{flagsAsShipped, "shipped"}, {flagsForDiff, "original"}} {
		var missing []object
		for _, o := range objects {
			b, err := durable.ReadFile(j.cached(o, v.flags), livepatch.MaxModule)
			if err != nil {
				missing = append(missing, o)
				continue
			}
			reused++
			if err := j.write(filepath.Join(v.into, o.name()), b); err != nil {
				return err
			}
		}
		if len(missing) == 0 {
			continue
		}
		res, err := j.compile(ctx, missing, v.flags, v.into)
		if err != nil {
			return err
		}
		if res.Exit != 0 {
			return fault.New(fault.Internal, "compile", "compile %s unpatched: %s", missing[0].source, compilerSaid(res.Output))
		}
		for _, o := range missing {
			if err := j.keepCached(o, v.flags, j.file(filepath.Join(v.into, o.name()))); err != nil {
				return err
			}
		}
	}
	if reused > 0 {
		done(fmt.Sprintf("%d of %d reused", reused, 2*len(objects)))
	} else {
		done("")
	}
	return nil
}

// cached is where an unpatched object is kept: the name is the digest of all
// that it depends on.
func (j *job) cached(o object, flags string) string {
	e := j.plan.Kernel
	config, err := durable.ReadFile(filepath.Join(j.tree.Source(), ".config"), 4<<20)
	if err != nil {
		config = nil // the compilation will say why
	}
	digest := sha256.Sum256(config)
	sum := sha256.Sum256([]byte(strings.Join([]string{"objbuild/2", string(e.Release), e.SourceV, e.BuildID.String(),
		hex.EncodeToString(digest[:]), e.CC, j.compiler, e.ExtraCFlags, flags, o.source}, "\x00")))
	return filepath.Join(j.Cache, "objects", hex.EncodeToString(sum[:])+".o")
}

func (j *job) keepCached(o object, flags, file string) error {
	b, err := durable.ReadFile(file, livepatch.MaxModule)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(j.Cache, "objects"), 0o755); err != nil {
		return err
	}
	return durable.WriteFile(j.cached(o, flags), b, 0o644)
}

// applyAndCompile applies the source patches in order and compiles again. A
// patch must fit exactly: moved lines are accepted, other context is not.
func (j *job) applyAndCompile(ctx context.Context, objects []object) error {
	done := j.clock.Step("compile_patched", fmt.Sprintf("apply %d source patch(es), compile again", len(j.plan.Patches)))
	for _, p := range j.plan.Patches {
		res, err := j.run(ctx, sandbox.Command{Stdin: bytes.NewReader(p.Diff),
			Argv: []string{"patch", "-p1", "--unified", "--fuzz=0", "--batch", "--forward", "--no-backup-if-mismatch", "--reject-file=-"}})
		if err != nil {
			return err
		}
		if res.Exit != 0 {
			j.refuse(build.Refusal{Code: "patch_does_not_apply", File: strings.Join(p.Files, ", "), Detail: shorten(res.Output),
				Rule: fmt.Sprintf("source patch %s does not fit the source of this kernel", p.Name),
				Hint: "adapt the source patch to this kernel's source, or check whether an earlier one in the queue touches the same lines"})
			return nil
		}
	}
	res, err := j.compile(ctx, objects, flagsForDiff, "patched")
	if err != nil {
		return err
	}
	if res.Exit != 0 {
		j.refuse(build.Refusal{Code: "does_not_compile", File: strings.Join(j.plan.Files(), ", "), Detail: compilerSaid(res.Output),
			Rule: "the patched source does not compile on this kernel",
			Hint: "the fix may need another change first; look at what the named symbol needs"})
	}
	done("")
	return nil
}

// compilerSaid takes the first complaint out of a build log.
func compilerSaid(log []byte) string {
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, "error:") {
			return strings.TrimSpace(line)
		}
	}
	return shorten(log)
}

func shorten(b []byte) string {
	s := strings.TrimSpace(string(b))
	if len(s) > 2000 {
		s = s[:1000] + "\n…\n" + s[len(s)-1000:]
	}
	return s
}

// prove compares the unpatched objects, as shipped, with the kernel. It comes
// before the differ, which would blame the fix for a wrong environment.
func (j *job) prove(_ context.Context, objects []object) error {
	done := j.clock.Step("match", "prove that the unpatched code is what the kernel runs")
	m := &j.result.Match
	for _, o := range objects {
		changed, err := match.Changed(j.file(filepath.Join("original", o.name())), j.file(filepath.Join("patched", o.name())))
		if err != nil {
			return err
		}
		if err := j.kernel.Object(j.file(filepath.Join("shipped", o.name())), o.source, changed, m); err != nil {
			return err
		}
	}
	for _, d := range m.Different {
		if d.Replaced {
			j.refuseUnproved(d.File, d.Function, d.Why)
		}
	}
	done(fmt.Sprintf("%d of %d functions identical", m.Identical, m.Checked))
	return nil
}

func (j *job) refuseUnproved(file, function, why string) {
	j.refuse(build.Refusal{Code: "match_failed", File: file, Function: function, Detail: why,
		Rule: "compiled unpatched, the function must be byte for byte what the kernel runs",
		Hint: environmentHint(j.result.Match.Environment)})
}

// onlyReplaced reduces the proof to the functions that the livepatch really
// replaces, and refuses if one of them has none.
func (j *job) onlyReplaced(objects []object) {
	m := &j.result.Match
	var proved []match.Proved
	for _, o := range objects {
		for _, f := range o.changed {
			i := slices.IndexFunc(m.Replaced, func(p match.Proved) bool { return p.File == o.source && p.Function == f })
			if i < 0 {
				j.refuseUnproved(o.source, f, "the function was not compared")
				continue
			}
			proved = append(proved, m.Replaced[i])
		}
	}
	m.Replaced = proved
}

func environmentHint(env []match.Setting) string {
	if len(env) == 0 {
		return "the environment looks right; the function may be built differently in the kernel (weak, or by another rule)"
	}
	var parts []string
	for _, s := range env {
		parts = append(parts, fmt.Sprintf("%s is %s, the kernel's is %s", s.Aspect, s.Have, s.Want))
	}
	return "wrong environment: " + strings.Join(parts, "; ")
}

// functionNames are the functions replaced, in a stable order.
func functionNames(objects []object) []livepatch.Function {
	var out []livepatch.Function
	for _, o := range objects {
		for _, f := range o.changed {
			out = append(out, livepatch.Function{Object: "vmlinux", Name: f})
		}
	}
	slices.SortFunc(out, func(a, b livepatch.Function) int { return strings.Compare(a.String(), b.String()) })
	return slices.Compact(out)
}
