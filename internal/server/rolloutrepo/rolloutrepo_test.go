// SPDX-License-Identifier: Apache-2.0

package rolloutrepo_test

import (
	"crypto"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/keyfile"
	"klatch/internal/livepatch"
	"klatch/internal/rollout"
	"klatch/internal/server/repo"
	"klatch/internal/server/rolloutdraft"
	. "klatch/internal/server/rolloutrepo"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/tufclient"
)

var (
	start = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	stock = pubsim.Kernel("6.1.0-50-cloud-amd64", 1)
	other = pubsim.Kernel("6.1.0-51-cloud-amd64", 2)
)

// server is an operator's repository on a server, and the people.
type server struct {
	*Repo
	t             *testing.T
	data, offline string
	released      []rollout.Release
	now           time.Time
}

func newServer(t *testing.T, profile rollout.Profile) *server { return newServerAt(t, profile, start) }

func newServerAt(t *testing.T, profile rollout.Profile, now time.Time) *server {
	s := &server{t: t, data: filepath.Join(t.TempDir(), "data"), offline: filepath.Join(t.TempDir(), "stick"), now: now}
	if err := os.MkdirAll(s.data, 0o700); err != nil {
		t.Fatal(err)
	}
	setup := Setup{Operator: "ops", Profile: profile, Tiers: rollout.Tiers{Format: rollout.TiersFormat, Tiers: []rollout.Tier{{Name: "canary"}, {Name: "stable", SoakHours: 24}}}}
	if profile != rollout.Lab {
		setup.Offline = s.offline
	}
	if _, err := Init(t.Context(), s.data, setup, s.now); err != nil {
		t.Fatal(err)
	}
	if _, err := Init(t.Context(), s.data, setup, s.now); fault.CodeOf(err) != "rollout_exists" {
		t.Errorf("a second time: %v", err)
	}
	s.open()
	return s
}

func (s *server) open() {
	s.t.Helper()
	var err error
	if s.Repo, err = Open(s.data, slog.New(slog.DiscardHandler)); err != nil {
		s.t.Fatal(err)
	}
}

// release is a publisher's; the server hears of it.
func (s *server) release(k kernel.Build, n livepatch.Sequence) string {
	s.t.Helper()
	m := livepatch.Manifest{Kernel: k, Module: livepatch.Module{Name: n.ModuleName()}}
	s.released = append(s.released, rollout.Release{Kernel: k, Sequence: n, Target: m.TargetPath(), Bytes: 1000, SHA256: fmt.Sprintf("%062x%02x", k.ID[:4], byte(n))[:64]})
	s.update()
	return m.TargetPath()
}

func (s *server) update() {
	s.t.Helper()
	if _, err := s.Update(s.t.Context(), s.released, s.now); err != nil {
		s.t.Fatal(err)
	}
}

// decide is what a machine with its own configuration decides.
func (s *server) decide(tier string, k kernel.Build) (rollout.Choice, error) {
	s.t.Helper()
	return s.machine(s.t.TempDir(), tier, k)
}

func (s *server) machine(memory, tier string, k kernel.Build) (rollout.Choice, error) {
	s.t.Helper()
	web := httptest.NewServer(repo.Files(s.Dir()))
	defer web.Close()
	snapshot, err := tufclient.Refresh(s.t.Context(), tufclient.Config{Root: s.Anchor().Root, Dir: memory, BaseURL: web.URL, Now: s.now, Lazy: true,
		Operator: &tufclient.Operator{Approvers: s.Anchor().Profile.Approvers()}})
	if err != nil {
		return rollout.Choice{Class: rollout.Stay}, err
	}
	return rollout.Decide(s.now, rollout.Machine{Tier: tier, Kernel: k}, rollout.View{
		Patches: func(path string) (rollout.Target, error) {
			for _, r := range s.released {
				if r.Target == path {
					return rollout.Target{Path: path, Bytes: r.Bytes, SHA256: r.SHA256}, nil
				}
			}
			return rollout.Target{}, fault.New(fault.NotFound, "target_missing", "missing")
		},
		Rollout: func(path string, limit int64) (rollout.File, error) {
			target, err := snapshot.Target(path)
			if err != nil {
				return rollout.File{}, err
			}
			b, err := snapshot.Download(s.t.Context(), target, limit)
			return rollout.File{Role: target.Role, Content: b}, err
		},
	})
}

