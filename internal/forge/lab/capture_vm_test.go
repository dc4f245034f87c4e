// SPDX-License-Identifier: Apache-2.0

//go:build vm

package lab_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/testkit"
)

// modulesEnv names the folder with the modules of lab/livepatches and
// lab/modules, built for the kernel under test, and a program "crash".
const modulesEnv = "KLATCH_LAB_MODULES"

// TestCapture makes each kind of trouble on a real kernel and checks that the
// detector sees it; with -update the consoles become the corpus.
func TestCapture(t *testing.T) {
	testkit.Need(t, "qemu", "kernel")
	modules := os.Getenv(modulesEnv)
	if modules == "" {
		t.Skip("need modules for the kernel in " + modulesEnv)
	}
	rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t), Scratch: t.TempDir(), Accelerator: "tcg"})
	if err != nil {
		t.Fatal(err)
	}
	spec := lab.Spec{Name: "capture", Kernel: testkit.Kernel(), MemoryMiB: 256}
	for _, f := range []string{"klatch_ok.ko", "klatch_refuses.ko", "trouble.ko", "crash"} {
		spec.Files = append(spec.Files, lab.File{Name: f, Source: filepath.Join(modules, f), Mode: 0o755})
	}
	trouble := func(what string) string { return "insmod /lab/trouble.ko what=" + what }
	for _, tt := range []struct {
		name, script string
		want         lab.TroubleKind
	}{
		{"clean-boot", "true", ""},
		{"clean-livepatch", `insmod /lab/klatch_ok.ko
			while [ "$(cat /sys/kernel/livepatch/klatch_ok/transition)" = 1 ]; do sleep 0.2; done
			grep -q klatch_ok /proc/cmdline
			echo 0 > /sys/kernel/livepatch/klatch_ok/enabled
			while [ -d /sys/kernel/livepatch/klatch_ok ]; do sleep 0.2; done
			rmmod klatch_ok`, ""},
		{"clean-cancel", `insmod /lab/klatch_ok.ko; echo 0 > /sys/kernel/livepatch/klatch_ok/enabled; sleep 3`, ""},
		{"warning", trouble("warn"), lab.Warning},
		{"refcount", trouble("refcount"), lab.Warning},
		{"list", trouble("list"), lab.Oops},
		{"bug", trouble("bug"), lab.Oops},
		{"null", trouble("null"), lab.Oops},
		{"gpf", trouble("gpf"), lab.Oops},
		{"divide", trouble("divide"), lab.Oops},
		{"atomic", trouble("atomic"), lab.Atomic},
		{"alloc", trouble("alloc"), lab.Memory},
		{"hung", "echo 3 > /proc/sys/kernel/hung_task_timeout_secs; " + trouble("hung") + "; sleep 9", lab.HungTask},
		{"stall", trouble("stall"), lab.Stall},
		{"panic", "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 30", lab.Panic},
		{"oom", "echo 1 > /proc/sys/kernel/sysrq; sleep 60 & echo f > /proc/sysrq-trigger; sleep 2", lab.Memory},
		{"user-crash", "/lab/crash; sleep 1", lab.UserCrash},
		{"livepatch-refused", "insmod /lab/klatch_refuses.ko", lab.Livepatch},
	} {
		t.Run(tt.name, func(t *testing.T) { capture(t, rig, spec, tt.name, tt.script, tt.want) })
	}
}

func capture(t *testing.T, rig lab.Rig, spec lab.Spec, name, script string, want lab.TroubleKind) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	m, err := rig.Boot(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	before := m.BootID()
	res, err := m.Run(ctx, lab.Command{Argv: []string{"sh", "-ec", script}, Timeout: 90 * time.Second})
	if errors.Is(err, lab.ErrGuestRebooted) {
		if err := m.Await(ctx, before); err != nil {
			t.Fatal(err)
		}
	} else if err != nil {
		t.Fatal(err)
	}
	t.Logf("exit status %d, timed out %v: %s", res.Exit, res.TimedOut, res.Stderr)
	text, err := m.Console()
	if err != nil {
		t.Fatal(err)
	}
	found := lab.ScanConsole(text)
	kinds := []string{}
	for _, tr := range found {
		kinds = append(kinds, string(tr.Kind)+": "+tr.Title)
	}
	t.Logf("found:\n%s", strings.Join(kinds, "\n"))
	switch {
	case want == "" && len(found) > 0:
		t.Error("trouble on a clean machine")
	case want != "" && (len(found) == 0 || found[0].Kind != want):
		t.Errorf("want %s first", want)
	}
	if want == "" && res.Exit != 0 {
		t.Errorf("exit status %d", res.Exit)
	}
	if *update {
		if err := os.WriteFile(filepath.Join("testdata/console", name+".log"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
