// SPDX-License-Identifier: Apache-2.0

package proof

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/player/playertest"
	"klatch/internal/livepatch"
)

var (
	checks = map[cve.ID][]byte{playertest.Flaw: []byte("#!/bin/sh\n")}
	built  = playertest.Built
)

func trialOf(t *testing.T, r *playertest.Rig, earlier ...build.Result) Trial {
	t.Helper()
	r.Digest = "fake 1"
	return Trial{Rig: r, Built: built(2), Tables: Tables{Vmlinux: playertest.Table(t)}, Earlier: earlier, Checks: checks, Parallel: 4, Dir: t.TempDir()}
}

func run(t *testing.T, tr Trial) Result {
	t.Helper()
	res, err := Run(t.Context(), tr)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func TestVerdicts(t *testing.T) {
	for _, c := range []struct {
		name    string
		rig     playertest.Rig
		checks  map[cve.ID][]byte
		verdict lab.Verdict
		check   livepatch.Check
		decided string // a scenario that decided, or nothing
		step    string
		why     string
	}{
		{"a good livepatch passes", playertest.Rig{Works: true}, checks, lab.Pass, livepatch.Passed, "", "", ""},
		{"work that goes wrong on the patched machine is the livepatch's fault", playertest.Rig{Works: true, Sick: true}, checks, lab.Fail, livepatch.Unchecked, "busy-machine", "busy-end", "read 3 bytes"},
		{"it must load again after a restart", playertest.Rig{Works: true, Gone: true}, checks, lab.Fail, livepatch.Unchecked, "reboot", "load", "Invalid module format"},
		{"one that loads and changes nothing fails", playertest.Rig{}, checks, lab.Fail, livepatch.Unchecked, "load-and-disable", "check fixed", "still shows"},
		{"a check that shows nothing before proves nothing", playertest.Rig{Flawless: true}, checks, lab.Fail, livepatch.Unchecked, "load-and-disable", "check flaw", "proves nothing"},
		{"a fix without a check is called unchecked", playertest.Rig{Works: true}, nil, lab.Pass, livepatch.Unchecked, "", "", ""},
		{"the kernel's refusal is the livepatch's fault", playertest.Rig{Refuses: true}, checks, lab.Fail, livepatch.Unchecked, "replace-sequence-1", "load earlier", "Invalid module format"},
		{"the builder's table is of another kernel", playertest.Rig{Works: true, Kallsyms: strings.Replace(playertest.Running, "ffffffff82000100", "ffffffff82000108", 1)},
			checks, lab.Fail, livepatch.Unchecked, "load-and-disable", "[symbols] symbols", "only 1 is at 0xffffffff82000108"},
		{"the kernel replaced another function of the name", playertest.Rig{Works: true, Listing: "%s/vmlinux/same,1\n%s/vmlinux/only,1\n"},
			checks, lab.Fail, livepatch.Unchecked, "load-and-disable", "positions", "same,1"},
		{"a kernel warning is the livepatch's fault", playertest.Rig{Works: true, WarnOnLoad: "[    5.000000] WARNING: CPU: 0 PID: 1 at kernel/x.c:1 f+0x1/0x2\n"},
			checks, lab.Fail, livepatch.Unchecked, "cancel", "", "WARNING"},
		{"an oops at the second call is found", playertest.Rig{Works: true, Second: true}, checks, lab.Fail, livepatch.Unchecked, "load-and-disable", "check fixed", "NULL pointer"},
		{"code that may sleep with a lock held is found", playertest.Rig{Works: true, Sleeps: true}, checks, lab.Fail, livepatch.Unchecked, "may-sleep", "run watch.sh after", "ended with status 1"},
		{"memory that grows with the calls is found", playertest.Rig{Works: true, Leaks: true}, checks, lab.Fail, livepatch.Unchecked, "leak", "leak-probe end ${CALLS}", "kmalloc-64 by 150 and 150 objects"},
		{"canceled, it must leave the old code", playertest.Rig{Works: true, Sticky: true}, checks, lab.Fail, livepatch.Unchecked, "cancel", "check flaw", "does not show"},
		{"a transition that does not end is its fault", playertest.Rig{Works: true, Stuck: true}, checks, lab.Fail, livepatch.Unchecked, "load-and-disable", "await-transition", "did not come within"},
		{"a taint that no livepatch brings is its fault", playertest.Rig{Works: true, Taint: 1 << 9}, checks, lab.Fail, livepatch.Unchecked, "load-and-disable", "", "0x200"},
		{"a machine that restarts by itself has failed, also in silence", playertest.Rig{Works: true, Resets: true}, checks, lab.Fail, livepatch.Unchecked, "load-and-disable", "", "restarted by itself"},
		{"a lab that does not boot is broken", playertest.Rig{Dead: errors.New("no emulator")}, checks, lab.Broken, livepatch.Unchecked, "reboot", "", "no emulator"},
		{"a kernel that complains before anything was tried is the lab's", playertest.Rig{Works: true, WarnAtBoot: "[    0.100000] WARNING: CPU: 0 PID: 1 at x.c:1 f+0x1/0x2\n"},
			checks, lab.Broken, livepatch.Unchecked, "cancel", "", "boot without trouble"},
		{"another build of the same release is the lab's", playertest.Rig{Works: true, OtherBuild: true}, checks, lab.Broken, livepatch.Unchecked, "cancel", "", "it runs build 0200"},
		{"a line that is cut is the lab's", playertest.Rig{Works: true, Cut: "insmod"}, checks, lab.Broken, livepatch.Unchecked, "cancel", "load-and-cancel", "line closed"},
		{"a clock that jumps is the lab's, whatever else is wrong", playertest.Rig{Jump: time.Hour}, checks, lab.Broken, livepatch.Unchecked, "load-and-disable", "check fixed", "clock jumped by 1h0m0s"},
		{"a machine that stood still is the lab's", playertest.Rig{Late: time.Minute}, checks, lab.Broken, livepatch.Unchecked, "load-and-disable", "check fixed", "went by"},
		{"a transition that is always over too early tells nothing", playertest.Rig{Works: true, Quick: true}, checks, lab.Broken, livepatch.Unchecked, "cancel", "load-and-cancel", "before it could be canceled"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tr := trialOf(t, &c.rig, built(1))
				tr.Checks = c.checks
				res := run(t, tr)
				if res.Verdict != c.verdict || res.Version != 2 {
					t.Errorf("verdict %s, want %s: %+v", res.Verdict, c.verdict, res.Scenarios)
				}
				if c.decided != "" {
					s := res.Scenarios[slices.IndexFunc(res.Scenarios, func(s Scenario) bool { return s.Name == c.decided })]
					step := ""
					for _, st := range s.Steps {
						if st.Line == s.Line {
							step = st.Text
						}
					}
					if s.Verdict != c.verdict || !strings.Contains(s.Why, c.why) || step != c.step {
						t.Errorf("%s: %s at %q: %s; want %s at %q: %s", s.Name, s.Verdict, step, s.Why, c.verdict, c.step, c.why)
					}
				}
				if len(res.Fixes) != 1 || res.Fixes[0].Check != c.check {
					t.Errorf("fixes %+v, want %s", res.Fixes, c.check)
				}
				dir := t.TempDir()
				if err := Keep(dir, res); err != nil {
					t.Fatal(err)
				}
				kept, err := Load(dir)
				if good := err == nil && kept.Verdict == lab.Pass && judge(kept.Required, kept.Scenarios) == lab.Pass; good != (c.verdict == lab.Pass) {
					t.Errorf("verdict %s is kept as a pass: %v", res.Verdict, good)
				}
			})
		})
	}
}

