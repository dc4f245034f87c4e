// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"sync"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/signed"
	"klatch/internal/trust"
)

var successor = sync.OnceValue(func() signed.Publisher { return newPublisher("next module key") })

// TestAttackModuleKey is the drill for a stolen module key: the thief can sign
// modules, and so could load one by hand on a machine that trusts the key. Root
// wants the manifest keys too. The publisher brings a second key in, then
// revokes the first by recalls, since Debian's kernel does not ask dbx.
func TestAttackModuleKey(t *testing.T) {
	t.Run("Attack/C/module key stolen", func(t *testing.T) {
		r, behind := newRig(t), newRig(t) // the second misses a livepatch
		for _, m := range []*rig{r, behind} {
			m.confirmed(5)
		}
		before := r.snapshot()
		_, err := r.load(r.make(6, func(m *making) { m.by = strangers() })) // our module key, their manifest
		wantCode(t, err, fault.Untrusted, "manifest_untrusted")
		if r.snapshot() != before {
			t.Error("something changed")
		}

		// Two keys overlap: the owner installs the new anchor, and the next
		// livepatch is signed by the new one.
		byNew := func(m *making) { m.moduleBy = successor() }
		_, err = r.load(r.make(6, byNew))
		wantCode(t, err, fault.Untrusted, "module_key_unknown") // before the anchor
		both2 := ours().Anchor()
		both2.ModuleKeys = append([]trust.ModuleKey{}, both2.ModuleKeys[0], successor().Module)
		for _, m := range []*rig{r, behind} {
			m.anchor(both2)
		}
		if _, err := r.load(r.make(6, byNew)); err != nil {
			t.Fatal(err)
		}
		r.settle(6)
		_, err = r.client.Confirm(t.Context(), 6)
		r.check(err)

		// The first key is revoked. What runs stays; what it signed loads no more,
		// at boot either.
		rs := recalls(1)
		rs.Keys = []string{livepatch.KeyDigest(ours().Module.Modulus)}
		for _, m := range []*rig{r, behind} {
			m.check(m.recall(rs, both()...))
		}
		if st := behind.status(); st.Loaded == nil || st.Loaded.Sequence != 5 {
			t.Errorf("what runs was taken out: %+v", st)
		}
		_, err = r.load(r.make(7))
		wantCode(t, err, fault.Untrusted, "module_key_unknown")
		if outcome, err := r.reboot(); err != nil || outcome != "loaded" || !r.kernelHas(6) {
			t.Errorf("boot with the new key's livepatch: %s, %v", outcome, err)
		}
		if outcome, err := behind.reboot(); outcome != "failed" || fault.CodeOf(err) != "module_key_unknown" {
			t.Errorf("boot with the stolen key's livepatch: %s, %v", outcome, err)
		}
		if _, err := behind.load(behind.make(7, byNew)); err != nil {
			t.Errorf("the replacement: %v", err)
		}
	})
}
