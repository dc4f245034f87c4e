// SPDX-License-Identifier: Apache-2.0

//go:build vm

package debian_test

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/debian"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/testkit"
)

// cacheEnv names another folder for the image.
const cacheEnv = "KLATCH_LAB_CACHE"

func TestDebianGuest(t *testing.T) {
	testkit.Need(t, "root", "qemu", "debootstrap", "apt", "kerneldeb")
	cache := os.Getenv(cacheEnv)
	if cache == "" { // the demo's, so that one build serves both
		cache = filepath.Join(testkit.Cache(), "images")
	}
	cfg := debian.Config{Suite: "bookworm", KernelDeb: testkit.KernelDeb(), Cache: cache,
		Progress: func(s debian.Step) {
			if s.Done {
				t.Logf("%-12s %6.1fs  %s", s.Name, s.Took.Seconds(), s.What)
			}
		}}
	began := time.Now()
	img, err := debian.Build(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("image after %v, cached %v: %+v", time.Since(began).Round(time.Millisecond), img.Cached, img)
	again, err := debian.Build(t.Context(), cfg)
	if err != nil || !again.Cached || again.Root != img.Root {
		t.Fatalf("second build: %+v, %v", again, err)
	}

	rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t), Scratch: t.TempDir(), Accelerator: "tcg",
		Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Run("boots to multi-user without failed units", func(t *testing.T) { testSystemd(t, rig, img) })
	t.Run("reaches the host, and not when isolated", func(t *testing.T) { testNetwork(t, rig, img) })
	t.Run("conformance", func(t *testing.T) { labtest.Run(t, rig, img.Spec("conformance")) })
}

func testSystemd(t *testing.T, rig lab.Rig, img debian.Image) {
	began := time.Now()
	m := boot(t, rig, img.Spec("systemd"))
	t.Logf("agent answers after %v", time.Since(began).Round(time.Millisecond))
	state := run(t, m, "systemctl", "is-system-running", "--wait")
	t.Logf("system is %s after %v", strings.TrimSpace(state), time.Since(began).Round(time.Millisecond))
	t.Logf("%s", run(t, m, "systemd-analyze", "time"))
	t.Logf("%s", run(t, m, "sh", "-c", "systemd-analyze blame --no-pager | head -25"))
	if strings.TrimSpace(state) != "running" {
		t.Errorf("state %q: %s", state, run(t, m, "systemctl", "--failed", "--no-pager", "--plain"))
	}
	if got := strings.TrimSpace(run(t, m, "uname", "-r")); got != img.Release {
		t.Errorf("guest runs %s, want %s", got, img.Release)
	}
	if id := strings.TrimSpace(run(t, m, "cat", "/etc/machine-id")); len(id) != 32 {
		t.Errorf("machine id %q", id)
	}
}

func boot(t *testing.T, rig lab.Rig, s lab.Spec) lab.Machine {
	t.Helper()
	m, err := rig.Boot(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func run(t *testing.T, m lab.Machine, argv ...string) string {
	t.Helper()
	res, err := m.Run(t.Context(), lab.Command{Argv: argv})
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Stderr) > 0 {
		t.Logf("%v: exit status %d: %s", argv, res.Exit, res.Stderr)
	}
	return string(res.Stdout)
}