// forAll are the stories of a livepatch with a check and one predecessor, in
// vmlinux alone.
var forAll = []string{"busy-machine", "cancel", "leak", "load-and-disable", "may-sleep", "reboot", "replace-sequence-1"}

func TestRequiredStoriesAreNamedAndApplicable(t *testing.T) {
	synctest.Test(t, testRequiredStoriesAreNamedAndApplicable)
}

func testRequiredStoriesAreNamedAndApplicable(t *testing.T) {
	tr := trialOf(t, &playertest.Rig{Works: true}, built(1))
	res := run(t, tr)
	if !slices.Equal(res.Required, forAll) {
		t.Errorf("required %q", res.Required)
	}
	// The machine without an emulator has no kernel whose functions can be traced.
	if names := notApplicable(res); !slices.Equal(names, []string{"late-module", "stalled", "traced"}) || !strings.Contains(res.NotApplicable[0].Why, "no module") {
		t.Errorf("not applicable: %+v", res.NotApplicable)
	}
	for _, s := range res.Scenarios {
		if !s.Required || s.Rig != "virtual" || s.Hardware || len(s.Digest) != 64 || s.Finished.IsZero() || s.Proves == "" || len(s.Steps) == 0 {
			t.Errorf("scenario %+v", s)
		}
	}
	tr.Earlier, tr.Checks = nil, nil
	tr.Dir = t.TempDir()
	res = run(t, tr)
	if names := notApplicable(res); !slices.Equal(names, []string{"late-module", "leak", "may-sleep", "replace", "stalled", "traced"}) || !slices.Equal(res.Required, []string{"busy-machine", "cancel", "load-and-disable", "reboot"}) {
		t.Errorf("without checks and predecessors: required %q, not applicable %+v", res.Required, res.NotApplicable)
	}
}