// want says what machines of both tiers decide for both kernels, such as
// "canary:1 canary:- stable:! stable:-".
func (s *server) want(want string) {
	s.t.Helper()
	var got []string
	for _, tier := range []string{"canary", "stable"} {
		for _, k := range []kernel.Build{stock, other} {
			c, err := s.decide(tier, k)
			word := fmt.Sprint(c.Sequence)
			switch {
			case err != nil:
				word = string(fault.CodeOf(err))
			case c.Class != rollout.Take:
				word = string(c.Code)
			}
			got = append(got, tier+":"+word)
		}
	}
	if g := strings.Join(got, " "); g != want {
		s.t.Errorf("machines decide %s\nwant            %s", g, want)
	}
}

func (s *server) key(name string) crypto.Signer {
	s.t.Helper()
	k, err := keyfile.Open(filepath.Join(s.offline, name+".key"))
	if err != nil {
		s.t.Fatal(err)
	}
	return k
}

// sign lets people sign their copies of a draft, each as it travels.
func (s *server) sign(d *rolloutdraft.Draft, keys ...string) *rolloutdraft.Draft {
	s.t.Helper()
	var all *rolloutdraft.Draft
	for _, k := range keys {
		b, err := d.Encode()
		if err != nil {
			s.t.Fatal(err)
		}
		c, err := rolloutdraft.Parse(b)
		if err != nil {
			s.t.Fatal(err)
		}
		if roles, err := c.Sign(s.Anchor(), s.key(k)); err != nil || len(roles) == 0 {
			s.t.Fatalf("%s signs %v, %v", k, roles, err)
		}
		if all == nil {
			all = c
		} else if err := all.Merge(c); err != nil {
			s.t.Fatal(err)
		}
	}
	return all
}

func (s *server) promote(o Promotion) (*rolloutdraft.Draft, error) {
	o.Reason = "canaries are well"
	got, err := s.Promote(s.t.Context(), "anna", o, s.now)
	return got.Draft, err
}

func (s *server) lines() string {
	s.t.Helper()
	entries, broken, err := s.Record().Last(100)
	if err != nil || broken != 0 {
		s.t.Errorf("audit: %d broken, %v", broken, err)
	}
	var out []string
	for _, e := range entries {
		word := e.What
		if e.Tier != "" {
			word += ":" + e.Tier
		}
		if e.Failed != "" {
			word += "!"
		}
		out = append([]string{word}, out...)
	}
	return strings.Join(out, " ")
}

