// SPDX-License-Identifier: Apache-2.0

package api

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"net/http"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/rollout"
	"klatch/internal/server/adminapi"
	"klatch/internal/server/audit"
	"klatch/internal/server/repo"
	"klatch/internal/server/rolloutdraft"
	"klatch/internal/server/rolloutrepo"
	"klatch/internal/server/store"
	"klatch/internal/tufrepo"
)

func (a *API) rolloutFile(w http.ResponseWriter, r *http.Request) error {
	if a.Rollout == nil {
		return noRollout()
	}
	http.StripPrefix("/rollout", repo.Files(a.Rollout.Dir())).ServeHTTP(w, r)
	return nil
}

func noRollout() error {
	return fault.New(fault.NotFound, "no_rollout", "this server has no operator's repository").
		WithHint("make one on the server: klatch-server rollout init --operator NAME --profile lab|small|full, then restart it")
}

func (a *API) rollout(w http.ResponseWriter, r *http.Request) error {
	if a.Rollout == nil {
		return noRollout()
	}
	s, err := a.Rollout.State()
	if err != nil {
		return err
	}
	look, err := tufrepo.Look(a.Rollout.Dir())
	if err != nil {
		return err
	}
	count, err := a.machinesByTier(r)
	if err != nil {
		return err
	}
	anchor := a.Rollout.Anchor()
	out := adminapi.Rollout{Version: adminapi.Version, Operator: anchor.Operator, Profile: anchor.Profile, Upstream: a.Rollout.Above(), Tiers: tiers(s, count, a.Now()), Roles: []adminapi.Role{}}
	for _, role := range look.Roles {
		one := adminapi.Role{Name: role.Name, Version: role.Version, Expires: role.Expires, Threshold: role.Threshold, Due: role.Expires.Sub(a.Now()) < role.Life/2}
		for _, k := range role.Keys {
			one.Keys = append(one.Keys, k.ID)
		}
		out.Roles = append(out.Roles, one)
	}
	return answer(w, out)
}

func tiers(s rollout.State, machines map[string]int, now time.Time) []adminapi.Tier {
	out := []adminapi.Tier{}
	for _, t := range s.Tiers.Tiers {
		one := adminapi.Tier{
			Name: t.Name, SoakHours: t.SoakHours, Hold: s.Holds[t.Name], Machines: machines[t.Name],
			Selected: []rollout.Selection{}, Waiting: append([]rollout.Selection{}, s.Candidates(t.Name)...), Soaking: []adminapi.Soaking{},
		}
		for _, x := range s.Selections {
			if x.Tier == t.Name {
				one.Selected = append(one.Selected, x)
			}
		}
		for _, p := range s.Promotions {
			if p.Tier == t.Name && now.Before(p.Opens(t)) {
				one.Soaking = append(one.Soaking, adminapi.Soaking{Target: p.Target, Opens: p.Opens(t)})
			}
		}
		out = append(out, one)
	}
	return out
}

func (a *API) machinesByTier(r *http.Request) (map[string]int, error) {
	count := map[string]int{}
	for after := ""; ; {
		page, err := a.Store.Machines(r.Context(), after, store.MaxPage)
		if err != nil {
			return nil, err
		}
		for _, m := range page {
			count[m.Tier]++
			after = m.ID
		}
		if len(page) < store.MaxPage {
			return count, nil
		}
	}
}

// knownTier refuses a tier that the operator does not have: its machines would
// get nothing.
func (a *API) knownTier(tier string) error {
	if a.Rollout == nil {
		return nil
	}
	s, err := a.Rollout.State()
	if err == nil && s.Tiers.Index(tier) < 0 {
		err = fault.New(fault.NotFound, "no_tier", "there is no tier %.60q", tier).WithHint("klatch-fleet tier list; name one of them: --tier NAME")
	}
	return err
}

// order reads the body of a change to the operator's repository.
func (a *API) order(r *http.Request, v any) error {
	if a.Rollout == nil {
		return noRollout()
	}
	if err := a.Rollout.Local(); err != nil {
		return err
	}
	if err := jsonBody(r); err != nil {
		return err
	}
	return read(r, v)
}

// who is all that is known of a person: the token, and what they say.
func who(by string) string {
	by = strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f {
			return '?'
		}
		return c
	}, by)
	if by == "" {
		return "admin token"
	}
	return "admin token, says to be " + by[:min(len(by), 100)]
}

func outcome(w http.ResponseWriter, o rolloutrepo.Outcome) error {
	out := adminapi.RolloutAnswer{Version: adminapi.Version, InForce: o.Draft == nil}
	if o.Draft != nil {
		b, err := o.Draft.Encode()
		if err != nil {
			return err
		}
		out.Draft = b
	}
	return answer(w, out)
}

