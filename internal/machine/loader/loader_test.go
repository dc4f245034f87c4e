// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/testkit/klpfake"
)

func TestJourney(t *testing.T) {
	r := newRig(t)
	st := r.status()
	if st.Kernel != running || st.Loaded != nil || st.Highest != 0 || st.Attempt != nil || st.Boot.Outcome != "not_run" {
		t.Fatalf("before anything: %+v", st)
	}
	st, err := r.load(r.make(3))
	r.check(err)
	if l := st.Loaded; l == nil || l.Sequence != 3 || !l.Transition || len(l.Fixes) != 1 || st.Attempt == nil || st.Highest != 0 {
		t.Fatalf("after the load: %+v", st)
	}
	_, err = r.client.Confirm(t.Context(), 3)
	wantCode(t, err, fault.Conflict, "not_done")
	r.settle(3)
	for range 2 { // a repetition is no error
		if st, err = r.client.Confirm(t.Context(), 3); err != nil || st.Highest != 3 || st.Attempt != nil {
			t.Fatalf("confirm: %v, %+v", err, st)
		}
	}
	r.confirmed(7)
	k, err := r.kernel.Read()
	r.check(err)
	if len(k.Now.Livepatches) != 1 || !slices.Equal(k.Now.Modules, []string{"klatch_7"}) {
		t.Errorf("the superseded module is still in: %+v", k.Now)
	}
	if got := r.stored(); !slices.Equal(got, []string{"7.ko", "7.manifest"}) {
		t.Errorf("store holds %q", got)
	}
}

func (r *rig) stored() []string {
	r.t.Helper()
	names, err := filepath.Glob(filepath.Join(r.loader.State, running.ID.String(), "*"))
	r.check(err)
	for i := range names {
		names[i] = filepath.Base(names[i])
	}
	return names
}

func TestAttackCancel(t *testing.T) { t.Run("Attack/L/stuck transition", cancelStuck) }

func cancelStuck(t *testing.T) {
	r := newRig(t)
	r.confirmed(1)
	r.check(r.kernel.Change(func(s *klpfake.State) {
		s.Hold = true
		s.Blockers = []loaderapi.Blocker{{PID: 7, TID: 8, Stat: "8 (sleeper) D", Stack: []string{"schedule+0x1"}}}
	}))
	if _, err := r.load(r.make(2)); err != nil {
		t.Fatal(err)
	}
	b, err := r.client.Blockers(t.Context())
	if err != nil || len(b) != 1 || b[0].Stat != "8 (sleeper) D" || b[0].Stack[0] != "schedule+0x1" {
		t.Errorf("blockers: %+v, %v", b, err)
	}
	r.check(r.kernel.Change(func(s *klpfake.State) { s.Tracers = "-  k  f+0x0    [FTRACE]\n" }))
	if text, err := r.client.Tracers(t.Context()); err != nil || text != "-  k  f+0x0    [FTRACE]\n" {
		t.Errorf("tracers: %q, %v", text, err)
	}
	_, err = r.client.Cancel(t.Context(), 9)
	wantCode(t, err, fault.NotFound, "not_loaded")
	st, err := r.client.Cancel(t.Context(), 2)
	if err != nil || st.Loaded == nil || st.Loaded.Sequence != 1 || st.Attempt != nil || st.Highest != 1 {
		t.Fatalf("cancel: %v, %+v", err, st)
	}
	if got := r.stored(); !slices.Equal(got, []string{"1.ko", "1.manifest"}) {
		t.Errorf("store holds %q", got)
	}
	_, err = r.client.Cancel(t.Context(), 1)
	wantCode(t, err, fault.Conflict, "not_running")
	r.check(r.kernel.Change(func(s *klpfake.State) { s.Hold = false }))
	r.confirmed(2) // a canceled one may be tried again
}

func TestDisable(t *testing.T) {
	r := newRig(t)
	if os.Getuid() != 0 {
		_, err := r.client.Disable(t.Context())
		wantCode(t, err, fault.Denied, "not_root")
		return
	}
	r.confirmed(1)
	st, err := r.client.Disable(t.Context())
	if err != nil || st.Loaded != nil || !st.Disabled || st.Highest != 1 {
		t.Fatalf("disable: %v, %+v", err, st)
	}
	_, err = r.load(r.make(2))
	wantCode(t, err, fault.Denied, "off_disabled")
	if outcome, err := r.loader.Boot(); outcome != "off_disabled" || err != nil {
		t.Errorf("the boot path in the same boot: %s, %v", outcome, err)
	}
	if outcome, err := r.reboot(); outcome != "loaded" || err != nil {
		t.Errorf("after a reboot: %s, %v", outcome, err)
	}
	if st := r.status(); st.Disabled || st.Loaded == nil {
		t.Errorf("after a reboot: %+v", st)
	}
}

