// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"klatch/internal/cli"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/rollout"
	"klatch/internal/server/rolloutrepo"
	"klatch/internal/tufrepo"
)

// Whose tiers there are: settings.Rollout.
const (
	rolloutLocal    = "local" // also the empty word
	rolloutUpstream = "upstream"
)

func (s settings) checkRollout() error {
	switch s.Rollout {
	case "", rolloutLocal, rolloutUpstream:
		return nil
	}
	return fault.New(fault.Invalid, "bad_rollout", "rollout %.40q is none of local and upstream", s.Rollout)
}

// setRollout takes whose tiers are to be followed; an anchor comes with it the
// first time.
func setRollout(ctx context.Context, dir string, s *settings, word, anchor string) error {
	s.Rollout = word
	if err := s.checkRollout(); err != nil {
		return err
	}
	if word != rolloutUpstream {
		if anchor != "" {
			return fault.New(fault.Invalid, "rollout_anchor", "an operator's anchor is for --rollout upstream only")
		}
		return nil
	}
	if anchor != "" {
		b, err := durable.ReadFile(anchor, rollout.MaxAnchor)
		if err != nil {
			return err
		}
		_, err = rolloutrepo.Adopt(ctx, dir, b)
		return err
	}
	_, err := rolloutrepo.Follow(dir, s.Upstream, slog.New(slog.DiscardHandler))
	return err
}

// openOperator opens the operator's repository that this server keeps, or the
// copy of the one that it follows.
func openOperator(dir string, s settings, log *slog.Logger) (*rolloutrepo.Repo, error) {
	if s.Rollout == rolloutUpstream {
		return rolloutrepo.Follow(dir, s.Upstream, log)
	}
	return rolloutrepo.Open(dir, log)
}

// openOperatorOf is openOperator for commands that have only the folder.
func openOperatorOf(dir string) (*rolloutrepo.Repo, error) {
	s, err := readSettings(dir)
	if err != nil {
		return nil, err
	}
	return openOperator(dir, s, slog.New(slog.DiscardHandler))
}

// fetchTiers verifies and brings here what the server above has, where its
// tiers are followed; install brings it into force. The two halves stand
// around the copy of the livepatches: what a tier is to run is then here.
func (d *data) fetchTiers(ctx context.Context, s settings, from, base string, client *http.Client, now time.Time) (install func() error, err error) {
	if s.Rollout != rolloutUpstream {
		return nothing, nil
	}
	r, err := rolloutrepo.Follow(d.dir, from, slog.New(slog.DiscardHandler))
	if err != nil {
		return nothing, err
	}
	f, err := r.Fetch(ctx, base, client, now)
	if err != nil {
		return nothing, err
	}
	return func() error { _, err := f.Install(ctx); return err }, nil
}

func nothing() error { return nil }

// tierFiles are those of the operator's repository, own or followed; none
// where there is none.
func (d *data) tierFiles(ctx context.Context, now time.Time) (map[string][]byte, error) {
	r, err := openOperator(d.dir, d.settings, slog.New(slog.DiscardHandler))
	if fault.CodeOf(err) == "no_rollout" {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return r.Files(ctx, now)
}

// tiersShown is whose tiers a server has, for status.
type tiersShown struct {
	From     string    `json:"from"` // none, local or upstream
	Upstream string    `json:"upstream,omitempty"`
	Operator string    `json:"operator,omitempty"`
	Version  int64     `json:"metadata_version,omitempty"`
	Expires  time.Time `json:"metadata_expires,omitzero"` // of what runs out first
	Problem  string    `json:"problem,omitempty"`
}

func (d *data) tiers() tiersShown {
	t := tiersShown{From: cmp.Or(d.Rollout, rolloutLocal)}
	r, err := openOperator(d.dir, d.settings, slog.New(slog.DiscardHandler))
	if fault.CodeOf(err) == "no_rollout" {
		return tiersShown{From: "none"}
	}
	if err == nil {
		t.Upstream, t.Operator = r.Above(), r.Anchor().Operator
		if _, err = r.State(); err == nil {
			var look tufrepo.State
			look, err = tufrepo.Look(r.Dir())
			for _, role := range look.Roles {
				if t.Expires.IsZero() || role.Expires.Before(t.Expires) {
					t.Expires = role.Expires.UTC()
				}
				if role.Name == "timestamp" {
					t.Version = role.Version
				}
			}
		}
	}
	if err != nil {
		t.Problem = err.Error()
	}
	return t
}

func (t tiersShown) String() string {
	if t.From == "none" {
		return "none; every machine is offered everything"
	}
	whose := "this server's own"
	if t.From == rolloutUpstream {
		whose = "followed from " + t.Upstream
	}
	text := fmt.Sprintf("of operator %s, %s", cmp.Or(t.Operator, "?"), whose)
	if t.Problem != "" {
		return cli.Clean(text + ": " + t.Problem)
	}
	return cli.Clean(fmt.Sprintf("%s, metadata %d until %s", text, t.Version, t.Expires.Format(time.RFC3339)))
}