// B47: of three livepatches one is promoted, then all; both tiers are as they
// should be, and the record says who did it.
func TestPromoteOneAndAll(t *testing.T) {
	t.Parallel()
	s := newServer(t, rollout.Lab)
	s.want("canary:not_selected canary:not_selected stable:not_selected stable:not_selected")
	s.release(stock, 1)
	s.release(other, 1)
	s.want("canary:1 canary:1 stable:not_selected stable:not_selected")
	s.now = start.Add(30 * time.Hour)
	two := s.release(stock, 2)
	s.want("canary:2 canary:1 stable:not_selected stable:not_selected")

	if _, err := s.promote(Promotion{Tier: "stable", Targets: []string{"6.1.0-50-cloud-amd64/klatch_1.lpb"}}); fault.CodeOf(err) != "not_in_tier_before" {
		t.Errorf("what canary runs no more: %v", err)
	}
	if d, err := s.promote(Promotion{Tier: "stable", Targets: []string{"6.1.0-51-cloud-amd64/klatch_1.lpb"}}); err != nil || d != nil {
		t.Fatal(d, err)
	}
	s.want("canary:2 canary:1 stable:not_selected stable:1")
	if _, err := s.promote(Promotion{Tier: "stable", All: true}); err != nil {
		t.Fatal(err)
	}
	s.want("canary:2 canary:1 stable:not_selected stable:1") // two soaks until a day after it came
	s.now = s.now.Add(24*time.Hour - time.Second)
	s.update()
	s.want("canary:2 canary:1 stable:not_selected stable:1")
	s.now = s.now.Add(time.Second)
	s.update()
	s.want("canary:2 canary:1 stable:2 stable:1")
	if _, err := s.promote(Promotion{Tier: "stable", All: true}); fault.CodeOf(err) != "nothing_to_promote" {
		t.Error(err)
	}
	s.release(stock, 3)
	if _, err := s.promote(Promotion{Tier: "stable", Targets: []string{"klatch_3.lpb"}, Urgent: true}); err != nil {
		t.Fatal(err)
	}
	s.want("canary:3 canary:1 stable:3 stable:1")
	if got := s.lines(); got != "init promote:stable promote:stable promote:stable" {
		t.Errorf("audit %q", got)
	}
	entries, _, err := s.Record().Last(2)
	if e := entries[1]; err != nil || e.Who != "anna" || !strings.Contains(string(e.After), two) || !strings.Contains(string(e.Before), "6.1.0-51") || e.Reason == "" {
		t.Errorf("%+v, %v", e, err)
	}
	for name, o := range map[fault.Code]Promotion{
		"no_tier": {Tier: "nobody", All: true}, "first_tier": {Tier: "canary", All: true}, "no_target": {Tier: "stable"},
		"not_in_tier_before": {Tier: "stable", Targets: []string{"klatch_9.lpb"}, Urgent: true}, "ambiguous_target": {Tier: "stable", Targets: []string{"klatch_1.lpb"}, Urgent: true},
	} {
		if name == "ambiguous_target" {
			s.now = s.now.Add(48 * time.Hour)
			continue
		}
		if _, err := s.promote(o); fault.CodeOf(err) != name {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if _, err := s.Promote(t.Context(), "anna", Promotion{Tier: "stable", Targets: []string{"klatch_3.lpb"}, Urgent: true}, s.now); fault.CodeOf(err) != "bad_promotion" {
		t.Errorf("without a reason: %v", err)
	}
}

// B46: a tier is made, moved and removed, and new livepatches land in
// whichever is the first.
func TestTiersAreOrderedByPeople(t *testing.T) {
	t.Parallel()
	s := newServer(t, rollout.Lab)
	order := func(change func(rollout.Tiers) (rollout.Tiers, error)) {
		t.Helper()
		got, err := s.Order(t.Context(), "anna", change, "for the test", s.now)
		if err != nil || got.Draft != nil {
			t.Fatal(got, err)
		}
	}
	s.release(stock, 1)
	s.want("canary:1 canary:not_selected stable:not_selected stable:not_selected")
	order(func(l rollout.Tiers) (rollout.Tiers, error) { return l.Add(rollout.Tier{Name: "lab"}, 0) })
	s.want("canary:not_selected canary:not_selected stable:not_selected stable:not_selected")
	if c, err := s.decide("lab", stock); err != nil || c.Class != rollout.Take {
		t.Errorf("lab: %+v, %v", c, err)
	}
	order(func(l rollout.Tiers) (rollout.Tiers, error) { return l.Move("stable", 0) })
	s.want("canary:not_selected canary:not_selected stable:1 stable:not_selected")
	order(func(l rollout.Tiers) (rollout.Tiers, error) { return l.Remove("lab") })
	if c, err := s.decide("lab", stock); fault.CodeOf(err) != "tier_unknown" || c.Class != rollout.Stay {
		t.Errorf("lab is gone: %+v, %v", c, err)
	}
	s.release(other, 1)
	s.want("canary:not_selected canary:not_selected stable:1 stable:1")
	if got := s.lines(); got != "init tiers tiers tiers" {
		t.Errorf("audit %q", got)
	}
	s.open()
	if st, err := s.State(); err != nil || len(st.Tiers.Tiers) != 2 || st.Tiers.Tiers[0].Name != "stable" {
		t.Errorf("%+v, %v", st.Tiers, err)
	}
}

func TestHeldTierStaysAndGoesOn(t *testing.T) {
	t.Parallel()
	s := newServer(t, rollout.Lab)
	s.release(stock, 1)
	if err := s.Hold(t.Context(), "anna", "canary", "freeze of the year's end", s.now); err != nil {
		t.Fatal(err)
	}
	s.want("canary:held canary:not_selected stable:not_selected stable:not_selected")
	s.release(other, 1)
	s.open() // a restart
	s.update()
	s.want("canary:held canary:not_selected stable:not_selected stable:not_selected")
	if err := os.Remove(filepath.Join(s.data, "rollout-state.json")); err != nil {
		t.Fatal(err)
	}
	s.open() // a file that is lost
	s.update()
	s.want("canary:held canary:not_selected stable:not_selected stable:not_selected")
	for code, try := range map[fault.Code]func() error{
		"no_tier":    func() error { return s.Hold(t.Context(), "anna", "nobody", "x", s.now) },
		"not_held":   func() error { return s.Hold(t.Context(), "anna", "stable", "", s.now) },
		"bad_reason": func() error { return s.Hold(t.Context(), "anna", "stable", "a\u200bb", s.now) },
	} {
		if err := try(); fault.CodeOf(err) != code {
			t.Errorf("%s: %v", code, err)
		}
	}
	if err := s.Hold(t.Context(), "anna", "canary", "", s.now); err != nil {
		t.Fatal(err)
	}
	s.want("canary:1 canary:1 stable:not_selected stable:not_selected")
	if got := s.lines(); got != "init hold:canary release:canary" {
		t.Errorf("audit %q", got)
	}
}

// Versions follow the clock; a machine that has seen nothing takes none over a
// million.
func TestNewMachineInFifteenYears(t *testing.T) {
	t.Parallel()
	s := newServerAt(t, rollout.Lab, start.AddDate(15, 0, 0))
	s.release(stock, 1)
	if c, err := s.decide("canary", stock); err != nil || c.Class != rollout.Take {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestUpdateKeepsWhatItCannotJudge(t *testing.T) {
	t.Parallel()
	s := newServer(t, rollout.Lab)
	s.release(stock, 1)
	s.open()
	s.now = s.now.Add(13 * time.Hour) // over half of a day: signed again
	if changed, err := s.Update(t.Context(), nil, s.now); err != nil || !changed {
		t.Error(changed, err)
	}
	s.want("canary:1 canary:not_selected stable:not_selected stable:not_selected")
	if changed, err := s.Update(t.Context(), nil, s.now); err != nil || changed {
		t.Errorf("nothing to do: %t, %v", changed, err)
	}
	odd := s.released[0]
	odd.Kernel, odd.Target = other, "elsewhere.lpb"
	if _, err := s.Update(t.Context(), append(s.released, odd), s.now); err != nil {
		t.Errorf("one that cannot be written: %v", err)
	}
	s.want("canary:1 canary:not_selected stable:not_selected stable:not_selected")
	if _, err := s.Update(t.Context(), []rollout.Release{}, s.now); err != nil {
		t.Fatal(err)
	}
	s.want("canary:not_selected canary:not_selected stable:not_selected stable:not_selected")
}

func TestInitIsRefused(t *testing.T) {
	t.Parallel()
	data := t.TempDir()
	tiers := rollout.Tiers{Format: rollout.TiersFormat, Tiers: []rollout.Tier{{Name: "canary"}}}
	for code, setup := range map[fault.Code]Setup{
		"bad_operator":    {Operator: "A B", Profile: rollout.Lab, Tiers: tiers},
		"bad_profile":     {Operator: "ops", Profile: "none", Tiers: tiers},
		"offline_keys":    {Operator: "ops", Profile: rollout.Small, Tiers: tiers, Offline: filepath.Join(data, "keys")},
		"tiers_malformed": {Operator: "ops", Profile: rollout.Lab},
	} {
		if _, err := Init(t.Context(), data, setup, start); fault.CodeOf(err) != code {
			t.Errorf("%s: %v", code, err)
		}
	}
	if _, err := Open(data, slog.New(slog.DiscardHandler)); fault.CodeOf(err) != "no_rollout" {
		t.Error(err)
	}
	// A run that died before the anchor is completed by the next one.
	full := Setup{Operator: "ops", Profile: rollout.Full, Tiers: tiers, Offline: t.TempDir()}
	a, err := Init(t.Context(), data, full, start)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(data, "rollout.json")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(data, slog.New(slog.DiscardHandler)); fault.CodeOf(err) != "rollout_anchor_lost" || fault.HintOf(err) == "" {
		t.Errorf("a lost anchor: %v", err)
	}
	b, err := Init(t.Context(), data, full, start)
	if err != nil || string(a.Root) != string(b.Root) {
		t.Errorf("again: %v", err)
	}
}
