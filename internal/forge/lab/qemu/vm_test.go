// SPDX-License-Identifier: Apache-2.0

//go:build vm

package qemu_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/testkit"
)

func newRig(t *testing.T, change func(*qemu.Config)) *qemu.Rig {
	t.Helper()
	testkit.Need(t, "qemu", "kernel")
	cfg := qemu.Config{Guest: labtest.GuestProgram(t), Scratch: t.TempDir(), Accelerator: "tcg",
		Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	if change != nil {
		change(&cfg)
	}
	rig, err := qemu.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return rig
}

func TestSmallGuest(t *testing.T) {
	rig := newRig(t, nil)
	labtest.Run(t, rig, lab.Spec{Name: "small", Kernel: testkit.Kernel()})
}

// TestAMachineThatStandsStillIsBootedOnceMore: the emulator's fault, before
// anything was loaded.
func TestAMachineThatStandsStillIsBootedOnceMore(t *testing.T) {
	rig := newRig(t, nil)
	boots := qemu.StopFirstForTest(rig, 25*time.Second)
	m, err := rig.Boot(t.Context(), lab.Spec{Name: "still", Kernel: testkit.Kernel()})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil || boots() != 2 {
		t.Errorf("%d boots, %v", boots(), err)
	}
}

func TestTwoMachinesSideBySideLeaveNothingBehind(t *testing.T) {
	var scratch string
	rig := newRig(t, func(c *qemu.Config) { scratch = c.Scratch })
	var wg sync.WaitGroup
	ids := make([]string, 2)
	for i := range ids {
		wg.Go(func() {
			m, err := rig.Boot(t.Context(), lab.Spec{Name: "parallel", Kernel: testkit.Kernel()})
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = m.BootID()
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if ids[0] == "" || ids[0] == ids[1] {
		t.Errorf("boot ids %q", ids)
	}
	if left, err := os.ReadDir(scratch); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestAcceleratorIsFoundOutAndRemembered(t *testing.T) {
	cache := t.TempDir()
	for _, what := range []string{"probed", "remembered"} {
		rig := newRig(t, func(c *qemu.Config) { c.Accelerator, c.Cache = "", cache })
		began := time.Now()
		m, err := rig.Boot(t.Context(), lab.Spec{Name: what, Kernel: testkit.Kernel()})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: booted after %v", what, time.Since(began))
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		files, err := filepath.Glob(filepath.Join(cache, "accelerator-*.json"))
		if _, kvmErr := os.Stat("/dev/kvm"); kvmErr == nil && len(files) != 1 {
			t.Errorf("cache holds %v, %v", files, err)
		}
		for _, f := range files {
			b, _ := os.ReadFile(f)
			t.Logf("%s", b)
		}
	}
}

func TestBrokenLab(t *testing.T) {
	rig := newRig(t, nil)
	junk := filepath.Join(t.TempDir(), "junk")
	if err := os.WriteFile(junk, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	good := lab.Spec{Name: "broken", Kernel: testkit.Kernel(), BootTimeout: time.Minute}
	bootOnly := func(change func(*lab.Spec)) func(context.Context, lab.Rig) error {
		return func(ctx context.Context, rig lab.Rig) error {
			s := good
			change(&s)
			m, err := rig.Boot(ctx, s)
			if err == nil {
				m.Close()
			}
			return err
		}
	}
	labtest.RunBroken(t, rig, map[string]func(context.Context, lab.Rig) error{
		"no kernel file":       bootOnly(func(s *lab.Spec) { s.Kernel = filepath.Join(junk, "no-such-kernel") }),
		"kernel is junk":       bootOnly(func(s *lab.Spec) { s.Kernel, s.BootTimeout = junk, 10*time.Second }),
		"no root disk":         bootOnly(func(s *lab.Spec) { s.Root = junk + "-no" }),
		"root disk is junk":    bootOnly(func(s *lab.Spec) { s.Root, s.BootTimeout = junk, 25*time.Second }),
		"guest file missing":   bootOnly(func(s *lab.Spec) { s.Files = []lab.File{{Name: "x", Source: junk + "-no"}} }),
		"guest never answers":  bootOnly(func(s *lab.Spec) { s.Append, s.BootTimeout = []string{"rdinit=/bin/busybox"}, 20*time.Second }),
		"memory does not fit":  bootOnly(func(s *lab.Spec) { s.MemoryMiB, s.BootTimeout = 1<<30, 10*time.Second }),
		"guest takes too long": bootOnly(func(s *lab.Spec) { s.BootTimeout = 100 * time.Millisecond }),
		"emulator is killed under a command": func(ctx context.Context, rig lab.Rig) error {
			m, err := rig.Boot(ctx, good)
			if err != nil {
				t.Error(err)
				return err
			}
			defer m.Close()
			time.AfterFunc(time.Second, func() { qemu.KillForTest(m) })
			_, err = m.Run(ctx, lab.Command{Argv: []string{"sleep", "60"}})
			return err
		},
		"guest switches itself off": func(ctx context.Context, rig lab.Rig) error {
			m, err := rig.Boot(ctx, good)
			if err != nil {
				t.Error(err)
				return err
			}
			defer m.Close()
			_, err = m.Run(ctx, lab.Command{Argv: []string{"sh", "-c", "poweroff -f; sleep 60"}})
			return err
		},
		"emulator stands still": func(ctx context.Context, rig lab.Rig) error {
			m, err := rig.Boot(ctx, good)
			if err != nil {
				t.Error(err)
				return err
			}
			defer m.Close()
			qemu.StopForTest(m)
			_, err = m.Run(ctx, lab.Command{Argv: []string{"true"}, Timeout: time.Second})
			return err
		},
	})
}
