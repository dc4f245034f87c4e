// SPDX-License-Identifier: Apache-2.0

package tufclient_test

import (
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/fault"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/tufrepo"
)

// TestAttackClock: what a wrong clock may do. It may keep a machine from
// believing anything; it may neither bring an expired world back to before
// what was seen, nor make the right time wrong afterwards.
func TestAttackClock(t *testing.T) {
	publish := func(r *tufsim.Repo, at time.Time) {
		r.Publish(at, tufrepo.Target{Path: firstPath, Content: []byte(at.String())})
	}
	day := 24 * time.Hour
	t.Run("Attack/L/clock back", func(t *testing.T) {
		r := tufsim.New(t, "a", start)
		publish(r, start.Add(day))
		c := newClient(t, r)
		if s := c.mustRefresh(start.Add(day)); !s.Signed.Equal(start.Add(day)) {
			t.Errorf("signed at %s, want %s", s.Signed, start.Add(day))
		}
		for _, back := range []time.Duration{3 * time.Minute, day, 10000 * day} {
			if _, err := c.refresh(start.Add(day - back)); fault.CodeOf(err) != "clock_back" || fault.KindOf(err) != fault.Unavailable {
				t.Errorf("%s back: %v", back, err)
			}
		}
		c.mustRefresh(start.Add(day - time.Minute)) // time daemons step
	})
	t.Run("Attack/L/clock 1970", func(t *testing.T) {
		r := tufsim.New(t, "a", start)
		publish(r, start)
		c := newClient(t, r) // without a memory: the signed time alone says it
		if _, err := c.refresh(time.Unix(100, 0)); fault.CodeOf(err) != "clock_back" {
			t.Errorf("got %v", err)
		}
		c.mustRefresh(start)
	})
	t.Run("Attack/L/clock far ahead", func(t *testing.T) {
		r := tufsim.New(t, "a", start)
		publish(r, start)
		c := newClient(t, r)
		c.mustRefresh(start)
		for _, ahead := range []time.Duration{40 * time.Hour, 10000 * day} {
			_, err := c.refresh(start.Add(ahead)) // the first is within the life of the timestamp
			if ahead > 2*day && fault.CodeOf(err) != "metadata_expired" {
				t.Errorf("%s ahead: %v", ahead, err)
			}
			c.mustRefresh(start.Add(time.Minute)) // the right time is right again
		}
	})
	t.Run("Attack/L/a thief of the timestamp key signs the future", func(t *testing.T) {
		r := tufsim.New(t, "a", start)
		publish(r, start)
		c := newClient(t, r)
		c.mustRefresh(start)
		honest := r.Read("metadata/timestamp.json")
		tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", r.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
			m.Version++
			m.Expires = start.Add(10000 * day)
			m.UnrecognizedFields["klatch_signed_at"] = start.Add(9000 * day).Format(time.RFC3339)
		})
		if _, err := c.refresh(start.Add(time.Minute)); fault.CodeOf(err) != "clock_back" {
			t.Errorf("got %v", err)
		}
		r.Write("metadata/timestamp.json", honest)
		tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", r.Keys.Timestamp.Signers, func(m *metadata.TimestampType) { m.Version += 2 })
		if _, err := c.refresh(start.Add(2 * time.Minute)); err != nil {
			t.Errorf("the next honest timestamp: %v", err)
		}
	})
	t.Run("Attack/L/a time that is none", func(t *testing.T) {
		r := tufsim.New(t, "a", start)
		publish(r, start)
		c := newClient(t, r)
		c.mustRefresh(start)
		for _, text := range []any{"soon", 7, nil, map[string]any{}} {
			tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", r.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
				m.Version++
				m.UnrecognizedFields["klatch_signed_at"] = text
			})
			if s := c.mustRefresh(start.Add(time.Minute)); !s.Signed.IsZero() {
				t.Errorf("%v is taken for %s", text, s.Signed)
			}
		}
		if _, err := c.refresh(start.Add(-time.Hour)); fault.CodeOf(err) != "clock_back" {
			t.Errorf("the floor of before is forgotten: %v", err)
		}
	})
}
