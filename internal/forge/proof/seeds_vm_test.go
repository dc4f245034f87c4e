// SPDX-License-Identifier: Apache-2.0

//go:build vm

package proof_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/forge/build"
	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/forge/proof"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
	"klatch/internal/testkit/seeded"
)

// stoppedBy says which story is meant to stop each seeded livepatch, and what
// it says then.
var stoppedBy = map[string]struct{ story, why string }{
	"changes-nothing": {"load-and-disable", `still shows`},
	"wrong-function":  {"load-and-disable", `still shows`},
	"wrong-position":  {"load-and-disable", `the kernel lists \["vmlinux/type_show,`},
	"sleeps-atomic":   {"may-sleep", `BUG: scheduling while atomic`},
	"may-sleep":       {"may-sleep", `may sleep where that is forbidden.*mutex_lock`},
	"leaks":           {"leak", `grows with the calls.* kmalloc-96 `},
	"breaks-chain":    {"replace-sequence-6", `WARNING: |load klatch_7.ko: `},
	"second-call":     {"load-and-disable", `BUG: kernel NULL pointer dereference`},
	"never-finishes":  {"load-and-disable", `transition of klatch_7 did not come within`},
	"module-unload":   {"late-module", `BUG: kernel NULL pointer dereference`},
	"own-unload":      {"load-and-disable", `BUG: unable to handle page fault|general protection fault`},
}

// twinsInCI are those whose story might cry wolf by itself; the stories of the
// others are passed by the livepatches of other tests too.
var twinsInCI = []string{"leaks", "may-sleep"}

// variants are of a class that another seed shows; they take long.
var variants = []string{"wrong-position", "own-unload"}

// TestSeededLivepatchesAreStopped: the gate stops each seeded livepatch, by
// the story meant for it, and lets its good twin through the same one. With
// KLATCH_LONG all good twins are tried, and go through all stories.
func TestSeededLivepatchesAreStopped(t *testing.T) {
	testkit.Need(t, "qemu")
	k := kerneltest.Prepared(t)
	rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t), Cache: filepath.Join(k.Cache, "lab")})
	if err != nil {
		t.Fatal(err)
	}
	earlier := seeded.Predecessor(t, k)
	all := seeded.All()
	for name := range stoppedBy {
		if !slices.ContainsFunc(all, func(s seeded.Seed) bool { return s.Name == name }) {
			t.Errorf("there is no seed %q", name)
		}
	}
	for _, s := range all {
		t.Run(s.Name, func(t *testing.T) {
			if slices.Contains(variants, s.Name) {
				testkit.Need(t, "long")
			}
			t.Parallel()
			want, ok := stoppedBy[s.Name]
			if !ok {
				t.Fatal("no story is meant to stop it")
			}
			trial := proof.Trial{Rig: rig, Kernel: k.Tree.Image(), Earlier: []build.Result{earlier}, Parallel: 1,
				Tables: proof.Tables{Vmlinux: k.Tree.Symbols(), Module: k.Tree.ModuleFile},
				Checks: map[cve.ID][]byte{seeded.Fix: s.Check(t)}, Only: []string{want.story}, Dir: t.TempDir()}
			trial.Built = s.Build(t, k, false)
			got := played(t, trial)
			if len(got) != 1 || got[0].Name != want.story || got[0].Verdict != lab.Fail {
				t.Fatalf("%s: got %+v, want a fail of %s", s.Fault, got, want.story)
			}
			if !regexp.MustCompile(`(?s)` + want.why).MatchString(got[0].Why) {
				t.Errorf("%s: says %q, want %s", s.Fault, got[0].Why, want.why)
			}
			if os.Getenv(testkit.LongEnv) != "" {
				trial.Only = nil
			} else if !slices.Contains(twinsInCI, s.Name) {
				return
			}
			trial.Built = s.Build(t, k, true)
			for _, g := range played(t, trial) {
				if g.Verdict != lab.Pass {
					t.Errorf("the good twin: %s %s: %s", g.Name, g.Verdict, g.Why)
				}
			}
		})
	}
}

// played plays the stories, and shows how they ended.
func played(t *testing.T, trial proof.Trial) []proof.Scenario {
	t.Helper()
	res, err := proof.Run(t.Context(), trial)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range res.Scenarios {
		t.Logf("%s %s, line %d, %.1f s: %s %s", s.Name, s.Verdict, s.Line, s.Seconds, shorter(s.Why), s.Note)
	}
	return res.Scenarios
}

func shorter(s string) string {
	if len(s) > 300 {
		s = s[:300] + "…"
	}
	return strings.ReplaceAll(fmt.Sprint(s), "\n", " / ")
}
