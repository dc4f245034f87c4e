// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/testkit"
)

// TestAttackDisk: what lies on the machine's disk is not what was written
// there, or cannot be written at all.
func TestAttackDisk(t *testing.T) {
	t.Run("Attack/L/hard link to the file that is handed over", func(t *testing.T) {
		r := newRig(t)
		p := r.make(6)
		given, other := r.write("given.ko", p.module), filepath.Join(r.dir, "other-name.ko")
		r.check(os.Link(given, other))
		var taken []byte
		r.kernel.OnLoad = func(module *os.File) {
			b, err := os.ReadFile(other)
			r.check(err)
			b[len(b)/2] ^= 1
			r.check(os.WriteFile(other, b, 0o600)) // the same file under its other name
			taken, err = os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", module.Fd()))
			r.check(err)
		}
		if _, err := r.loadFiles(r.write("given.manifest", p.manifest), given); err != nil {
			t.Fatal(err)
		}
		if string(taken) != string(p.module) {
			t.Error("the kernel got other bytes than were checked")
		}
	})
	t.Run("Attack/L/hard link into the store", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(6)
		other := filepath.Join(r.dir, "other-name.ko")
		r.check(os.Link(filepath.Join(r.loader.State, running.ID.String(), "6.ko"), other))
		b, err := os.ReadFile(other)
		r.check(err)
		b[len(b)/2] ^= 1
		r.check(os.WriteFile(other, b, 0o600))
		outcome, err := r.reboot()
		if outcome != "failed" {
			t.Errorf("outcome %s", outcome)
		}
		wantCode(t, err, fault.Untrusted, "module_digest")
	})
	t.Run("Attack/L/disk full at each write", func(t *testing.T) {
		testkit.Need(t, "root") // mounts
		refused := 0
		for pages := 0; ; pages++ {
			r := newRig(t)
			r.smallDisk(pages + 60)
			r.confirmed(5) // with room
			filled := r.fill(pages)
			_, err := r.load(r.make(6))
			loaded := r.kernelHas(6)
			if err == nil {
				if !loaded {
					t.Errorf("%d pages: it says that it loaded, and did not", pages)
				}
				break
			}
			refused++
			// The effect never comes before its record.
			if loaded {
				t.Errorf("%d pages: loaded, and refused with %v", pages, err)
			}
			r.check(os.Remove(filled))
			if st := r.status(); st.Highest != 5 || st.Attempt != nil {
				t.Errorf("%d pages: afterwards %+v", pages, st)
			}
			if outcome, err := r.reboot(); outcome != "loaded" || err != nil || !r.kernelHas(5) {
				t.Errorf("%d pages: boot: %s, %v", pages, outcome, err)
			}
			r.settle(5)
			if _, err := r.client.Confirm(t.Context(), 5); err != nil {
				t.Errorf("%d pages: %v", pages, err)
			}
			if _, err := r.load(r.make(6)); err != nil {
				t.Errorf("%d pages: with room again: %v", pages, err)
			}
			if pages > 60 {
				t.Fatal("no end")
			}
		}
		if refused < 3 {
			t.Errorf("only %d writes failed", refused)
		}
	})
}

// smallDisk puts the loader's state on a disk of so many pages.
func (r *rig) smallDisk(pages int) {
	r.t.Helper()
	r.check(unix.Mount("tmpfs", r.loader.State, "tmpfs", 0, fmt.Sprintf("size=%d", pages*os.Getpagesize())))
	r.t.Cleanup(func() { _ = unix.Unmount(r.loader.State, unix.MNT_DETACH) })
}

// fill leaves so many pages free.
func (r *rig) fill(leave int) (file string) {
	r.t.Helper()
	var st unix.Statfs_t
	r.check(unix.Statfs(r.loader.State, &st))
	file = filepath.Join(r.loader.State, "filled")
	r.check(os.WriteFile(file, make([]byte, (int(st.Bfree)-leave)*int(st.Bsize)), 0o600))
	return file
}

func (r *rig) kernelHas(n livepatch.Sequence) bool {
	r.t.Helper()
	s, err := r.kernel.Look()
	r.check(err)
	for _, p := range s.Livepatches {
		if p.Name == n.ModuleName() {
			return true
		}
	}
	return false
}
