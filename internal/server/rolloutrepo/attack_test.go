// SPDX-License-Identifier: Apache-2.0

package rolloutrepo_test

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/keyfile"
	"klatch/internal/livepatch"
	"klatch/internal/rollout"
	"klatch/internal/server/rolloutdraft"
	. "klatch/internal/server/rolloutrepo"
)

// TestAttackR: the server is a thief's, who also writes drafts for people.
func TestAttackR(t *testing.T) {
	t.Parallel()
	t.Run("Attack/R/a draft that hides a promotion", func(t *testing.T) {
		s := newServer(t, rollout.Small)
		s.release(stock, 1)
		d, err := s.promote(Promotion{Tier: "stable", All: true})
		if err != nil {
			t.Fatal(err)
		}
		for name, change := range map[string]func(*rolloutdraft.Draft){
			"the content is left out": func(d *rolloutdraft.Draft) { clear(d.Files) },
			"other content": func(d *rolloutdraft.Draft) {
				for p := range d.Files {
					d.Files[p] = []byte(strings.Replace(string(d.Files[p]), `"urgent": false`, `"urgent": true`, 1))
				}
			},
			"content of nothing": func(d *rolloutdraft.Draft) { d.Files["promotion/stable/x.json"] = []byte("x") },
		} {
			b, err := d.Encode()
			if err != nil {
				t.Fatal(err)
			}
			c, err := rolloutdraft.Parse(b)
			if err != nil {
				t.Fatal(err)
			}
			change(c)
			if _, err := c.Sign(s.Anchor(), s.key("promotion-1")); fault.CodeOf(err) != "bad_draft" {
				t.Errorf("%s: %v", name, err)
			}
			if b, err = c.Encode(); err != nil {
				t.Fatal(err)
			}
			if _, err := rolloutdraft.Parse(b); fault.CodeOf(err) != "bad_draft" {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	t.Run("Attack/R/a draft on a state that the thief made up", func(t *testing.T) {
		honest, thief := newServer(t, rollout.Small), newServer(t, rollout.Small)
		thief.release(stock, 1)
		d, err := thief.promote(Promotion{Tier: "stable", All: true})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.Sign(honest.Anchor(), honest.key("promotion-1")); fault.CodeOf(err) != "draft_of_another" {
			t.Error(err)
		}
		d.Roots = append(d.Roots, d.Metadata.Root)
		if _, err := d.Sign(honest.Anchor(), honest.key("promotion-1")); fault.CodeOf(err) != "draft_of_another" {
			t.Error(err)
		}
	})
	t.Run("Attack/R/server restored from backup", func(t *testing.T) {
		s := newServer(t, rollout.Small)
		s.release(stock, 1)
		memory, backup := t.TempDir(), filepath.Join(t.TempDir(), "b")
		if err := os.CopyFS(backup, os.DirFS(s.data)); err != nil {
			t.Fatal(err)
		}
		for i := range 5 { // a day of work that the backup does not know
			s.now = s.now.Add(5 * time.Hour)
			s.release(stock, livepatch.Sequence(2+i))
		}
		before, err := s.machine(memory, "canary", stock)
		if err != nil || before.Sequence != 6 {
			t.Fatal(before, err)
		}
		// All of it is put back, an hour later: the machine goes on.
		s.now = s.now.Add(time.Hour)
		whole := &server{t: t, data: backup, now: s.now, released: s.released}
		whole.open()
		whole.update()
		if c, err := whole.machine(memory, "canary", stock); err != nil || c.Sequence != 6 {
			t.Errorf("after the backup: %+v, %v", c, err)
		}
		// Only the repository is put back: the server knows better.
		if err := os.RemoveAll(s.Dir()); err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(s.Dir(), os.DirFS(filepath.Join(backup, "rollout"))); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{"timestamp.json"} { // as it was at the time of the backup
			if err := os.Remove(filepath.Join(s.Dir(), "metadata", f)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Open(s.data, slog.New(slog.DiscardHandler)); err == nil {
			t.Error("a repository behind what was published is opened")
		}
	})
	t.Run("Attack/R/old timestamp put back", func(t *testing.T) {
		s := newServer(t, rollout.Small)
		s.release(stock, 1)
		old, err := os.ReadFile(filepath.Join(s.Dir(), "metadata", "timestamp.json"))
		if err != nil {
			t.Fatal(err)
		}
		s.now = s.now.Add(time.Hour)
		s.release(stock, 2)
		if err := os.WriteFile(filepath.Join(s.Dir(), "metadata", "timestamp.json"), old, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(s.data, slog.New(slog.DiscardHandler)); fault.CodeOf(err) != "rollout_behind" || fault.HintOf(err) == "" {
			t.Error(err)
		}
	})
	t.Run("Attack/R/hold", func(t *testing.T) {
		s := newServer(t, rollout.Small)
		s.release(stock, 1)
		if err := s.Hold(t.Context(), "thief", "canary", "because", s.now); err != nil {
			t.Fatal(err)
		}
		if c, err := s.decide("canary", stock); err != nil || c.Class != rollout.Stay || c.Code != "held" {
			t.Errorf("%+v, %v", c, err)
		}
	})
	t.Run("Attack/R/the server alone opens no tier", func(t *testing.T) {
		s := newServer(t, rollout.Small)
		s.release(stock, 1)
		d, err := s.promote(Promotion{Tier: "stable", All: true, Urgent: false})
		if err != nil {
			t.Fatal(err)
		}
		keys, err := filepath.Glob(filepath.Join(s.data, "rollout-keys", "*.key"))
		if err != nil || len(keys) != 3 {
			t.Fatal(keys, err)
		}
		for _, k := range keys {
			signer, err := keyfile.Open(k)
			if err != nil {
				t.Fatal(err)
			}
			if roles, err := d.Sign(s.Anchor(), signer); err != nil || len(roles) != 0 {
				t.Errorf("%s signs %v, %v", k, roles, err)
			}
		}
		if err := s.Complete(t.Context(), "thief", d, s.now); fault.CodeOf(err) != "draft_incomplete" {
			t.Error(err)
		}
	})
}
