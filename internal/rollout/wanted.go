// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

// Release is one livepatch that the publisher offers.
type Release struct {
	Kernel   kernel.Build
	Sequence livepatch.Sequence
	Target   string
	Bytes    int64
	SHA256   string
}

// State is what the operator's repository says now, besides what it selects,
// and what the server was told.
type State struct {
	Tiers      Tiers
	Promotions []Promotion
	Holds      map[string]string // tier to reason
	Selections []Selection       // in force
}

// Wanted is what a server selects: for each tier and kernel build the highest
// sequence that is open there, by tier and path. New livepatches so land in
// the first tier. A tier on hold keeps what it had: nothing soaks while nobody
// runs it.
func Wanted(now time.Time, released []Release, s State) []Selection {
	var out []Selection
	for place, tier := range s.Tiers.Tiers {
		reason, held := s.Holds[tier.Name]
		best := map[kernel.BuildID]Release{}
		for _, r := range released {
			if old := s.selection(tier.Name, r.Kernel.ID); held && (old == nil || old.Target != r.Target || old.SHA256 != r.SHA256) {
				continue
			}
			if !held && place > 0 && !s.open(now, tier, r) {
				continue
			}
			if r.Sequence > best[r.Kernel.ID].Sequence {
				best[r.Kernel.ID] = r
			}
		}
		for _, r := range best {
			want := Selection{
				Format: SelectionFormat, Tier: tier.Name, Kernel: r.Kernel, Sequence: r.Sequence, Target: r.Target, Bytes: r.Bytes, SHA256: r.SHA256,
				Since: now.UTC().Truncate(time.Second), Hold: held, Reason: reason,
			}
			if old := s.selection(tier.Name, r.Kernel.ID); old != nil && old.SHA256 == r.SHA256 {
				want.Since = old.Since
			}
			out = append(out, want)
		}
	}
	slices.SortFunc(out, func(a, b Selection) int {
		return cmp.Or(cmp.Compare(s.Tiers.Index(a.Tier), s.Tiers.Index(b.Tier)), strings.Compare(a.Target, b.Target), strings.Compare(a.Kernel.ID.String(), b.Kernel.ID.String()))
	})
	return out
}

func (s State) selection(tier string, id kernel.BuildID) *Selection {
	i := slices.IndexFunc(s.Selections, func(x Selection) bool { return x.Tier == tier && x.Kernel.ID == id })
	if i < 0 {
		return nil
	}
	return &s.Selections[i]
}

func (s State) open(now time.Time, tier Tier, r Release) bool {
	return slices.ContainsFunc(s.Promotions, func(p Promotion) bool {
		return p.Tier == tier.Name && p.SHA256 == r.SHA256 && p.Target == r.Target && !now.Before(p.Opens(tier))
	})
}

// Promoted says whether a bundle is promoted to a tier, open or not.
func (s State) Promoted(tier, target, sha256 string) bool {
	return slices.ContainsFunc(s.Promotions, func(p Promotion) bool {
		return p.Tier == tier && p.Target == target && p.SHA256 == sha256
	})
}

// Candidates are the selections of the tier before that can be promoted to a
// tier: those that are not yet.
func (s State) Candidates(tier string) []Selection {
	place := s.Tiers.Index(tier)
	if place < 1 {
		return nil
	}
	var out []Selection
	for _, x := range s.Selections {
		if x.Tier == s.Tiers.Tiers[place-1].Name && !s.Promoted(tier, x.Target, x.SHA256) {
			out = append(out, x)
		}
	}
	return out
}
