// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/testkit/klpfake"
)

// TestAttackOnTheOwner: a daemon that somebody took over asks for what the
// owner of the machine, or the machine's own past, has forbidden; and root
// writes its intention down before it acts.
func TestAttackOnTheOwner(t *testing.T) {
	for name, off := range map[string]func(r *rig){
		"flag file": func(r *rig) { r.write("etc/off", nil) },
		"boot parameter": func(r *rig) {
			r.check(r.kernel.Change(func(s *klpfake.State) { s.Now.CommandLine = []string{"quiet", "klatch=off"} }))
		},
		"disabled until the reboot": func(r *rig) {
			_, err := r.client.Disable(r.t.Context())
			r.check(err)
		},
	} {
		t.Run("Attack/L/load against the owner's switch: "+name, func(t *testing.T) {
			r := newRig(t)
			off(r)
			_, err := r.load(r.make(6))
			if fault.KindOf(err) != fault.Denied || !strings.HasPrefix(string(fault.CodeOf(err)), "off_") || r.kernelHas(6) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("Attack/L/load again what killed the machine", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(4)
		for range 2 { // it dies in the transition each time
			if _, err := r.load(r.make(5)); err != nil {
				t.Fatal(err)
			}
			if _, err := r.reboot(); err != nil {
				t.Fatal(err)
			}
			r.settle(4)
			_, err := r.client.Confirm(t.Context(), 4)
			r.check(err)
		}
		_, err := r.load(r.make(5))
		wantCode(t, err, fault.Conflict, "sequence_failed")
		if _, err := r.load(r.make(6)); err != nil {
			t.Errorf("a higher sequence: %v", err)
		}
	})
	t.Run("Attack/L/power cut while the kernel takes it", func(t *testing.T) {
		r := newRig(t)
		var journal []byte
		r.kernel.OnLoad = func(*os.File) {
			b, err := os.ReadFile(filepath.Join(r.loader.State, "journal.json"))
			r.check(err)
			journal = b
		}
		if _, err := r.load(r.make(6)); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(journal), `"sequence": 6`) && !strings.Contains(string(journal), `"sequence":6`) {
			t.Errorf("the attempt was not on disk before: %s", journal)
		}
	})
	t.Run("Attack/L/root's journal gone while a livepatch runs", func(t *testing.T) {
		r := newRig(t)
		r.confirmed(6)
		r.check(os.Remove(filepath.Join(r.loader.State, "journal.json")))
		_, err := r.load(r.make(5))
		wantCode(t, err, fault.Conflict, "sequence_lower")
		_, err = r.load(r.make(6))
		wantCode(t, err, fault.Conflict, "sequence_same")
	})
	t.Run("Attack/L/confirm what another put in", func(t *testing.T) {
		r := newRig(t)
		r.run(3)
		r.check(os.Remove(filepath.Join(r.loader.State, "journal.json")))
		_, err := r.client.Confirm(t.Context(), 3)
		wantCode(t, err, fault.Conflict, "no_attempt")
		if st := r.status(); st.Highest != 0 {
			t.Errorf("highest %d", st.Highest)
		}
	})
}
