// SPDX-License-Identifier: Apache-2.0

package repo_test

import (
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/trustsign"
	"klatch/internal/tufrepo"
)

// TestRecalledIsNotOffered: rows B29 and C1. The recall reaches a mirror with
// the next sync, and a mirror of that mirror: it is a signed file like all.
func TestRecalledIsNotOffered(t *testing.T) {
	p := pubsim.New(t, "acme", start)
	one := p.Release(start, stock, 1, "CVE-2026-0001")
	p.Release(start, stock, 2, "CVE-2026-0001")
	m := newMirror(t, p)
	if _, err := m.sync(start); err != nil {
		t.Fatal(err)
	}
	later := start.Add(time.Hour)
	put := func(path string, version int64) {
		r := livepatch.Recalls{Format: livepatch.RecallsFormat, Version: version, Issued: later, Floors: []livepatch.Floor{}, Keys: []string{},
			Entries: []livepatch.Recall{{Kernel: stock.ID, Sequence: 2, Reason: "it eats files"}}}
		b, err := trustsign.Recalls(r, p.Note)
		if err != nil {
			t.Fatal(err)
		}
		p.Publish(later, tufrepo.Target{Path: path, Content: b})
	}
	put(livepatch.RecallsPath(1), 1)
	if _, err := m.sync(later); err != nil || m.targets() != one || m.Catalog().Recalls != 1 {
		t.Errorf("after the recall: %s, %v", m.targets(), err)
	}
	m.reopen()
	if err := m.Load(t.Context(), later); err != nil || m.targets() != one {
		t.Errorf("after a restart: %s, %v", m.targets(), err)
	}
	put(livepatch.RecallsPath(9), 1)
	if _, err := m.sync(later.Add(time.Minute)); fault.CodeOf(err) != "wrong_target" || m.targets() != one {
		t.Errorf("old recalls under a new name: %s, %v", m.targets(), err)
	}
}