func notApplicable(res Result) (names []string) {
	for _, n := range res.NotApplicable {
		names = append(names, n.Name)
	}
	return names
}

func TestAnUnchangedRunIsInstantAndAChangedOneIsNot(t *testing.T) {
	synctest.Test(t, testAnUnchangedRunIsInstantAndAChangedOneIsNot)
}

func testAnUnchangedRunIsInstantAndAChangedOneIsNot(t *testing.T) {
	rig := &playertest.Rig{Works: true}
	tr := trialOf(t, rig, built(1))
	first := run(t, tr)
	boots := rig.Boots()
	if boots != len(forAll) {
		t.Errorf("%d boots", boots)
	}
	again := run(t, tr)
	if rig.Boots() != boots || again.Verdict != lab.Pass || !again.Scenarios[0].Reused || again.Fixes[0].Check != livepatch.Passed {
		t.Errorf("again: %d boots more, %+v", rig.Boots()-boots, again)
	}
	for i := range first.Scenarios {
		if first.Scenarios[i].Digest != again.Scenarios[i].Digest {
			t.Errorf("%s: another digest", first.Scenarios[i].Name)
		}
	}
	for name, change := range map[string]func(*Trial){
		"the module":     func(tr *Trial) { m := *tr.Built.Module; m.SHA256 = strings.Repeat("a", 64); tr.Built.Module = &m },
		"a check":        func(tr *Trial) { tr.Checks = map[cve.ID][]byte{playertest.Flaw: []byte("#!/bin/sh\n#\n")} },
		"the build id":   func(tr *Trial) { rig.OtherBuild, tr.Built.BuildID[0] = true, 2 },
		"the tables":     func(tr *Trial) { tr.Tables.Vmlinux = otherTable(t) },
		"the processors": func(tr *Trial) { tr.CPUs = 4 },
		"the load":       func(tr *Trial) { tr.Busy = time.Minute },
		"earlier ones": func(tr *Trial) {
			e := built(1)
			e.Module.SHA256 = strings.Repeat("b", 64)
			tr.Earlier = []build.Result{e}
		},
		"the rig":        func(*Trial) { rig.Digest = "fake 2" },
		"an unknown rig": func(*Trial) { rig.Digest = "" },
		"the wish":       func(tr *Trial) { tr.Again = true },
		"the kernel": func(tr *Trial) {
			tr.Kernel = filepath.Join(t.TempDir(), "image")
			if err := os.WriteFile(tr.Kernel, []byte("image"), 0o644); err != nil {
				t.Fatal(err)
			}
		},
	} {
		changed := tr
		rig.Digest, rig.OtherBuild = "fake 1", false
		change(&changed)
		before := rig.Boots()
		run(t, changed)
		if n := rig.Boots() - before; n != len(forAll) {
			t.Errorf("with another %s %d of %d stories were played again", name, n, len(forAll))
		}
	}
}

