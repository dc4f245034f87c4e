// SPDX-License-Identifier: Apache-2.0

//go:build vm

package proof_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/demo"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/forge/proof"
	"klatch/internal/forge/queue"
	"klatch/internal/livepatch"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
)

// fixed builds the livepatch with the first n of the demo's real fixes, as
// sequence n.
func fixed(t testing.TB, k kerneltest.Kernel, n int) build.Result {
	t.Helper()
	newest, err := k.Maker.Archive.Find(t.Context(), k.Entry.Source, "")
	if err != nil {
		t.Fatal(err)
	}
	var patches []queue.Patch
	for _, f := range demo.Fixes[:n] {
		newer, err := k.Maker.Files(t.Context(), k.Entry.Source, newest.Version, []string{f.File})
		if err != nil {
			t.Fatal(err)
		}
		diff, err := queue.Change(t.Context(), k.Tree.Source(), newer, []string{f.File}, []string{f.Function})
		if err != nil {
			t.Fatal(err)
		}
		patches = append(patches, queue.Patch{Name: f.CVE, Fixes: []cve.ID{cve.ID(f.CVE)}, Diff: diff, Files: []string{f.File}})
	}
	plan, err := compose.New(k.Entry, patches, k.Tools.Version(), livepatch.Sequence(n))
	if err != nil {
		t.Fatal(err)
	}
	res, err := build.Run(t.Context(), &objbuild.Driver{Cache: k.Cache, Tools: k.Tools}, plan, t.TempDir(), build.NewClock(nil))
	if err != nil || res.Result != build.Built {
		t.Fatalf("%v: %s %s %+v", err, res.Result, res.Error, res.Refusals)
	}
	return res
}

// checks compiles the programs that show the flaws.
func checks(t testing.TB) map[cve.ID][]byte {
	t.Helper()
	all := map[cve.ID][]byte{}
	for _, f := range demo.Fixes {
		out := filepath.Join(t.TempDir(), "check")
		cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, f.Check)
		cmd.Dir, cmd.Env = "../../..", append(os.Environ(), "CGO_ENABLED=0")
		if msg, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, msg)
		}
		b, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		all[cve.ID(f.CVE)] = b
	}
	return all
}

// rigOf makes virtual machines, and counts them.
func rigOf(t testing.TB, k kerneltest.Kernel) *counted {
	t.Helper()
	scratch := t.TempDir()
	rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t), Cache: filepath.Join(k.Cache, "lab"), Scratch: scratch})
	if err != nil {
		t.Fatal(err)
	}
	return &counted{Rig: rig, scratch: scratch}
}

// counted is a rig with a say in what it boots.
type counted struct {
	*qemu.Rig
	scratch string
	mu      sync.Mutex
	boots   []string
	change  func(*lab.Spec)
	wrap    func(lab.Machine) lab.Machine
}

func (c *counted) Boot(ctx context.Context, s lab.Spec) (lab.Machine, error) {
	c.mu.Lock()
	c.boots = append(c.boots, s.Name)
	c.mu.Unlock()
	if c.change != nil {
		c.change(&s)
	}
	m, err := c.Rig.Boot(ctx, s)
	if err == nil && c.wrap != nil {
		m = c.wrap(m)
	}
	return m, err
}

func logAll(t testing.TB, r proof.Result) {
	t.Helper()
	for _, s := range r.Scenarios {
		t.Logf("%-6s %-22s %5.1f s, boot %4.1f s  %s  %s", s.Verdict, s.Name, s.Seconds, s.Boot, s.Note, s.Why)
	}
}

// TestTheWholeGate: two real fixes, the second cumulative, through all
// stories on the stock kernel; again, which boots nothing; and one story again
// from its recorded inputs.
func TestTheWholeGate(t *testing.T) {
	testkit.Need(t, "qemu")
	k := kerneltest.Prepared(t)
	one, two := fixed(t, k, 1), fixed(t, k, 2)
	rig := rigOf(t, k)
	trial := proof.Trial{Rig: rig, Kernel: k.Tree.Image(), Built: two, Earlier: []build.Result{one}, Checks: checks(t), Dir: t.TempDir(), Busy: 8 * time.Second,
		Tables: proof.Tables{Vmlinux: k.Tree.Symbols(), Module: k.Tree.ModuleFile}}
	start := time.Now()
	res, err := proof.Run(t.Context(), trial)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the whole gate took %.1f s", time.Since(start).Seconds())
	logAll(t, res)
	if res.Verdict != lab.Pass {
		t.Fatalf("verdict %s: %+v", res.Verdict, res.Trouble)
	}
	for _, want := range []string{"busy-machine", "cancel", "leak", "load-and-disable", "reboot", "replace-sequence-1", "stalled", "traced"} {
		if !slices.Contains(res.Required, want) {
			t.Errorf("%s is not required: %q", want, res.Required)
		}
	}
	for _, f := range res.Fixes {
		if f.Check != livepatch.Passed {
			t.Errorf("%s is %s", f.CVE, f.Check)
		}
	}
	boots := len(rig.boots)
	start = time.Now()
	again, err := proof.Run(t.Context(), trial)
	if err != nil || again.Verdict != lab.Pass || len(rig.boots) != boots {
		t.Errorf("again: %s with %d boots more, %v", again.Verdict, len(rig.boots)-boots, err)
	}
	t.Logf("again took %.2f s", time.Since(start).Seconds())

	i := slices.IndexFunc(res.Scenarios, func(s proof.Scenario) bool { return s.Name == "cancel" })
	trial.Checks = nil // today's; the recorded ones count
	s, err := proof.Replay(t.Context(), trial, res.Scenarios[i].Run, []build.Result{one, two})
	if err != nil || s.Verdict != lab.Pass || len(rig.boots) != boots+1 || s.Digest != res.Scenarios[i].Digest {
		t.Errorf("replay: %v, %d boots, %+v", err, len(rig.boots)-boots, s)
	}
	kept, err := proof.Run(t.Context(), proof.Trial{Rig: rig, Kernel: trial.Kernel, Built: two, Earlier: trial.Earlier, Checks: checks(t), Dir: trial.Dir,
		Tables: trial.Tables, Busy: trial.Busy, Only: []string{"cancel"}})
	if err != nil || kept.Scenarios[0].Finished != res.Scenarios[i].Finished {
		t.Errorf("the replay changed what was kept: %v, %+v", err, kept.Scenarios)
	}
}