func TestBoot(t *testing.T) {
	t.Run("nothing stored", func(t *testing.T) {
		r := newRig(t)
		if outcome, err := r.reboot(); outcome != "nothing_stored" || err != nil {
			t.Errorf("got %s, %v", outcome, err)
		}
	})
	t.Run("the confirmed one comes back, twice is once", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(5)
		for range 2 {
			r.boots-- // the second turn is the same boot
			if outcome, err := r.reboot(); outcome != "loaded" || err != nil {
				t.Fatalf("got %s, %v", outcome, err)
			}
			if outcome, err := r.loader.Boot(); outcome != "loaded" || err != nil {
				t.Fatalf("again: %s, %v", outcome, err)
			}
			r.boots++
		}
		st := r.status()
		if st.Boot.Outcome != "loaded" || st.Attempt == nil || !st.Attempt.AtBoot || st.Loaded.Sequence != 5 {
			t.Errorf("status: %+v", st)
		}
		k, err := r.kernel.Read()
		r.check(err)
		if k.Loads != 3 {
			t.Errorf("the kernel took %d modules, want 3", k.Loads)
		}
	})
	t.Run("an unconfirmed one does not come back", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(1)
		r.run(2)
		if outcome, err := r.reboot(); outcome != "loaded" || err != nil {
			t.Fatalf("got %s, %v", outcome, err)
		}
		if st := r.status(); st.Loaded.Sequence != 1 {
			t.Errorf("sequence %d came back", st.Loaded.Sequence)
		}
		if got := r.stored(); !slices.Equal(got, []string{"1.ko", "1.manifest"}) {
			t.Errorf("store holds %q", got)
		}
	})
	t.Run("another kernel", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(1)
		r.check(r.kernel.Change(func(s *klpfake.State) { s.Now.Build.ID = kernel.BuildID{9} }))
		if outcome, err := r.reboot(); outcome != "wrong_build" || err != nil {
			t.Errorf("got %s, %v", outcome, err)
		}
		r.check(r.kernel.Change(func(s *klpfake.State) { s.Now.Build.ID = running.ID }))
		if outcome, err := r.reboot(); outcome != "loaded" || err != nil {
			t.Errorf("back on the first kernel: %s, %v", outcome, err)
		}
	})
	t.Run("switches, in their order", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(1)
		r.write("etc/off", nil)
		r.check(r.kernel.Change(func(s *klpfake.State) { s.Now.CommandLine = []string{"quiet", "klatch=off"} }))
		if outcome, err := r.reboot(); outcome != "off_parameter" || err != nil {
			t.Errorf("got %s, %v", outcome, err)
		}
		r.check(r.kernel.Change(func(s *klpfake.State) { s.Now.CommandLine = nil }))
		if outcome, err := r.reboot(); outcome != "off_flag" || err != nil {
			t.Errorf("got %s, %v", outcome, err)
		}
		if st := r.status(); !slices.Equal(st.Boot.Stops, []string{"flag"}) || st.Loaded != nil {
			t.Errorf("status: %+v", st)
		}
		_, err := r.load(r.make(2))
		wantCode(t, err, fault.Denied, "off_flag")
		r.check(os.Remove(filepath.Join(r.dir, "etc/off")))
		if outcome, err := r.reboot(); outcome != "loaded" || err != nil {
			t.Errorf("got %s, %v", outcome, err)
		}
	})
	t.Run("a store that was tampered with", func(t *testing.T) {
		for name, want := range map[string]fault.Code{"1.ko": "module_digest", "1.manifest": "manifest_untrusted"} {
			r := newRig(t)
			r.confirmed(1)
			path := filepath.Join(r.loader.State, running.ID.String(), name)
			b, err := os.ReadFile(path)
			r.check(err)
			b[100] ^= 1
			r.check(os.WriteFile(path, b, 0o600))
			outcome, err := r.reboot()
			if outcome != "failed" {
				t.Errorf("%s: outcome %s", name, outcome)
			}
			wantCode(t, err, fault.Untrusted, want)
			if st := r.status(); st.Boot.Code != want || st.Loaded != nil || st.Highest != 1 {
				t.Errorf("%s: status %+v", name, st)
			}
		}
	})
	t.Run("a store that is empty", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(1)
		r.check(os.RemoveAll(filepath.Join(r.loader.State, running.ID.String())))
		outcome, err := r.reboot()
		if outcome != "failed" {
			t.Errorf("outcome %s", outcome)
		}
		wantCode(t, err, fault.Internal, "store_missing")
	})
}

