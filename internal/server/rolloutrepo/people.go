// SPDX-License-Identifier: Apache-2.0

package rolloutrepo

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/rollout"
	"klatch/internal/server/audit"
	"klatch/internal/server/rolloutdraft"
	"klatch/internal/tufclient"
	"klatch/internal/tufrepo"
)

// Outcome of something that people must sign: in force, because all keys lie
// here (profile lab), or a draft for them.
type Outcome struct {
	Draft *rolloutdraft.Draft // nil: in force
}

// Promotion orders the opening of a tier.
type Promotion struct {
	Tier    string
	Targets []string // paths, or the last part of one
	All     bool     // all that the tier before runs
	Urgent  bool     // without the soak; also what the tier before does not run yet
	Reason  string
}

// Promote prepares the promotion of livepatches to a tier.
func (r *Repo) Promote(ctx context.Context, who string, o Promotion, now time.Time) (Outcome, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.Local(); err != nil {
		return Outcome{}, err
	}
	s, err := r.state()
	if err != nil {
		return Outcome{}, err
	}
	chosen, err := r.choose(s, o)
	if err != nil {
		return Outcome{}, err
	}
	var p tufrepo.Publication
	at := now.UTC().Truncate(time.Second)
	for _, x := range chosen {
		one := rollout.Promotion{Format: rollout.PromotionFormat, Tier: o.Tier, Target: x.Target, SHA256: x.SHA256, Since: x.Since, PromotedAt: at, Urgent: o.Urgent, Reason: o.Reason}
		if one.Since.IsZero() || one.Since.After(at) {
			one.Since = at
		}
		b, err := one.Encode()
		if err != nil {
			return Outcome{}, fault.New(fault.Invalid, "bad_promotion", "%w", err).WithHint("say why, in one line: --reason TEXT")
		}
		p.Targets = append(p.Targets, tufrepo.Target{Path: rollout.PromotionPath(o.Tier, x.SHA256), Content: b, Replace: true})
	}
	p.Withdraw = r.stale(s)
	return r.prepare(ctx, who, p, o.Reason, now)
}

// choose finds what is to be promoted.
func (r *Repo) choose(s rollout.State, o Promotion) ([]rollout.Selection, error) {
	switch place := s.Tiers.Index(o.Tier); {
	case place < 0:
		return nil, fault.New(fault.NotFound, "no_tier", "there is no tier %.60q", o.Tier).WithHint("klatch-fleet tier list")
	case place == 0:
		return nil, fault.New(fault.Invalid, "first_tier", "tier %s is the first: new livepatches are in it without a promotion", o.Tier)
	case o.All == (len(o.Targets) > 0):
		return nil, fault.New(fault.Invalid, "no_target", "say which livepatches to promote, or --all").WithHint("klatch-fleet tier list shows what waits")
	}
	waiting := s.Candidates(o.Tier)
	if o.All {
		if len(waiting) == 0 {
			return nil, fault.New(fault.Conflict, "nothing_to_promote", "the tier before %s runs nothing that is not promoted to it", o.Tier).WithHint("klatch-fleet tier list")
		}
		return waiting, nil
	}
	before := s.Tiers.Tiers[s.Tiers.Index(o.Tier)-1].Name
	var out []rollout.Selection
	for _, name := range o.Targets {
		is := func(target string) bool { return target == name || strings.HasSuffix(target, "/"+name) }
		found := slices.DeleteFunc(slices.Clone(waiting), func(x rollout.Selection) bool { return !is(x.Target) })
		if o.Urgent && len(found) == 0 { // also what is promoted and soaks, and what is nowhere yet
			for _, x := range s.Selections {
				if x.Tier == before && is(x.Target) {
					found = append(found, x)
				}
			}
			for _, x := range r.released {
				if len(found) == 0 && is(x.Target) {
					found = append(found, rollout.Selection{Target: x.Target, SHA256: x.SHA256})
				}
			}
		}
		switch {
		case len(found) == 0:
			return nil, fault.New(fault.Conflict, "not_in_tier_before", "%.160q is not what tier %s runs, or it is promoted to %s already", name, before, o.Tier).
				WithHint("klatch-fleet tier list shows what waits; --urgent does not wait for tier %s", before)
		case len(found) > 1:
			return nil, fault.New(fault.Invalid, "ambiguous_target", "%d livepatches are named like %.160q", len(found), name).WithHint("give the whole path")
		case slices.ContainsFunc(out, func(x rollout.Selection) bool { return x.Target == found[0].Target }):
			continue
		}
		out = append(out, found[0])
	}
	return out, nil
}

