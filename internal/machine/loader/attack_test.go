// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/sys/unix"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/klp"
	"klatch/internal/testkit"
	"klatch/internal/testkit/klpfake"
	"klatch/internal/testkit/signed"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
)

// TestAttack is the part of the attack catalog that ends at the loader: K is
// what a livepatch may be, L what happens around it on the machine. Sequence
// 5 is confirmed; each attack has its own code and changes nothing.
func TestAttack(t *testing.T) {
	replace := func(old, by string) func(*making) {
		return func(m *making) {
			m.words = func(words []string) []string {
				return strings.Split(strings.ReplaceAll(strings.Join(words, "\x00"), old, by), "\x00")
			}
		}
	}
	without := func(prefix string) func(*making) {
		return func(m *making) {
			m.words = func(words []string) []string {
				return slices.DeleteFunc(words, func(w string) bool { return strings.HasPrefix(w, prefix) })
			}
		}
	}
	twice := func(word string) func(*making) {
		return func(m *making) { m.words = func(words []string) []string { return append(words, word) } }
	}
	elf := func(spoil func([]byte) []byte) func(*making) {
		return func(m *making) { m.elf = func(w []string) []byte { return spoil(klpfake.Module(w)) } }
	}
	put16 := func(at int, v uint16) func(*making) {
		return elf(func(b []byte) []byte { binary.LittleEndian.PutUint16(b[at:], v); return b })
	}
	noteBy := func(f func(signed.Publisher) []note.Signer) func(*making) { return func(m *making) { m.noteBy = f } }
	neighbor := running
	neighbor.Distro, neighbor.Release, neighbor.ID = "debian-12", "6.1.0-55-cloud-amd64", kernel.BuildID{0xab, 2}
	rebuilt := neighbor
	rebuilt.Release = running.Release
	other := neighbor
	other.ID = running.ID
	arm := running
	arm.Distro, arm.Arch = "debian-12", "arm64"

	for _, tc := range []struct {
		name  string
		n     livepatch.Sequence // 6 unless told
		make  func(*making)
		spoil func(*lp)
		kind  fault.Kind
		code  fault.Code
	}{
		{name: "unsigned module", make: func(m *making) { m.unsigned = true }, code: "module_unsigned"},
		{name: "foreign module key", make: func(m *making) { m.moduleBy = strangers() }, code: "module_key_unknown"},
		{name: "module key of another, our name on it", make: func(m *making) {
			m.moduleBy = signed.Publisher{Private: strangers().Private, Module: ours().Module}
		}, code: "module_signature_bad"},
		{name: "truncated module", spoil: func(p *lp) { p.module = p.module[:len(p.module)-1] }, code: "module_truncated"},
		{name: "empty module", spoil: func(p *lp) { p.module = nil }, code: "module_truncated"},
		{name: "padded module", spoil: func(p *lp) { p.module = append(p.module, 0) }, code: "module_oversize"},
		{name: "endless module", spoil: func(p *lp) { p.module = append(p.module, make([]byte, 8<<20)...) }, code: "module_oversize"},
		{name: "module of another sequence", spoil: func(p *lp) { p.module[64] ^= 0xff }, code: "module_digest"},
		{name: "only SHA-512 differs", make: func(m *making) {
			m.manifest = func(x *livepatch.Manifest) { x.Module.SHA512 = strings.Repeat("0", 128) }
		}, code: "module_digest"},
		{name: "signature twice", make: elf(func(b []byte) []byte {
			out, err := trustsign.Module(b, ours().Module, ours().Private, nil)
			if err != nil {
				t.Fatal(err)
			}
			return out
		}), code: "module_signature_malformed"},

		{name: "manifest by another key", make: func(m *making) { m.by = strangers() }, code: "manifest_untrusted"},
		{name: "manifest by one of two keys", make: noteBy(func(p signed.Publisher) []note.Signer { return p.Signers[:1] }), code: "manifest_threshold"},
		{name: "manifest by ours and a stranger", make: noteBy(func(p signed.Publisher) []note.Signer {
			return []note.Signer{p.Signers[0], strangers().Signers[0]}
		}), code: "manifest_threshold"},
		{name: "manifest signed twice by one key", make: noteBy(func(p signed.Publisher) []note.Signer {
			return []note.Signer{p.Signers[0], p.Signers[0]}
		}), code: "manifest_threshold"},
		{name: "manifest unsigned", spoil: func(p *lp) { p.manifest, _, _ = bytes.Cut(p.manifest, []byte("\n\n")) }, code: "manifest_untrusted"},
		{name: "manifest changed", spoil: func(p *lp) {
			p.manifest = bytes.Replace(p.manifest, []byte(`"sequence": 6`), []byte(`"sequence": 9`), 1)
		}, code: "manifest_untrusted"},
		{name: "manifest empty", spoil: func(p *lp) { p.manifest = nil }, code: "manifest_untrusted"},
		{name: "manifest endless", spoil: func(p *lp) { p.manifest = bytes.Repeat([]byte("x"), livepatch.MaxManifest+9) },
			kind: fault.Invalid, code: "manifest_malformed"},

		{name: "neighbor kernel build", make: func(m *making) { m.build = neighbor }, code: "wrong_build"},
		{name: "same release, other build", make: func(m *making) { m.build = rebuilt }, code: "wrong_build"},
		{name: "same build, other release", make: func(m *making) { m.build = other }, code: "wrong_release"},
		{name: "same build, other architecture", make: func(m *making) { m.build = arm }, kind: fault.Invalid, code: "manifest_malformed"},
		{name: "lower sequence", n: 4, kind: fault.Conflict, code: "sequence_lower"},
		{name: "same sequence", n: 5, kind: fault.Conflict, code: "sequence_same"},

		{name: "not ELF", make: elf(func(b []byte) []byte { return bytes.Repeat([]byte{'x'}, len(b)) }), code: "module_elf"},
		{name: "ELF of 32 bits", make: elf(func(b []byte) []byte { b[4] = 1; return b }), code: "module_elf"},
		{name: "ELF big-endian", make: elf(func(b []byte) []byte { b[5] = 2; return b }), code: "module_elf"},
		{name: "program, not relocatable", make: put16(16, 2), code: "module_elf"},
		{name: "wrong machine", make: put16(18, 183), code: "module_elf"},
		{name: "huge section table", make: put16(60, 0xfeff), code: "module_elf"},
		{name: "no sections", make: put16(60, 0), code: "module_elf"},
		{name: "section names nowhere", make: put16(62, 99), code: "module_elf"},
		{name: "section table beyond the end", make: elf(func(b []byte) []byte {
			binary.LittleEndian.PutUint64(b[40:], 1<<63)
			return b
		}), code: "module_elf"},
		{name: "section beyond the end", make: elf(spoilSection(32, 1<<62)), code: "module_elf"},
		{name: "section wraps around", make: elf(spoilSection(24, 1<<64-8)), code: "module_elf"},
		{name: "sections overlap", make: elf(spoilSection(32, 80)), code: "module_elf"},
		{name: "section over the header", make: elf(spoilSection(24, 8)), code: "module_elf"},
		{name: "two .modinfo", make: func(m *making) {
			m.elf = func(w []string) []byte {
				one := []byte(strings.Join(w, "\x00") + "\x00")
				return klpfake.ELF(klpfake.Section{Name: ".modinfo", Kind: 1, Body: one}, klpfake.Section{Name: ".modinfo", Kind: 1, Body: one})
			}
		}, code: "module_elf"},
		{name: "no .modinfo", make: func(m *making) {
			m.elf = func([]string) []byte { return klpfake.ELF(klpfake.Section{Name: ".text", Kind: 1, Body: []byte{0xc3}}) }
		}, code: "module_policy"},
		{name: "not a livepatch", make: without("livepatch="), code: "module_policy"},
		{name: "livepatch=N", make: replace("livepatch=Y", "livepatch=N"), code: "module_policy"},
		{name: "other name", make: replace("name=klatch_6", "name=klatch_7"), code: "module_policy"},
		{name: "two names", make: twice("name=evil"), code: "module_policy"},
		{name: "other vermagic", make: replace("vermagic=6.1.0-56", "vermagic=6.1.0-55"), code: "module_policy"},
		{name: "longer release", make: replace("cloud-amd64 SMP", "cloud-amd64-evil SMP"), code: "module_policy"},
		{name: "no vermagic", make: without("vermagic="), code: "module_policy"},
		{name: "depends on a module", make: replace("depends=", "depends=evil"), code: "module_policy"},
		{name: "other build id inside", make: replace("klatch_build_id=ab01", "klatch_build_id=ab02"), code: "module_policy"},
		{name: "no build id inside", make: without("klatch_build_id="), code: "module_policy"},
		{name: "other sequence inside", make: replace("klatch_sequence=6", "klatch_sequence=06"), code: "module_policy"},
	} {
		t.Run("K/"+tc.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.confirmed(5)
			n, changes := tc.n, []func(*making){}
			if n == 0 {
				n = 6
			}
			if tc.make != nil {
				changes = append(changes, tc.make)
			}
			p := r.make(n, changes...)
			if tc.spoil != nil {
				tc.spoil(&p)
			}
			kind := tc.kind
			if kind == "" {
				kind = fault.Untrusted
			}
			before := r.snapshot()
			_, err := r.load(p)
			wantCode(t, err, kind, tc.code)
			if after := r.snapshot(); after != before {
				t.Errorf("something changed:\n%s\n%s", before, after)
			}
		})
	}

	t.Run("K/bit flips", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(5)
		before := r.snapshot()
		for name, part := range map[string]func(*lp) []byte{
			"module":   func(p *lp) []byte { return p.module },
			"manifest": func(p *lp) []byte { return p.manifest },
		} {
			size := len(part(new(r.make(6))))
			for i := range 32 {
				p := r.make(6)
				b := part(&p)
				b[i*(size-1)/31] ^= 1 << (i % 8)
				if _, err := r.load(p); fault.KindOf(err) != fault.Untrusted {
					t.Errorf("%s, byte %d: %v", name, i*(size-1)/31, err)
				}
			}
		}
		if after := r.snapshot(); after != before {
			t.Errorf("something changed")
		}
	})
	attackMachine(t)
}