func TestBreaker(t *testing.T) {
	trip := func(t *testing.T) *rig {
		r := newRig(t)
		r.confirmed(4)
		for range 2 { // nobody confirms, the machine dies
			if outcome, err := r.reboot(); outcome != "loaded" || err != nil {
				t.Fatalf("got %s, %v", outcome, err)
			}
		}
		for range 2 { // and it stays off
			if outcome, err := r.reboot(); outcome != "off_breaker" || err != nil {
				t.Fatalf("got %s, %v", outcome, err)
			}
		}
		if st := r.status(); !slices.Equal(st.Boot.Stops, []string{"breaker"}) || st.Loaded != nil || st.Highest != 4 {
			t.Errorf("status: %+v", st)
		}
		return r
	}
	t.Run("cleared by root", func(t *testing.T) {
		r := trip(t)
		r.check(r.loader.ClearBreaker())
		if outcome, err := r.reboot(); outcome != "loaded" || err != nil {
			t.Errorf("got %s, %v", outcome, err)
		}
	})
	t.Run("cleared by a newer one", func(t *testing.T) {
		r := trip(t)
		r.confirmed(5)
		if outcome, err := r.reboot(); outcome != "loaded" || err != nil {
			t.Errorf("got %s, %v", outcome, err)
		}
		if st := r.status(); st.Loaded.Sequence != 5 || len(st.Boot.Stops) != 0 {
			t.Errorf("status: %+v", st)
		}
	})
	t.Run("one death is forgiven by a confirmation", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(4)
		for range 4 {
			for range 2 {
				if outcome, err := r.reboot(); outcome != "loaded" || err != nil {
					t.Fatalf("got %s, %v", outcome, err)
				}
			}
			r.settle(4)
			if _, err := r.client.Confirm(t.Context(), 4); err != nil {
				t.Fatal(err)
			}
		}
	})
	t.Run("a first load that kills twice is refused", func(t *testing.T) {
		r := newRig(t)
		for range 2 {
			r.run(6)
			if outcome, err := r.reboot(); outcome != "nothing_stored" || err != nil {
				t.Fatalf("got %s, %v", outcome, err)
			}
		}
		_, err := r.load(r.make(6))
		wantCode(t, err, fault.Conflict, "sequence_failed")
		r.confirmed(7)
	})
}

func TestAttackKernelRefuses(t *testing.T) { t.Run("Attack/L/finit_module refused", kernelRefuses) }

func kernelRefuses(t *testing.T) {
	for errno, want := range map[unix.Errno]fault.Code{
		unix.EKEYREJECTED: "kernel_key_rejected", unix.EPERM: "kernel_lockdown", unix.ENOEXEC: "kernel_format",
		unix.EINVAL: "kernel_refused", unix.ENOENT: "kernel_symbol", unix.ENOMEM: "kernel_memory", unix.EIO: "kernel_error",
		unix.EBUSY: "kernel_busy", unix.EEXIST: "kernel_exists",
	} {
		t.Run(fmt.Sprintf("error %d", errno), func(t *testing.T) {
			r := newRig(t)
			r.confirmed(1)
			before := r.snapshot()
			r.check(r.kernel.Change(func(s *klpfake.State) { s.Refuse = errno }))
			_, err := r.load(r.make(2))
			if fault.CodeOf(err) != want || fault.HintOf(err) == "" {
				t.Errorf("errno %d: %v, code %q, want %q and a hint", errno, err, fault.CodeOf(err), want)
			}
			r.check(r.kernel.Change(func(s *klpfake.State) { s.Refuse = 0 }))
			if after := r.snapshot(); after != before {
				t.Errorf("errno %d changed something:\n%s\n%s", errno, before, after)
			}
			r.confirmed(2)
		})
	}
}

func TestAttackJournal(t *testing.T) {
	t.Run("Attack/L/state file corrupt", func(t *testing.T) {
		for _, text := range []string{"", "{", `{"version":2,"builds":{}}`, `{"version":1}`, `{"version":1,"builds":{},"more":1}`,
			`{"version":1,"builds":{"ab01000000000000000000000000000000000000":null}}`} {
			r := newRig(t)
			r.confirmed(1)
			path := r.write("state/journal.json", []byte(text))
			_, err := r.load(r.make(2))
			wantCode(t, err, fault.Internal, "journal_malformed")
			if _, err := r.reboot(); fault.CodeOf(err) != "journal_malformed" {
				t.Errorf("boot: %v", err)
			}
			if b, err := os.ReadFile(path); err != nil || string(b) != text {
				t.Errorf("the journal was touched: %q", b)
			}
		}
	})
	t.Run("Attack/L/state file deleted: what the kernel has still counts", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(5)
		r.check(os.Remove(filepath.Join(r.loader.State, "journal.json")))
		_, err := r.load(r.make(4))
		wantCode(t, err, fault.Conflict, "sequence_lower")
	})
	t.Run("Attack/L/state file older: what the kernel has still counts", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(3)
		path := filepath.Join(r.loader.State, "journal.json")
		old, err := os.ReadFile(path)
		r.check(err)
		r.confirmed(5)
		r.check(os.WriteFile(path, old, 0o600))
		for _, n := range []livepatch.Sequence{4, 5} {
			if _, err := r.load(r.make(n)); fault.KindOf(err) != fault.Conflict {
				t.Errorf("sequence %d: %v", n, err)
			}
		}
		if st := r.status(); st.Loaded == nil || st.Loaded.Sequence != 5 {
			t.Errorf("status %+v", st)
		}
	})
	t.Run("form", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(1)
		r.run(2)
		got, err := os.ReadFile(filepath.Join(r.loader.State, "journal.json"))
		r.check(err)
		want, err := os.ReadFile("testdata/journal.json")
		r.check(err)
		if strings.TrimSpace(string(got)) != strings.TrimSpace(string(want)) {
			t.Errorf("the journal's form changed; it outlives a release:\n%s", got)
		}
	})
}
