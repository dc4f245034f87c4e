// SPDX-License-Identifier: Apache-2.0

// Package klptest is the contract of loader.Kernel as a test suite. The fake
// kernel runs it in go test, the real one in a guest (build tag vm).
package klptest

import (
	"bytes"
	"os"
	"slices"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/machine/klp"
	"klatch/internal/machine/loader"
)

// Fixture is a kernel without any livepatch, and two modules for it, klatch_1
// and klatch_2; the second replaces the first.
type Fixture struct {
	Kernel        loader.Kernel
	First, Second []byte
	Patience      time.Duration // for one transition
}

// Run runs the suite. The kernel is empty again afterwards.
func Run(t *testing.T, f Fixture) {
	k := f.Kernel
	now, err := k.Look()
	if err != nil {
		t.Fatal(err)
	}
	if now.Build.ID.IsZero() || now.Build.Release == "" || now.Build.Arch == "" || now.BootID == "" || len(now.Livepatches) > 0 {
		t.Fatalf("the kernel is not a known one without livepatches: %+v", now)
	}

	t.Run("a damaged module is refused and leaves nothing", func(t *testing.T) {
		for _, b := range [][]byte{nil, bytes.Repeat([]byte("x"), 4096), f.First[:len(f.First)/2]} {
			if err := k.Load(sealed(t, b)); fault.CodeOf(err) == "" {
				t.Errorf("load %d bytes: %v, want a refusal with a code", len(b), err)
			}
		}
		if now := look(t, k); len(now.Livepatches) > 0 || slices.Contains(now.Modules, "klatch_1") {
			t.Errorf("left in the kernel: %+v", now)
		}
	})
	t.Run("a livepatch comes in", func(t *testing.T) {
		if err := k.Load(sealed(t, f.First)); err != nil {
			t.Fatal(err)
		}
		if p := find(look(t, k), "klatch_1"); p == nil || !p.Enabled {
			t.Fatalf("right after the load: %+v", p)
		}
		f.wait(t, "klatch_1 is done", func(s klp.State) bool { return done(s, "klatch_1") })
	})
	t.Run("the same again is refused", func(t *testing.T) {
		if err := k.Load(sealed(t, f.First)); fault.CodeOf(err) != "kernel_exists" {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a module in use stays", func(t *testing.T) {
		if err := k.Remove("klatch_1"); err != nil {
			t.Error(err)
		}
		if now := look(t, k); !done(now, "klatch_1") || !slices.Contains(now.Modules, "klatch_1") {
			t.Errorf("after remove: %+v", now)
		}
	})
	t.Run("a newer one replaces it", func(t *testing.T) {
		if err := k.Load(sealed(t, f.Second)); err != nil {
			t.Fatal(err)
		}
		f.wait(t, "klatch_2 is done and klatch_1 gone", func(s klp.State) bool {
			return done(s, "klatch_2") && find(s, "klatch_1") == nil
		})
		if !slices.Contains(look(t, k).Modules, "klatch_1") {
			t.Error("the replaced module went by itself")
		}
		f.wait(t, "klatch_1 can be removed", func(s klp.State) bool {
			return k.Remove("klatch_1") == nil && !slices.Contains(s.Modules, "klatch_1")
		})
		if err := k.Remove("klatch_1"); err != nil {
			t.Errorf("remove again: %v", err)
		}
	})
	t.Run("nothing blocks without a transition", func(t *testing.T) {
		if b, err := k.Blockers(); err != nil || len(b) > 0 {
			t.Errorf("got %v, %v", b, err)
		}
	})
	t.Run("who traces can be looked for", func(t *testing.T) {
		if _, err := k.Tracers(); err != nil {
			t.Error(err)
		}
	})
	t.Run("it goes out again", func(t *testing.T) {
		for range 2 { // a repetition is no error
			if err := k.Disable("klatch_2"); err != nil {
				t.Fatal(err)
			}
		}
		f.wait(t, "klatch_2 is gone", func(s klp.State) bool { return len(s.Livepatches) == 0 })
		if err := k.Disable("klatch_2"); err != nil {
			t.Errorf("disable what is gone: %v", err)
		}
		f.wait(t, "klatch_2 can be removed", func(s klp.State) bool {
			return k.Remove("klatch_2") == nil && !slices.Contains(s.Modules, "klatch_2")
		})
	})
}

func (f Fixture) wait(t *testing.T, what string, ok func(klp.State) bool) {
	t.Helper()
	for until := time.Now().Add(f.Patience); !ok(look(t, f.Kernel)); <-time.After(50 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("not within %v: %s", f.Patience, what)
		}
	}
}

func look(t *testing.T, k loader.Kernel) klp.State {
	t.Helper()
	s, err := k.Look()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func find(s klp.State, name string) *klp.Livepatch {
	for i := range s.Livepatches {
		if s.Livepatches[i].Name == name {
			return &s.Livepatches[i]
		}
	}
	return nil
}

func done(s klp.State, name string) bool {
	p := find(s, name)
	return p != nil && p.Enabled && !p.Transition && p.Patched
}

func sealed(t *testing.T, b []byte) *os.File {
	t.Helper()
	path := t.TempDir() + "/module"
	if err := os.WriteFile(path, b, 0o600); err != nil { //nolint:forbidigo // test
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	s, err := klp.Seal(f, int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s.File
}
