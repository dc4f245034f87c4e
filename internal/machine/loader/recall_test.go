// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/signed"
	"klatch/internal/trustsign"
)

func recalls(version int64, entries ...livepatch.Recall) livepatch.Recalls {
	return livepatch.Recalls{Format: livepatch.RecallsFormat, Version: version, Issued: time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC),
		Entries: append([]livepatch.Recall{}, entries...), Floors: []livepatch.Floor{}, Keys: []string{}}
}

func taken(n livepatch.Sequence) livepatch.Recall {
	return livepatch.Recall{Kernel: running.ID, Sequence: n, Reason: "it eats files"}
}

// recall hands recalls over as klatchd does.
func (r *rig) recall(rs livepatch.Recalls, by ...note.Signer) error {
	r.t.Helper()
	b, err := trustsign.Recalls(rs, by...)
	r.check(err)
	return r.recallBytes(b)
}

func (r *rig) recallBytes(b []byte) error {
	r.t.Helper()
	f, err := os.Open(r.write("given.recalls", b))
	r.check(err)
	defer f.Close()
	_, err = r.client.Recall(r.t.Context(), f)
	return err
}

func both() []note.Signer { return ours().Signers[:2] }

// TestAttackRecalls: whoever owns server and daemon tries to load what the
// publisher took back, or to make root forget it.
func TestAttackRecalls(t *testing.T) {
	two := func(t *testing.T) *rig {
		r := newRig(t)
		r.confirmed(1)
		r.check(r.recall(recalls(2, taken(2)), both()...))
		return r
	}
	for _, tt := range []struct {
		name string
		try  func(r *rig) error
		want fault.Code
	}{
		{"load what was recalled", func(r *rig) error { _, err := r.load(r.make(2)); return err }, "recalled"},
		{"recalls by one key of two", func(r *rig) error { return r.recall(recalls(3), both()[0]) }, "manifest_threshold"},
		{"recalls by another publisher", func(r *rig) error { return r.recall(recalls(3), other(r.t).Signers[:2]...) }, "manifest_untrusted"},
		{"older recalls again", func(r *rig) error { return r.recall(recalls(1, taken(2)), both()...) }, "recalls_rollback"},
		{"newer recalls that forget one", func(r *rig) error { return r.recall(recalls(3), both()...) }, "recalls_rollback"},
		{"a manifest in the place of recalls", func(r *rig) error { return r.recallBytes(r.make(3).manifest) }, "recalls_malformed"},
		{"recalls in the place of a manifest", func(r *rig) error {
			b, err := trustsign.Recalls(recalls(3, taken(2)), both()...)
			r.check(err)
			p := r.make(3)
			p.manifest = b
			_, err = r.load(p)
			return err
		}, "manifest_malformed"},
		{"endless recalls", func(r *rig) error { return r.recallBytes(make([]byte, livepatch.MaxRecalls+2)) }, "manifest_malformed"},
	} {
		t.Run("Attack/R/"+tt.name, func(t *testing.T) {
			r := two(t)
			before := r.snapshot()
			if err := tt.try(r); fault.CodeOf(err) != tt.want {
				t.Errorf("got %v, want code %s", err, tt.want)
			}
			if r.snapshot() != before {
				t.Error("the refusal changed something")
			}
			if _, err := r.load(r.make(3)); err != nil {
				t.Errorf("a higher sequence: %v", err)
			}
		})
	}
}

func other(t *testing.T) signed.Publisher {
	t.Helper()
	p, err := signed.NewPublisher("somebody else")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestRecalledIsNotLoadedAtBoot: row B29. What runs stays until the reboot.
func TestRecalledIsNotLoadedAtBoot(t *testing.T) {
	r := newRig(t)
	r.confirmed(2)
	r.check(r.recall(recalls(1, taken(2)), both()...))
	if st := r.status(); st.Loaded == nil || st.Loaded.Sequence != 2 || st.Recalls != 1 || len(st.Loaded.Fixes) == 0 {
		t.Errorf("a recall changes what runs: %+v", st)
	}
	outcome, err := r.reboot()
	if fault.CodeOf(err) != "recalled" || outcome != "failed" {
		t.Errorf("boot: %s, %v", outcome, err)
	}
	if st := r.status(); st.Loaded != nil || st.Boot.Code != "recalled" {
		t.Errorf("after boot: %+v", st)
	}
	r.confirmed(3)
	if outcome, err := r.reboot(); err != nil || outcome != "loaded" {
		t.Errorf("boot with a higher sequence: %s, %v", outcome, err)
	}
}

func TestFloorAndRevokedKeys(t *testing.T) {
	r := newRig(t)
	rs := recalls(1)
	rs.Floors = []livepatch.Floor{{Kernel: running.ID, Sequence: 3}}
	r.check(r.recall(rs, both()...))
	_, err := r.load(r.make(2))
	wantCode(t, err, fault.Untrusted, "below_floor")
	r.confirmed(3)

	// Debian's kernel does not ask dbx: our own revocation must hold.
	rs.Version, rs.Keys = 2, []string{livepatch.KeyDigest(ours().Module.Modulus)}
	r.check(r.recall(rs, both()...))
	_, err = r.load(r.make(4))
	wantCode(t, err, fault.Untrusted, "module_key_unknown")
	if _, err := r.reboot(); fault.CodeOf(err) != "module_key_unknown" {
		t.Errorf("boot: %v", err)
	}

	// One manifest key of three is revoked: the other two still reach the threshold.
	r = newRig(t)
	rs = recalls(1)
	rs.Keys = []string{livepatch.KeyDigest([]byte(ours().Anchor().Manifest.Keys[0]))}
	r.check(r.recall(rs, both()...))
	_, err = r.load(r.make(4))
	wantCode(t, err, fault.Untrusted, "manifest_threshold")
	if _, err := r.load(r.make(4, func(m *making) { m.noteBy = func(p signed.Publisher) []note.Signer { return p.Signers[1:3] } })); err != nil {
		t.Errorf("by the two others: %v", err)
	}
}

// Another publisher's recalls, from before the owner installed a new anchor, do
// not count and stop nothing.
func TestRecallsOfAnotherAnchor(t *testing.T) {
	r := newRig(t)
	r.check(r.recall(recalls(1, taken(2)), both()...))
	p := other(t)
	r.anchor(p.Anchor())
	if _, err := r.load(r.make(2, func(m *making) { m.by, m.moduleBy = p, p })); err != nil {
		t.Error(err)
	}
}

// TestDamagedRecallsStopLoads: nobody knows then what was taken back. The next
// check brings them anew.
func TestDamagedRecallsStopLoads(t *testing.T) {
	r := newRig(t)
	r.confirmed(1)
	r.check(r.recall(recalls(1, taken(2)), both()...))
	file := filepath.Join(r.dir, "state", "recalls.note")
	good, err := os.ReadFile(file)
	r.check(err)
	flipped := bytes.Replace(good, []byte("it eats files"), []byte("it eats filez"), 1)
	for name, content := range map[string][]byte{"a byte": flipped, "cut": good[:len(good)/2], "empty": {}} {
		r.check(os.WriteFile(file, content, 0o600))
		if _, err := r.load(r.make(3)); err == nil || !strings.Contains(err.Error(), "recalls.note is damaged") {
			t.Errorf("%s: %v", name, err)
		}
		r.check(r.recall(recalls(1, taken(2)), both()...))
		if _, err := r.load(r.make(2)); fault.CodeOf(err) != "recalled" {
			t.Errorf("%s, mended: %v", name, err)
		}
	}
}