// otherTable is a table with one function less.
func otherTable(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "other")
	text := strings.Replace(playertest.Symbols, "FUNC    GLOBAL DEFAULT    1 only", "OBJECT  GLOBAL DEFAULT    1 only", 1)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestAnInterruptedRunGoesOn(t *testing.T) { synctest.Test(t, testAnInterruptedRunGoesOn) }

func testAnInterruptedRunGoesOn(t *testing.T) {
	rig := &playertest.Rig{Works: true}
	tr := trialOf(t, rig, built(1))
	tr.Parallel = 1
	ctx, cancel := context.WithCancel(t.Context())
	rig.OnBoot = func(lab.Spec) {
		if rig.Boots() == 3 {
			cancel()
		}
	}
	if _, err := Run(ctx, tr); fault.CodeOf(err) != "interrupted" || fault.KindOf(err) != fault.Unavailable {
		t.Fatalf("interrupted: %v", err)
	}
	done := rig.Boots()
	res := run(t, tr)
	if n := rig.Boots() - done; n != len(forAll)-2 || res.Verdict != lab.Pass {
		t.Errorf("%d stories were played to go on, verdict %s", n, res.Verdict)
	}
}

func TestWhatWasBrokenIsPlayedAgain(t *testing.T) { synctest.Test(t, testWhatWasBrokenIsPlayedAgain) }

func testWhatWasBrokenIsPlayedAgain(t *testing.T) {
	rig := &playertest.Rig{Works: true, Cut: "drop_caches"}
	tr := trialOf(t, rig)
	if res := run(t, tr); res.Verdict != lab.Broken {
		t.Fatalf("verdict %s", res.Verdict)
	}
	rig.Cut = ""
	before := rig.Boots()
	if res := run(t, tr); res.Verdict != lab.Pass || rig.Boots()-before != 1 {
		t.Errorf("verdict %s after %d stories", res.Verdict, rig.Boots()-before)
	}
}

// TestARunThatDiesLeavesNoOutcome: the inputs are on disk before the machine
// boots, and the outcome of an earlier run is gone by then.
func TestARunThatDiesLeavesNoOutcome(t *testing.T) { synctest.Test(t, testARunThatDiesLeavesNoOutcome) }

func testARunThatDiesLeavesNoOutcome(t *testing.T) {
	rig := &playertest.Rig{Works: true}
	tr := trialOf(t, rig)
	tr.Only, tr.Again = []string{"cancel"}, true
	run(t, tr)
	looked := false
	rig.OnBoot = func(lab.Spec) {
		dirs, err := filepath.Glob(filepath.Join(tr.Dir, "cancel-*"))
		if err != nil || len(dirs) != 1 {
			t.Fatalf("runs %q, %v", dirs, err)
		}
		if _, err := os.Stat(filepath.Join(dirs[0], resultName)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("an outcome while it is played: %v", err)
		}
		in, err := ReadRun(tr.Dir, filepath.Base(dirs[0]))
		if err != nil || in.Name != "cancel" || in.Module.SHA256 != built(2).Module.SHA256 || in.Started.IsZero() {
			t.Errorf("inputs %+v, %v", in, err)
		}
		looked = true
	}
	run(t, tr)
	if !looked {
		t.Error("not played")
	}
}

