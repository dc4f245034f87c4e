// SPDX-License-Identifier: Apache-2.0

package rolloutrepo_test

import (
	"crypto"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/keyfile"
	"klatch/internal/livepatch"
	"klatch/internal/rollout"
	. "klatch/internal/server/rolloutrepo"
	"klatch/internal/tufrepo"
)

// Outside of lab a promotion is a file for people; two must sign it.
func TestPeoplePromoteWithADraft(t *testing.T) {
	t.Parallel()
	for _, profile := range []rollout.Profile{rollout.Small, rollout.Full} {
		t.Run(string(profile), func(t *testing.T) {
			s := newServer(t, profile)
			if keys, err := filepath.Glob(filepath.Join(s.data, "rollout-keys", "*")); err != nil || len(keys) != 3 {
				t.Errorf("keys on the server: %q, %v", keys, err)
			}
			s.release(stock, 1)
			s.now = start.Add(25 * time.Hour)
			s.update()
			d, err := s.promote(Promotion{Tier: "stable", All: true})
			if err != nil || d == nil {
				t.Fatal(d, err)
			}
			words, err := d.Words()
			if err != nil {
				t.Fatal(err)
			}
			text := strings.Join(words, "\n")
			for _, want := range []string{"OPENS tier stable for debian-12/amd64/6.1.0-50-cloud-amd64/klatch_1.lpb", "canaries are well", "NEW   promotion/stable/", "2026-11-26 12:00 UTC"} {
				if !strings.Contains(text, want) {
					t.Errorf("words lack %q:\n%s", want, text)
				}
			}
			one := s.sign(d, "promotion-1")
			if err := s.Complete(t.Context(), "anna", one, s.now); fault.CodeOf(err) != "draft_incomplete" || !strings.Contains(err.Error(), "1 of 2") {
				t.Errorf("one signature: %v", err)
			}
			s.want("canary:1 canary:not_selected stable:not_selected stable:not_selected")
			// The server goes on in between; the draft stays good.
			s.release(other, 1)
			s.now = s.now.Add(13 * time.Hour)
			s.update()
			if err := s.Complete(t.Context(), "anna", s.sign(d, "promotion-3", "promotion-1"), s.now); err != nil {
				t.Fatal(err)
			}
			s.want("canary:1 canary:1 stable:1 stable:not_selected")
			if err := s.Complete(t.Context(), "anna", one, s.now); fault.CodeOf(err) != "draft_incomplete" {
				t.Errorf("the old copy: %v", err)
			}
			if got := s.lines(); got != "init promote:stable" {
				t.Errorf("audit %q", got)
			}
			if e, _, err := s.Record().Last(1); err != nil || len(e[0].Signed) != 2 || !strings.HasPrefix(e[0].Signed[0], "promotion ") {
				t.Errorf("who signed: %+v, %v", e, err)
			}
			// Tiers are the targets keys' matter, and a renewal works for both.
			got, err := s.Order(t.Context(), "anna", func(l rollout.Tiers) (rollout.Tiers, error) { return l.Soaks("stable", 1) }, "faster", s.now)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Complete(t.Context(), "anna", s.sign(got.Draft, "targets-1", "targets-2"), s.now); err != nil {
				t.Fatal(err)
			}
			if got, err = s.Keys(t.Context(), "anna", tufrepo.Change{Renew: []string{"promotion", "targets", "root"}, Reason: "a year"}, s.now); err != nil {
				t.Fatal(err)
			}
			if err := s.Complete(t.Context(), "anna", s.sign(got.Draft, "promotion-1", "promotion-2", "targets-1", "targets-2", "root-1", "root-3"), s.now); err != nil {
				t.Fatal(err)
			}
			s.want("canary:1 canary:1 stable:1 stable:not_selected")
		})
	}
}

// After a theft people put other keys of the server in; the thief's then sign
// nothing that a machine takes.
func TestServerKeysAreReplaced(t *testing.T) {
	t.Parallel()
	s := newServer(t, rollout.Small)
	s.release(stock, 1)
	keys := filepath.Join(s.data, "rollout-keys")
	for _, step := range []struct {
		role string
		by   []string
	}{{"select", []string{"targets-1", "targets-2"}}, {"snapshot", []string{"root-1", "root-2"}}, {"timestamp", []string{"root-1", "root-2"}}} {
		old := filepath.Join(keys, step.role+"-1.key")
		was, err := keyfile.Public(old)
		if err != nil {
			t.Fatal(err)
		}
		id, err := tufrepo.KeyID(was)
		if err != nil {
			t.Fatal(err)
		}
		b, err := keyfile.NewEd25519()
		if err == nil {
			err = os.WriteFile(filepath.Join(keys, step.role+"-2.key"), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		public, err := keyfile.PublicOf(b)
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.Keys(t.Context(), "anna", tufrepo.Change{Reason: "theft", Add: map[string][]crypto.PublicKey{step.role: {public}}, Remove: map[string][]string{step.role: {id}}}, s.now)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Complete(t.Context(), "anna", s.sign(got.Draft, step.by...), s.now); err != nil {
			t.Fatalf("%s: %v", step.role, err)
		}
		if err := os.Remove(old); err != nil {
			t.Fatal(err)
		}
		s.now = s.now.Add(time.Minute)
		s.release(stock, livepatch.Sequence(len(s.released)+1))
	}
	s.want("canary:4 canary:not_selected stable:not_selected stable:not_selected")
	look, err := tufrepo.Look(s.Dir())
	if err != nil || look.Role("root").Version != 3 || len(look.Role("select").Keys) != 1 {
		t.Errorf("%+v, %v", look, err)
	}
	newest, err := s.NewestAnchor()
	if err != nil {
		t.Fatal(err)
	}
	d, err := s.Keys(t.Context(), "anna", tufrepo.Change{Reason: "month", Renew: []string{"promotion"}}, s.now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Draft.Sign(newest, s.key("promotion-1")); err != nil {
		t.Errorf("with the newest anchor: %v", err)
	}
	d.Draft.Metadata.Root = d.Draft.Roots[1] // the time before the theft
	if _, err := d.Draft.Sign(newest, s.key("promotion-2")); fault.CodeOf(err) != "draft_of_another" {
		t.Errorf("an old root: %v", err)
	}
	// An approver's key among the server's is refused before it is published.
	approver, err := keyfile.Public(filepath.Join(s.offline, "promotion-1.key"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.Keys(t.Context(), "anna", tufrepo.Change{Reason: "mistake", Add: map[string][]crypto.PublicKey{"select": {approver}}}, s.now)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Complete(t.Context(), "anna", s.sign(got.Draft, "targets-1", "targets-2"), s.now); fault.CodeOf(err) != "machines_would_refuse" {
		t.Error(err)
	}
	s.want("canary:4 canary:not_selected stable:not_selected stable:not_selected")
}
