// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/klp"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/testkit/klpfake"
)

// Each of these holds a check that no other test missed when it was taken out
// (docs/explanation/mutation-check.md).

func TestOnlySHA256Differs(t *testing.T) {
	r := newRig(t)
	_, err := r.load(r.make(6, func(m *making) {
		m.manifest = func(x *livepatch.Manifest) { x.Module.SHA256 = strings.Repeat("0", 64) }
	}))
	wantCode(t, err, fault.Untrusted, "module_digest")
}

// What the daemon says is done is looked at, each part of it.
func TestAttackConfirm(t *testing.T) {
	for name, spoil := range map[string]func(*klp.Livepatch){
		"not enabled":         func(p *klp.Livepatch) { p.Enabled = false },
		"in transition":       func(p *klp.Livepatch) { p.Transition = true },
		"an object untouched": func(p *klp.Livepatch) { p.Patched = false },
	} {
		t.Run("Attack/L/confirm what is "+name, func(t *testing.T) {
			r := newRig(t)
			r.run(3)
			r.check(r.kernel.Change(func(s *klpfake.State) { spoil(&s.Now.Livepatches[0]); s.Hold, s.Left = true, 99 }))
			_, err := r.client.Confirm(t.Context(), 3)
			wantCode(t, err, fault.Conflict, "not_done")
			if st := r.status(); st.Highest != 0 {
				t.Errorf("%s: highest %d", name, st.Highest)
			}
		})
	}
}

// Whoever gets at the store (a restored backup, a mix-up of disks) can put
// another livepatch there that is signed as well.
func TestBootVerifiesWhatTheStoreHolds(t *testing.T) {
	neighbor := running
	neighbor.Distro, neighbor.Release, neighbor.ID = "debian-12", "6.1.0-55-cloud-amd64", kernel.BuildID{0xab, 2}
	for name, c := range map[string]struct {
		put  func(r *rig) lp
		code fault.Code
	}{
		"an older sequence": {func(r *rig) lp { return r.make(4) }, "store_mixed"},
		"of the neighbor kernel": {func(r *rig) lp {
			return r.make(5, func(m *making) { m.build = neighbor })
		}, "wrong_build"},
	} {
		r := newRig(t)
		r.confirmed(5)
		p := c.put(r)
		dir := filepath.Join(r.loader.State, running.ID.String())
		r.check(os.WriteFile(filepath.Join(dir, "5.manifest"), p.manifest, 0o600))
		r.check(os.WriteFile(filepath.Join(dir, "5.ko"), p.module, 0o600))
		outcome, err := r.reboot()
		if outcome != "failed" {
			t.Errorf("%s: outcome %s", name, outcome)
		}
		wantCode(t, err, fault.Untrusted, c.code)
	}
}

func TestSwitchesStopBoot(t *testing.T) {
	r := newRig(t)
	r.confirmed(1)
	r.check(r.kernel.Change(func(s *klpfake.State) { s.Now.CommandLine = []string{"xklatch=off", "klatch=offx"} }))
	if outcome, err := r.reboot(); outcome != "loaded" || err != nil {
		t.Errorf("words that only look like the switch: %s, %v", outcome, err)
	}
}

// A request may not keep root busy for ever: whoever asks can hand over files
// of a file system that never answers.
func TestOverdueRequestEndsTheLoader(t *testing.T) {
	ended := make(chan struct{})
	r := newRig(t, func(r *rig) {
		r.loader.Limit, r.loader.Overdue = 50*time.Millisecond, func() { close(ended) }
		r.kernel.OnLoad = func(*os.File) { <-ended }
	})
	if _, err := r.load(r.make(1)); err != nil {
		t.Error(err)
	}
	select {
	case <-ended:
	default:
		t.Error("nothing ended it")
	}
}

// Who connects and says nothing is not waited for.
func TestSilentCallerIsDropped(t *testing.T) {
	if testing.Short() {
		t.Skip("takes the limit of loaderapi")
	}
	r := newRig(t)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	r.check(err)
	defer unix.Close(fd)
	r.check(unix.Connect(fd, &unix.SockaddrUnix{Name: r.socket}))
	start := time.Now()
	r.status()
	if took := time.Since(start); took > loaderapi.TalkLimit+2*time.Second {
		t.Errorf("the next caller waited %s", took)
	}
}

// Each way in which the numbers of an ELF file may lie, one that wraps around
// among them.
func TestELFNumbersThatLie(t *testing.T) {
	le := binary.LittleEndian
	lastSection := func(b []byte) []byte { // header of the last section that is not the names
		at := le.Uint64(b[40:]) + 64*uint64(le.Uint16(b[60:])-1)
		if le.Uint16(b[62:]) == le.Uint16(b[60:])-1 {
			at -= 64
		}
		return b[at:]
	}
	for name, spoil := range map[string]func([]byte){
		"size of its own header":      func(b []byte) { le.PutUint16(b[52:], 60) },
		"size of a section header":    func(b []byte) { le.PutUint16(b[58:], 128) },
		"a section that wraps around": func(b []byte) { s := lastSection(b); le.PutUint64(s[32:], 1-le.Uint64(s[24:])) },
		"a section that is too long":  func(b []byte) { s := lastSection(b); le.PutUint64(s[32:], 1<<40) },
		"names that wrap around": func(b []byte) {
			s := b[le.Uint64(b[40:])+64*uint64(le.Uint16(b[62:])):]
			le.PutUint64(s[32:], 1-le.Uint64(s[24:]))
		},
		"a section that begins beyond": func(b []byte) { s := lastSection(b); le.PutUint64(s[24:], 1<<40) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			_, err := r.load(r.make(6, func(m *making) {
				m.elf = func(w []string) []byte { b := klpfake.Module(w); spoil(b); return b }
			}))
			wantCode(t, err, fault.Untrusted, "module_elf")
		})
	}
	r := newRig(t)
	_, err := r.load(r.make(6, func(m *making) {
		m.words = func(w []string) []string { return append(w, "x="+strings.Repeat("y", 64<<10)) }
	}))
	wantCode(t, err, fault.Untrusted, "module_elf")
}
