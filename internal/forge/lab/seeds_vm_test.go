// SPDX-License-Identifier: Apache-2.0

//go:build vm

package lab_test

import (
	"path/filepath"
	"testing"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
	"klatch/internal/testkit/seeded"
)

// seedScripts make the trouble of each seeded livepatch that has some in the
// kernel's log, with the least that does. What stays silent is listed too: the
// detector alone does not stop it, a story must.
var seedScripts = map[string]struct {
	script string
	want   lab.TroubleKind
}{
	"sleeps-atomic":  {`load 7; cat /proc/cmdline >/tmp/out`, lab.Atomic},
	"second-call":    {`load 7; cat /proc/cmdline; ! cat /proc/cmdline >/tmp/out`, lab.Oops},
	"breaks-chain":   {`load 6; ! insmod /lab/klatch_7.ko`, lab.Warning},
	"module-unload":  {`insmod /lab/loop.ko; load 7; rmmod loop; ! cat /proc/cmdline >/tmp/out`, lab.Oops},
	"own-unload":     {`load 7; sleep 1; disable 7; sleep 5`, lab.Oops},
	"may-sleep":      {`load 7; for i in 1 2 3 4 5 6 7 8; do cat /proc/cmdline; done; disable 7`, ""},
	"leaks":          {`load 7; for i in 1 2 3 4 5 6 7 8; do cat /proc/cmdline; done; disable 7`, ""},
	"never-finishes": {`insmod /lab/klatch_7.ko; sleep 20; cat /sys/kernel/livepatch/klatch_7/transition`, ""},
}

// TestCaptureSeeds takes the consoles of the seeded livepatches; with -update
// they become part of the corpus.
func TestCaptureSeeds(t *testing.T) {
	testkit.Need(t, "qemu", "long")
	k := kerneltest.Prepared(t)
	rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t), Cache: filepath.Join(k.Cache, "lab")})
	if err != nil {
		t.Fatal(err)
	}
	earlier := seeded.Predecessor(t, k)
	for _, s := range seeded.All() {
		tt, ok := seedScripts[s.Name]
		if !ok {
			continue // its fault is in what it replaces: the log says nothing
		}
		t.Run(s.Name, func(t *testing.T) {
			built := s.Build(t, k, false)
			spec := lab.Spec{Name: "capture", Kernel: k.Tree.Image(), MemoryMiB: 256, Files: []lab.File{
				{Name: "klatch_6.ko", Source: earlier.Module.Path}, {Name: "klatch_7.ko", Source: built.Module.Path},
				{Name: "loop.ko", Source: k.Tree.ModuleFile("loop")}}}
			name := "seed-" + s.Name
			if tt.want == "" {
				name = "clean-" + name
			}
			capture(t, rig, spec, name, bootFunctions+tt.script, tt.want)
		})
	}
}