// spoilSection sets a field of the first section's header.
func spoilSection(field int, v uint64) func([]byte) []byte {
	return func(b []byte) []byte {
		table := binary.LittleEndian.Uint64(b[40:])
		binary.LittleEndian.PutUint64(b[int(table)+64+field:], v)
		return b
	}
}

func attackMachine(t *testing.T) {
	t.Run("L/file swapped after verify", func(t *testing.T) {
		r := newRig(t)
		p := r.make(6)
		var taken []byte
		r.kernel.OnLoad = func(module *os.File) {
			r.write("given.ko", bytes.Repeat([]byte("evil"), 1000)) // the file behind the descriptor
			taken, _ = io.ReadAll(io.NewSectionReader(module, 0, 1<<20))
		}
		if _, err := r.load(p); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(taken, p.module) {
			t.Error("the kernel got other bytes than were checked")
		}
		stored, err := os.ReadFile(filepath.Join(r.loader.State, running.ID.String(), "6.ko"))
		if err != nil || sha256.Sum256(stored) != sha256.Sum256(p.module) {
			t.Errorf("the store holds other bytes than were checked: %v", err)
		}
	})
	t.Run("L/memory file that stays writable", func(t *testing.T) {
		r := newRig(t)
		p := r.make(6)
		fd, err := unix.MemfdCreate("attack", 0)
		r.check(err)
		f := os.NewFile(uintptr(fd), "attack")
		defer f.Close()
		_, err = f.Write(p.module)
		r.check(err)
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() { // flips one byte all the time
			defer close(stopped)
			for b := byte(0); ; b++ {
				select {
				case <-stop:
					return
				default:
					_, _ = f.WriteAt([]byte{b}, 70)
				}
			}
		}()
		var taken []byte
		r.kernel.OnLoad = func(module *os.File) { taken, _ = io.ReadAll(io.NewSectionReader(module, 0, 1<<20)) }
		m, err := os.Open(r.write("given.manifest", p.manifest))
		r.check(err)
		defer m.Close()
		for range 50 {
			_, err := r.client.Load(t.Context(), m, f)
			if err == nil {
				break
			}
			wantCode(t, err, fault.Untrusted, "module_digest")
		}
		close(stop)
		<-stopped
		if taken != nil && !bytes.Equal(taken, p.module) {
			t.Error("the kernel got other bytes than were checked")
		}
	})
	t.Run("L/descriptors that are no files", func(t *testing.T) {
		r := newRig(t)
		p := r.make(6)
		good := r.write("good.ko", p.module)
		manifest, err := os.Open(r.write("given.manifest", p.manifest))
		r.check(err)
		defer manifest.Close()
		link, fifo := filepath.Join(r.dir, "link"), filepath.Join(r.dir, "fifo")
		r.check(os.Symlink(good, link))
		r.check(unix.Mkfifo(fifo, 0o600))
		before := r.snapshot()
		for name, open := range map[string]func() (*os.File, error){
			"FIFO":          func() (*os.File, error) { return os.OpenFile(fifo, os.O_RDWR, 0) },
			"symbolic link": func() (*os.File, error) { return os.OpenFile(link, unix.O_PATH|unix.O_NOFOLLOW, 0) },
			"path only":     func() (*os.File, error) { return os.OpenFile(good, unix.O_PATH, 0) },
			"folder":        func() (*os.File, error) { return os.Open(r.dir) },
			"device":        func() (*os.File, error) { return os.Open("/dev/zero") },
			"write only":    func() (*os.File, error) { return os.OpenFile(good, os.O_WRONLY, 0) },
		} {
			f, err := open()
			r.check(err)
			_, err = r.client.Load(t.Context(), manifest, f)
			t.Log(name)
			wantCode(t, err, fault.Invalid, "bad_descriptor")
			_, err = r.client.Load(t.Context(), f, f)
			wantCode(t, err, fault.Invalid, "bad_descriptor")
			r.check(f.Close())
		}
		if after := r.snapshot(); after != before {
			t.Error("something changed")
		}
	})
	t.Run("L/wrong peer", func(t *testing.T) {
		testkit.Need(t, "root")
		r := newRig(t)
		err := asUID(65534, func() error {
			_, err := r.client.Status(t.Context())
			return err
		})
		wantCode(t, err, fault.Denied, "not_allowed")
		r = newRig(t, func(r *rig) { r.loader.Daemon = 65534 })
		before := r.snapshot()
		err = asUID(65534, func() error {
			_, err := r.client.Disable(t.Context())
			return err
		})
		wantCode(t, err, fault.Denied, "not_root")
		if after := r.snapshot(); after != before {
			t.Error("something changed")
		}
	})
	t.Run("L/foreign livepatch", func(t *testing.T) {
		r := newRig(t)
		r.check(r.kernel.Change(func(s *klpfake.State) { s.Now.Livepatches = foreign("kpatch_other") }))
		before := r.snapshot()
		st, err := r.load(r.make(6))
		wantCode(t, err, fault.Conflict, "foreign_livepatch")
		if !slices.Equal(st.Foreign, []string{"kpatch_other"}) || r.snapshot() != before {
			t.Errorf("status: %+v", st)
		}
	})
	t.Run("L/a name that looks like ours", func(t *testing.T) {
		for _, name := range []string{"klatch_", "klatch_0", "klatch_06", "klatch_6x", "klatch_99999999999"} {
			r := newRig(t)
			r.check(r.kernel.Change(func(s *klpfake.State) { s.Now.Livepatches = foreign(name) }))
			_, err := r.load(r.make(7))
			wantCode(t, err, fault.Conflict, "foreign_livepatch")
		}
	})
	t.Run("L/transition runs", func(t *testing.T) {
		r := newRig(t)
		r.check(r.kernel.Change(func(s *klpfake.State) { s.Hold = true }))
		if _, err := r.load(r.make(6)); err != nil {
			t.Fatal(err)
		}
		before := r.snapshot()
		_, err := r.load(r.make(7))
		wantCode(t, err, fault.Conflict, "transition_running")
		_, err = r.load(r.make(6))
		wantCode(t, err, fault.Conflict, "sequence_same")
		_, err = r.client.Confirm(t.Context(), 6)
		wantCode(t, err, fault.Conflict, "not_done")
		if r.snapshot() != before {
			t.Error("something changed")
		}
	})
	t.Run("L/confirm what the loader did not load", func(t *testing.T) {
		r := newRig(t)
		r.check(r.kernel.Change(func(s *klpfake.State) { s.Now.Livepatches = foreign("klatch_9") }))
		_, err := r.client.Confirm(t.Context(), 9)
		wantCode(t, err, fault.Conflict, "no_attempt")
		_, err = r.client.Confirm(t.Context(), 8)
		wantCode(t, err, fault.NotFound, "not_loaded")
		if st := r.status(); st.Highest != 0 {
			t.Errorf("highest is %d", st.Highest)
		}
	})
	t.Run("L/anchor", func(t *testing.T) {
		good := ours().Anchor()
		lab, alone := good, good
		lab.Profile, lab.Manifest.Threshold = trust.Lab, 1
		alone.Manifest.Threshold = 1
		for want, a := range map[fault.Code]*trust.Anchor{"lab_keys": &lab, "anchor_malformed": &alone, "no_anchor": nil} {
			r := newRig(t)
			r.check(os.Remove(filepath.Join(r.dir, "etc/trust.json")))
			if a != nil {
				r.anchor(*a)
			}
			before := r.snapshot()
			_, err := r.load(r.make(6))
			wantCode(t, err, fault.Untrusted, want)
			if r.snapshot() != before {
				t.Error("something changed")
			}
			if want == "lab_keys" { // the owner of the machine may allow them
				r.write("etc/allow-lab-keys", nil)
				if _, err := r.load(r.make(6)); err != nil {
					t.Errorf("with allow-lab-keys: %v", err)
				}
			}
		}
	})
	t.Run("L/symbolic link in the store", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(6)
		path := filepath.Join(r.loader.State, running.ID.String(), "6.ko")
		r.check(os.Rename(path, filepath.Join(r.dir, "elsewhere")))
		r.check(os.Symlink(filepath.Join(r.dir, "elsewhere"), path))
		outcome, err := r.reboot()
		if outcome != "failed" {
			t.Errorf("outcome %s", outcome)
		}
		wantCode(t, err, fault.Internal, "store_missing")
	})
	t.Run("L/FIFO in the store", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(6)
		path := filepath.Join(r.loader.State, running.ID.String(), "6.ko")
		r.check(os.Remove(path))
		r.check(unix.Mkfifo(path, 0o600))
		outcome, err := r.reboot() // and does not hang
		if outcome != "failed" {
			t.Errorf("outcome %s", outcome)
		}
		wantCode(t, err, fault.Invalid, "bad_descriptor")
	})
	t.Run("L/two loaders", func(t *testing.T) {
		r := newRig(t)
		r.kernel.OnLoad = func(*os.File) {
			second := *r.loader
			_, err := second.Boot()
			wantCode(t, err, fault.Conflict, "locked")
		}
		if _, err := r.load(r.make(6)); err != nil {
			t.Error(err)
		}
	})
}

func foreign(name string) []klp.Livepatch {
	return []klp.Livepatch{{Name: name, Enabled: true, Patched: true}}
}

// asUID runs f on a thread of its own with another effective uid; the thread
// ends with the goroutine. Only this thread changes, so the raw call is right.
// The client must connect from it: its own goroutine does, because a Unix
// socket's connect does not wait.
func asUID(uid int, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		same := ^uintptr(0)
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, same, uintptr(uid), same); errno != 0 {
			done <- fmt.Errorf("become uid %d: %w", uid, errno)
			return
		}
		done <- f()
	}()
	return <-done
}
