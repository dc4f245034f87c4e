// SPDX-License-Identifier: Apache-2.0

package repo_test

import (
	"bytes"
	"testing"

	"klatch/internal/testkit/pubsim"
	"klatch/internal/tufrepo"
)

// TestEvidenceTravelsThroughAServer: what lies beside a bundle is copied and
// handed out as it is, up to its limit, and is taken for no livepatch.
func TestEvidenceTravelsThroughAServer(t *testing.T) {
	const limit = 4 << 20 // evidence.MaxFile, which a server must not import
	p := pubsim.New(t, "acme", start)
	bundle := p.Release(start, stock, 1, "CVE-2026-0001")
	beside := bundle[:len(bundle)-len(".lpb")] + ".evidence.json"
	content := map[string][]byte{beside: bytes.Repeat([]byte("e"), limit), "policy/evidence.1.json": []byte("{}")}
	for path, c := range content {
		p.Publish(start, tufrepo.Target{Path: path, Content: c})
	}
	m := newMirror(t, p)
	r, err := m.sync(start)
	if err != nil || r.Livepatches != 1 || r.Copied != 3 || m.targets() != bundle {
		t.Fatalf("%+v, %q, %v", r, m.targets(), err)
	}
	s, err := m.machine(start)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range content {
		target, err := s.Target(path)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := s.Download(t.Context(), target, limit); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", path, len(got), err)
		}
	}
	m.reopen()
	if err := m.Load(t.Context(), start); err != nil || m.targets() != bundle || len(m.Catalog().Problems) != 0 {
		t.Errorf("after a restart: %q, %v, %v", m.targets(), m.Catalog().Problems, err)
	}
}