// stale are promotions that can open nothing any more: of a tier that is gone,
// or of what the publisher offers no longer.
func (r *Repo) stale(s rollout.State) []string {
	var out []string
	for _, p := range s.Promotions {
		offered := r.released == nil || slices.ContainsFunc(r.released, func(x rollout.Release) bool { return x.Target == p.Target && x.SHA256 == p.SHA256 })
		if !offered || s.Tiers.Index(p.Tier) < 0 {
			out = append(out, rollout.PromotionPath(p.Tier, p.SHA256))
		}
	}
	return out
}

// Order prepares another list of tiers.
func (r *Repo) Order(ctx context.Context, who string, change func(rollout.Tiers) (rollout.Tiers, error), reason string, now time.Time) (Outcome, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.Local(); err != nil {
		return Outcome{}, err
	}
	s, err := r.state()
	if err != nil {
		return Outcome{}, err
	}
	next, err := change(s.Tiers)
	if err != nil {
		return Outcome{}, err
	}
	if slices.Equal(next.Tiers, s.Tiers.Tiers) {
		return Outcome{}, fault.New(fault.Conflict, "nothing_to_do", "the tiers are like this already").WithHint("klatch-fleet tier list")
	}
	b, err := next.Encode()
	if err != nil {
		return Outcome{}, err
	}
	p := tufrepo.Publication{Targets: []tufrepo.Target{{Path: rollout.TiersPath, Content: b, Replace: true}}}
	return r.prepare(ctx, who, p, reason, now)
}

// Keys prepares a change of keys, or metadata of people with a whole new life
// (Change.Renew). An operator's repository keeps its two roles.
func (r *Repo) Keys(ctx context.Context, who string, c tufrepo.Change, now time.Time) (Outcome, error) {
	if err := r.Local(); err != nil {
		return Outcome{}, err
	}
	for _, role := range c.Renew {
		if role != "root" && role != rollout.RoleTargets && role != rollout.RolePromotion {
			return Outcome{}, fault.New(fault.Invalid, "no_role", "role %.40q is not signed by people", role).WithHint("name root, targets or promotion")
		}
	}
	c.Roles, c.Drop, c.AtLeast = nil, nil, r.anchor.Profile.Approvers()
	r.mu.Lock()
	defer r.mu.Unlock()
	metadata, err := r.repository(now).Prepare(ctx, c, now)
	if err != nil {
		return Outcome{}, err
	}
	return r.offer(ctx, who, metadata, nil, now)
}

func (r *Repo) prepare(ctx context.Context, who string, p tufrepo.Publication, reason string, now time.Time) (Outcome, error) {
	metadata, err := r.repository(now).PreparePublication(ctx, p, reason, now)
	if err != nil {
		return Outcome{}, err
	}
	contents := map[string][]byte{}
	for _, t := range p.Targets {
		contents[t.Path] = t.Content
	}
	return r.offer(ctx, who, metadata, contents, now)
}

// offer signs with what people's keys lie here, and completes what is then
// signed by enough.
func (r *Repo) offer(ctx context.Context, who string, metadata *tufrepo.Draft, contents map[string][]byte, now time.Time) (Outcome, error) {
	roots, err := tufrepo.Roots(r.dir)
	if err != nil {
		return Outcome{}, err
	}
	d := &rolloutdraft.Draft{Format: rolloutdraft.Format, Operator: r.anchor.Operator, Roots: roots, Metadata: metadata, Files: contents}
	_, people, err := r.signers()
	if err != nil {
		return Outcome{}, err
	}
	if len(people) > 0 {
		if _, err := d.Sign(r.anchor, people...); err != nil {
			return Outcome{}, err
		}
	}
	open, err := missing(d)
	if err != nil {
		return Outcome{}, err
	}
	if len(open) > 0 {
		return Outcome{Draft: d}, nil
	}
	return Outcome{}, r.complete(ctx, who, d, now)
}

