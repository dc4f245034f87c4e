// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"slices"

	"klatch/internal/fault"
)

// Add puts a new tier at a place; 0 is the first, and anything beyond the end
// is the end.
func (t Tiers) Add(tier Tier, at int) (Tiers, error) {
	if t.Index(tier.Name) >= 0 {
		return t, fault.New(fault.Conflict, "tier_exists", "tier %s is there already", tier.Name).WithHint("klatch-fleet tier list")
	}
	return t.with(slices.Insert(slices.Clone(t.Tiers), min(max(at, 0), len(t.Tiers)), tier))
}

// Move puts a tier at another place.
func (t Tiers) Move(name string, at int) (Tiers, error) {
	i := t.Index(name)
	if i < 0 {
		return t, noTier(name)
	}
	list := slices.Delete(slices.Clone(t.Tiers), i, i+1)
	return t.with(slices.Insert(list, min(max(at, 0), len(list)), t.Tiers[i]))
}

// Soaks sets how long a livepatch must have been in the tier before.
func (t Tiers) Soaks(name string, hours int) (Tiers, error) {
	i := t.Index(name)
	if i < 0 {
		return t, noTier(name)
	}
	if i == 0 && hours != 0 {
		return t, fault.New(fault.Invalid, "first_tier_soaks", "tier %s is the first: nothing is before it", name)
	}
	list := slices.Clone(t.Tiers)
	list[i].SoakHours = hours
	return t.with(list)
}

// Remove takes a tier out.
func (t Tiers) Remove(name string) (Tiers, error) {
	i := t.Index(name)
	if i < 0 {
		return t, noTier(name)
	}
	if len(t.Tiers) == 1 {
		return t, fault.New(fault.Conflict, "last_tier", "tier %s is the only one", name).WithHint("add another first: klatch-fleet tier add")
	}
	return t.with(slices.Delete(slices.Clone(t.Tiers), i, i+1))
}

// with is a list in which whatever is first soaks no more.
func (t Tiers) with(list []Tier) (Tiers, error) {
	list[0].SoakHours = 0
	next := Tiers{TiersFormat, list}
	if err := next.validate(); err != nil {
		return t, fault.New(fault.Invalid, "bad_tiers", "tiers: %w", err)
	}
	return next, nil
}

func noTier(name string) error {
	return fault.New(fault.NotFound, "no_tier", "there is no tier %.60q", name).WithHint("klatch-fleet tier list")
}
