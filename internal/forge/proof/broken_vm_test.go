// SPDX-License-Identifier: Apache-2.0

//go:build vm

package proof_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/player"
	"klatch/internal/forge/lab/story"
	"klatch/internal/forge/proof"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
)

// killed cuts the emulator's life at a command.
type killed struct {
	lab.Machine
	at     string
	signal syscall.Signal
	dir    string // the rig's scratch folder, which the emulator's working folder is below
}

func (k killed) Run(ctx context.Context, c lab.Command) (lab.Result, error) {
	if strings.Contains(strings.Join(c.Argv, " "), k.at) {
		if err := k.hit(); err != nil {
			return lab.Result{}, err // a mistake of the test: the verdict is broken for another reason
		}
	}
	return k.Machine.Run(ctx, c)
}

// hit finds the emulator by its working folder.
func (k killed) hit() error {
	dirs, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		return err
	}
	for _, d := range dirs {
		to, err := os.Readlink(d)
		if err != nil || !strings.HasPrefix(to, k.dir+"/") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(d)))
		if err != nil {
			return err
		}
		return syscall.Kill(pid, k.signal)
	}
	return fmt.Errorf("no emulator below %s", k.dir)
}

// TestABrokenLabNeverPassesAndNeverBlames breaks the lab on purpose under a
// real livepatch on the real kernel.
func TestABrokenLabNeverPassesAndNeverBlames(t *testing.T) {
	testkit.Need(t, "qemu")
	k := kerneltest.Prepared(t)
	good := fixed(t, k, 1)
	junk := filepath.Join(t.TempDir(), "junk")
	if err := os.WriteFile(junk, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	rig := rigOf(t, k)
	const loads = "load\nawait-transition\n"
	kill := func(at string) func(*proof.Trial) {
		return func(*proof.Trial) {
			rig.wrap = func(m lab.Machine) lab.Machine { return killed{m, at, syscall.SIGKILL, rig.scratch} }
		}
	}
	for _, c := range []struct {
		name, text string
		breakIt    func(*proof.Trial)
		why        string
	}{
		{"no disk", loads, func(*proof.Trial) { rig.change = func(s *lab.Spec) { s.Root = junk + "-none" } }, "no such file"},
		{"a disk without a system", loads, func(*proof.Trial) {
			rig.change = func(s *lab.Spec) { s.Root, s.BootTimeout = junk, 25*time.Second }
		}, "wait for the guest agent"},
		{"an image that is none", loads, func(p *proof.Trial) {
			p.Kernel = junk
			rig.change = func(s *lab.Spec) { s.BootTimeout = 10 * time.Second }
		}, "boot"},
		{"an image of another kernel", loads, func(p *proof.Trial) { p.Built.Kernel = "6.1.0-9999-cloud-amd64" }, "it runs \"6.1.0"},
		{"an image of another build", loads, func(p *proof.Trial) { p.Built.BuildID[0]++ }, "it runs build"},
		{"guest killed before the livepatch", loads, kill("insmod"), "emulator ended"},
		{"guest killed under the livepatch", loads + "run true\n", kill("true"), "emulator ended"},
		{"guest switched off", loads + "run poweroff -f\n", nil, "switched off"},
		{"clock that jumps", loads + "run date -s '2030-01-01 00:00:00'\n", nil, "clock jumped"},
		{"clock that jumps under a check that fails", loads + "run date -s '2030-01-01 00:00:00'\nrun false\n", nil, "clock jumped"},
		{"a module that is not there", loads, func(p *proof.Trial) {
			m := *p.Built.Module
			m.Path = junk + "-none"
			p.Built.Module = &m
		}, "no such file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := story.Parse("try.txtar", []byte("# A try.\n"+c.text), player.Grammar())
			if err != nil {
				t.Fatal(err)
			}
			rig.change, rig.wrap = nil, nil
			trial := proof.Trial{Rig: rig, Kernel: k.Tree.Image(), Built: good, Own: []proof.Source{{From: "all", Story: s}}, Only: []string{"all/try"}, Dir: t.TempDir()}
			if c.breakIt != nil {
				c.breakIt(&trial)
			}
			res, err := proof.Run(t.Context(), trial)
			if err != nil {
				t.Fatal(err)
			}
			if got := res.Scenarios[0]; got.Verdict != lab.Broken || !strings.Contains(got.Why, c.why) || res.Verdict != lab.Broken {
				t.Errorf("%s: %s; want broken: %s", got.Verdict, got.Why, c.why)
			} else {
				t.Log(got.Why)
			}
			rig.change, rig.wrap = nil, nil
			if left, err := os.ReadDir(rig.scratch); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}