// TestRigsAddUp: what real hardware found out stays beside what virtual
// machines did, and each may stop the livepatch.
// TestOwnStoriesAreNotLost: a folder with a strange name, or one that cannot be
// read, is no folder without required stories.
func TestOwnStoriesAreNotLost(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "klatch[prod]")
	all := filepath.Join(dir, "scenarios", "all")
	if err := os.MkdirAll(all, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(all, "mine.txtar"), []byte("# It loads.\nload\nawait-transition\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if own, err := Own(dir, "debian-6.1", nil); err != nil || len(own) != 1 {
		t.Errorf("%d stories, %v", len(own), err)
	}
	if err := os.WriteFile(filepath.Join(dir, "scenarios", "series"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Own(dir, "debian-6.1", nil); err == nil {
		t.Error("a folder that cannot be read passes for an empty one")
	}
}

// TestAModuleThatIsNotTheBuiltOneIsNotTried: what passes is what was hashed.
func TestAModuleThatIsNotTheBuiltOneIsNotTried(t *testing.T) {
	tr := trialOf(t, &playertest.Rig{Works: true})
	tr.Built.Module.Path = filepath.Join(t.TempDir(), "klatch_2.ko")
	if err := os.WriteFile(tr.Built.Module.Path, []byte("another"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Run(t.Context(), tr); fault.CodeOf(err) != "module_digest" {
		t.Errorf("error %v", err)
	}
}

// TestWhatIsNoPass: the whole passes only if every required story did.
func TestWhatIsNoPass(t *testing.T) {
	good := run(t, trialOf(t, &playertest.Rig{Works: true}))
	if judge(good.Required, good.Scenarios) != lab.Pass {
		t.Fatalf("%+v", good)
	}
	for name, change := range map[string]func(*Result){
		"nothing required": func(r *Result) { r.Required = nil },
		"one missing":      func(r *Result) { r.Scenarios = r.Scenarios[1:] },
		"one that failed":  func(r *Result) { r.Scenarios[0].Verdict = lab.Fail },
		"one broken":       func(r *Result) { r.Scenarios[0].Verdict = lab.Broken },
		"one that is none": func(r *Result) { r.Scenarios[0].Verdict = "passed" },
	} {
		r := good
		r.Scenarios = slices.Clone(good.Scenarios)
		change(&r)
		if v := judge(r.Required, r.Scenarios); v == lab.Pass {
			t.Errorf("%s: %s", name, v)
		}
	}
}

// TestAResultOfAnotherVersionIsNotKept: it says other things by the same names.
func TestAResultOfAnotherVersionIsNotKept(t *testing.T) {
	dir := t.TempDir()
	r := Result{Version: ResultVersion, ModuleSHA256: "a", BuildID: "b", Required: []string{"x"}, Scenarios: []Scenario{{Name: "x", Rig: "qemu", Verdict: lab.Pass}}}
	old := r
	old.Version, old.Scenarios = 1, []Scenario{{Name: "x", Verdict: lab.Fail}}
	b, err := json.Marshal(old)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, resultFile), b, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := Keep(dir, r); err != nil {
		t.Fatal(err)
	}
	if got, err := Load(dir); err != nil || len(got.Scenarios) != 1 || got.Scenarios[0].Rig != "qemu" {
		t.Errorf("%+v, %v", got.Scenarios, err)
	}
}

func TestRigsAddUp(t *testing.T) { synctest.Test(t, testRigsAddUp) }

func testRigsAddUp(t *testing.T) {
	dir := t.TempDir()
	virtual := run(t, trialOf(t, &playertest.Rig{Works: true}))
	board := virtual
	board.Scenarios = slices.Clone(virtual.Scenarios)
	for i := range board.Scenarios {
		board.Scenarios[i].Rig, board.Scenarios[i].Hardware = "board", true
	}
	board.Scenarios[0].Verdict, board.Verdict = lab.Fail, lab.Fail
	for _, r := range []Result{board, virtual} {
		if err := Keep(dir, r); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Load(dir)
	if err != nil || len(got.Scenarios) != 2*len(virtual.Scenarios) || got.Verdict != lab.Fail || got.Fixes[0].Check != livepatch.Unchecked {
		t.Errorf("verdict %s with %d scenarios, %v", got.Verdict, len(got.Scenarios), err)
	}
	board.Scenarios[0].Verdict, board.Verdict = lab.Pass, lab.Pass
	if err := Keep(dir, board); err != nil {
		t.Fatal(err)
	}
	if got, err = Load(dir); err != nil || got.Verdict != lab.Pass || got.Fixes[0].Check != livepatch.Passed {
		t.Errorf("after a good run: verdict %s, %+v, %v", got.Verdict, got.Fixes, err)
	}
	next := virtual
	next.ModuleSHA256 = strings.Repeat("c", 64)
	if err := Keep(dir, next); err != nil {
		t.Fatal(err)
	}
	if got, err = Load(dir); err != nil || len(got.Scenarios) != len(virtual.Scenarios) {
		t.Errorf("another module keeps %d scenarios of the old one", len(got.Scenarios)-len(virtual.Scenarios))
	}
}