func (a *API) orderTiers(w http.ResponseWriter, r *http.Request) error {
	var o adminapi.TierOrder
	if err := a.order(r, &o); err != nil {
		return err
	}
	place := o.Place - 1
	if place < 0 {
		place = rollout.MaxTiers
	}
	var change func(rollout.Tiers) (rollout.Tiers, error)
	switch o.Op {
	case adminapi.TierAdd:
		change = func(t rollout.Tiers) (rollout.Tiers, error) {
			return t.Add(rollout.Tier{Name: o.Name, SoakHours: o.SoakHours}, place)
		}
	case adminapi.TierMove:
		change = func(t rollout.Tiers) (rollout.Tiers, error) { return t.Move(o.Name, place) }
	case adminapi.TierSoak:
		change = func(t rollout.Tiers) (rollout.Tiers, error) { return t.Soaks(o.Name, o.SoakHours) }
	case adminapi.TierRemove:
		change = func(t rollout.Tiers) (rollout.Tiers, error) { return t.Remove(o.Name) }
		count, err := a.machinesByTier(r)
		if err != nil {
			return err
		}
		if n := count[o.Name]; n > 0 && !o.Force {
			return fault.New(fault.Conflict, "tier_in_use", "%d machines are in tier %s", n, o.Name).
				WithHint("they would get nothing new: enroll them in another tier first, or say --force")
		}
	default:
		return fault.New(fault.Invalid, "bad_body", "op %.40q is none of add, move, soak and remove", o.Op)
	}
	got, err := a.Rollout.Order(r.Context(), who(o.By), change, o.Reason, a.Now())
	if err != nil {
		return err
	}
	return outcome(w, got)
}

func (a *API) promote(w http.ResponseWriter, r *http.Request) error {
	var o adminapi.Promotion
	if err := a.order(r, &o); err != nil {
		return err
	}
	got, err := a.Rollout.Promote(r.Context(), who(o.By), rolloutrepo.Promotion{Tier: o.Tier, Targets: o.Targets, All: o.All, Urgent: o.Urgent, Reason: o.Reason}, a.Now())
	if err != nil {
		return err
	}
	return outcome(w, got)
}

func (a *API) hold(w http.ResponseWriter, r *http.Request) error {
	var o adminapi.Hold
	if err := a.order(r, &o); err != nil {
		return err
	}
	if err := a.Rollout.Hold(r.Context(), who(o.By), o.Tier, o.Reason, a.Now()); err != nil {
		return err
	}
	return outcome(w, rolloutrepo.Outcome{})
}

func (a *API) orderKeys(w http.ResponseWriter, r *http.Request) error {
	var o adminapi.KeyOrder
	if err := a.order(r, &o); err != nil {
		return err
	}
	c := tufrepo.Change{Reason: o.Reason, Renew: o.Renew}
	if o.Role != "" {
		c.Add, c.Remove, c.Threshold = map[string][]crypto.PublicKey{}, map[string][]string{o.Role: o.Remove}, map[string]int{o.Role: o.Threshold}
	}
	if o.Role == "" && len(o.Add) > 0 {
		return fault.New(fault.Invalid, "no_role", "keys to add, and no role")
	}
	for _, text := range o.Add {
		block, _ := pem.Decode([]byte(text))
		if block == nil {
			return fault.New(fault.Invalid, "bad_key", "a key to add is not a public key in PEM")
		}
		key, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return fault.New(fault.Invalid, "bad_key", "a key to add: %w", err)
		}
		c.Add[o.Role] = append(c.Add[o.Role], key)
	}
	got, err := a.Rollout.Keys(r.Context(), who(o.By), c, a.Now())
	if err != nil {
		return err
	}
	return outcome(w, got)
}

func (a *API) completeDraft(w http.ResponseWriter, r *http.Request) error {
	var o adminapi.Completion
	if err := a.order(r, &o); err != nil {
		return err
	}
	d, err := rolloutdraft.Parse(o.Draft)
	if err != nil {
		return err
	}
	if err := a.Rollout.Complete(r.Context(), who(o.By), d, a.Now()); err != nil {
		return err
	}
	return outcome(w, rolloutrepo.Outcome{})
}

func (a *API) audit(w http.ResponseWriter, r *http.Request) error {
	if a.Rollout == nil {
		return noRollout()
	}
	limit, err := number(r, "limit")
	if err != nil {
		return err
	}
	entries, broken, err := a.Rollout.Record().Last(store.Clamp(int(min(limit, store.MaxPage))))
	if err != nil {
		return err
	}
	return answer(w, adminapi.Audit{Version: adminapi.Version, Broken: broken, Entries: append([]audit.Entry{}, entries...)})
}