func missing(d *rolloutdraft.Draft) ([]string, error) {
	all, err := d.Metadata.Missing()
	var out []string
	for _, m := range all {
		if !m.Optional && m.Role != rollout.RoleSelect { // that is ours, at the end
			out = append(out, fmt.Sprintf("%s by %s: %d of %d", m.Role, m.By, m.Have, m.Need))
		}
	}
	return out, err
}

// Complete brings a draft into force that enough people have signed. The
// server adds signatures of its own three roles and of no other.
func (r *Repo) Complete(ctx context.Context, who string, d *rolloutdraft.Draft, now time.Time) error {
	if err := r.Local(); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if d.Operator != r.anchor.Operator {
		return fault.New(fault.Invalid, "bad_draft", "the draft is of operator %s, this is %s", d.Operator, r.anchor.Operator)
	}
	open, err := missing(d)
	if err != nil {
		return err
	}
	if len(open) > 0 {
		return fault.New(fault.Denied, "draft_incomplete", "signatures are missing: %s", strings.Join(open, "; ")).
			WithHint("let more of their holders sign: klatch-fleet draft sign FILE --key FILE.key --anchor rollout.json")
	}
	return r.complete(ctx, who, d, now)
}

func (r *Repo) complete(ctx context.Context, who string, d *rolloutdraft.Draft, now time.Time) error {
	s, err := r.state()
	if err != nil {
		return err
	}
	own, _, err := r.signers()
	if err != nil {
		return err
	}
	if err := r.rehearse(ctx, d, own, now); err != nil {
		return err
	}
	var targets []tufrepo.Target
	for path, content := range d.Files {
		targets = append(targets, tufrepo.Target{Path: path, Content: content})
	}
	e := audit.Entry{At: now.UTC(), Who: who, What: "keys", Reason: d.Metadata.Reason}
	if e.Signed, err = d.Metadata.SignedBy(); err != nil {
		return err
	}
	if words, err := d.Words(); err == nil {
		e.After = text(words)
	}
	if t, ok := d.Tiers(); ok {
		e.What, e.Before, e.After = "tiers", text(s.Tiers.Tiers), text(t.Tiers)
	} else if p := d.Promotions(); len(p) > 0 {
		e.What, e.Tier, e.Before, e.After = "promote", p[0].Tier, text(selected(s, p[0].Tier)), text(p)
	}
	return r.audited(e, func() error {
		repo := r.repository(now)
		if err := repo.PutTargets(targets...); err != nil {
			return err
		}
		res, err := repo.Complete(ctx, d.Metadata, own, now)
		if err != nil {
			return err
		}
		if err := r.remember(res); err != nil {
			return err
		}
		_, err = r.update(ctx, now)
		return err
	})
}

// selected is what a tier runs, for the record.
func selected(s rollout.State, tier string) []string {
	var out []string
	for _, x := range s.Selections {
		if x.Tier == tier {
			out = append(out, x.Target)
		}
	}
	return out
}

// rehearse completes a draft in a copy of the metadata, and asks the client
// that machines have.
func (r *Repo) rehearse(ctx context.Context, d *rolloutdraft.Draft, own tufrepo.Keys, now time.Time) error {
	dir, err := os.MkdirTemp("", "klatch-rollout-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // scratch
	if err := os.CopyFS(filepath.Join(dir, "r", "metadata"), os.DirFS(filepath.Join(r.dir, "metadata"))); err != nil {
		return err
	}
	repo := r.repository(now)
	repo.Dir = filepath.Join(dir, "r")
	if _, err := repo.Complete(ctx, d.Metadata, own, now); err != nil {
		return err
	}
	_, err = tufclient.Refresh(ctx, tufclient.Config{
		Root: r.anchor.Root, Dir: filepath.Join(dir, "memory"), Now: now, Operator: &tufclient.Operator{Approvers: r.anchor.Profile.Approvers()},
		BaseURL: "file://localhost", Client: &http.Client{Transport: tufclient.DirTransport(repo.Dir)},
	})
	if err != nil {
		return fault.New(fault.Conflict, "machines_would_refuse", "machines would refuse the result: %w", err)
	}
	return nil
}
