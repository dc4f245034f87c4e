// SPDX-License-Identifier: Apache-2.0

package rollout_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	. "klatch/internal/rollout"
)

var three = Tiers{TiersFormat, []Tier{{"canary", 0}, {"early", 24}, {"stable", 72}}}

func release(k kernel.Build, s livepatch.Sequence) Release {
	return Release{k, s, target(k, s), 1000 + int64(s), fmt.Sprintf("%s%02x%02x", strings.Repeat("0", 60), k.ID[0], byte(s))}
}

func promote(r Release, tier string, since time.Time) Promotion {
	return Promotion{Format: PromotionFormat, Tier: tier, Target: r.Target, SHA256: r.SHA256, Since: since, PromotedAt: since, Reason: "well"}
}

func short(list []Selection) string {
	var out []string
	for _, s := range list {
		word := fmt.Sprintf("%s:%d/%d", s.Tier, s.Kernel.ID[0], s.Sequence)
		if s.Hold {
			word += "!"
		}
		out = append(out, word)
	}
	return strings.Join(out, " ")
}

func TestNewLivepatchesLandInTheFirstTier(t *testing.T) {
	other := build("6.1.0-51-cloud-amd64", 9)
	all := []Release{release(stock, 1), release(stock, 2), release(other, 1)}
	s := State{Tiers: three}
	if got := short(Wanted(start, all, s)); got != "canary:1/2 canary:9/1" {
		t.Errorf("nothing promoted: %s", got)
	}
	s.Promotions = []Promotion{promote(all[0], "early", start.Add(-24*time.Hour)), promote(all[1], "early", start.Add(-23*time.Hour)), promote(all[2], "stable", start)}
	if got := short(Wanted(start, all, s)); got != "canary:1/2 canary:9/1 early:1/1" {
		t.Errorf("one of three is open: %s", got)
	}
	if got := short(Wanted(start.Add(time.Hour), all, s)); got != "canary:1/2 canary:9/1 early:1/2" {
		t.Errorf("an hour later: %s", got)
	}
	if got := short(Wanted(start.Add(72*time.Hour), all[:1], s)); got != "canary:1/1 early:1/1" {
		t.Errorf("two withdrawn: %s", got)
	}
	s.Tiers = Tiers{TiersFormat, []Tier{{"early", 0}, {"canary", 0}}}
	if got := short(Wanted(start, all, s)); got != "early:1/2 early:9/1" {
		t.Errorf("another order: %s", got)
	}
}

func TestHeldTierKeepsWhatItHad(t *testing.T) {
	s := State{Tiers: three}
	s.Selections = Wanted(start, []Release{release(stock, 1)}, s)
	s.Holds = map[string]string{"canary": "freeze"}
	later := start.Add(5 * time.Hour)
	got := Wanted(later, []Release{release(stock, 1), release(stock, 2), release(nearby, 1)}, s)
	if short(got) != "canary:1/1!" || got[0].Reason != "freeze" || !got[0].Since.Equal(start) {
		t.Errorf("%s %+v", short(got), got)
	}
	s.Selections, s.Holds = got, nil
	got = Wanted(later, []Release{release(stock, 1), release(stock, 2)}, s)
	if short(got) != "canary:1/2" || !got[0].Since.Equal(later) || got[0].Reason != "" {
		t.Errorf("released: %s %+v", short(got), got)
	}
	s.Holds = map[string]string{"canary": "freeze"}
	if got := Wanted(later, nil, s); len(got) != 0 {
		t.Errorf("what its publisher withdrew is no longer selected: %s", short(got))
	}
}

func TestCandidatesAreWhatTheTierBeforeRuns(t *testing.T) {
	s := State{Tiers: three}
	one, two := release(stock, 1), release(nearby, 7)
	s.Selections = Wanted(start, []Release{one, two}, s)
	if got := short(s.Candidates("early")); got != "canary:1/1 canary:2/7" {
		t.Errorf("early: %s", got)
	}
	s.Promotions = []Promotion{promote(one, "early", start)}
	if got := short(s.Candidates("early")); got != "canary:2/7" {
		t.Errorf("early, one promoted: %s", got)
	}
	if len(s.Candidates("canary"))+len(s.Candidates("stable"))+len(s.Candidates("nobody")) != 0 {
		t.Error("candidates for the first tier, for one whose tier before has nothing, or for none")
	}
}

// Whatever is released, promoted, held and chosen before: a server selects
// only what is released, and a machine that asks both takes only what is.
func TestServerAndMachineAgree(t *testing.T) {
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 7))
		anyRelease := func() Release {
			return release([]kernel.Build{stock, build("6.1.0-51-cloud-amd64", 9)}[r.IntN(2)], livepatch.Sequence(1+r.IntN(4)))
		}
		var all []Release
		for range r.IntN(7) {
			all = append(all, anyRelease())
		}
		s := State{Tiers: three, Holds: map[string]string{}}
		for range r.IntN(9) {
			p := promote(anyRelease(), three.Tiers[r.IntN(3)].Name, start.Add(time.Duration(r.IntN(200)-100)*time.Hour))
			p.Urgent = r.IntN(2) == 0
			s.Promotions = slices.DeleteFunc(s.Promotions, func(q Promotion) bool { return q.Tier == p.Tier && q.SHA256 == p.SHA256 })
			s.Promotions = append(s.Promotions, p)
		}
		now := start
		for range 3 {
			delete(s.Holds, "early")
			if r.IntN(3) == 0 {
				s.Holds["early"] = "freeze"
			}
			now = now.Add(time.Duration(r.IntN(50)) * time.Hour)
			s.Selections = Wanted(now, all, s)
			for _, x := range s.Selections {
				if !slices.Contains(all, Release{x.Kernel, x.Sequence, x.Target, x.Bytes, x.SHA256}) {
					t.Fatalf("seed %d: selects %+v, which is not released", seed, x)
				}
				for _, y := range all {
					if x.Tier == "canary" && y.Kernel == x.Kernel && y.Sequence > x.Sequence {
						t.Fatalf("seed %d: %+v is not the newest in the first tier", seed, x)
					}
				}
				checkMachine(t, now, x, all, s)
			}
		}
	}
}

func checkMachine(t *testing.T, now time.Time, x Selection, all []Release, s State) {
	missing := fault.New(fault.NotFound, "target_missing", "missing")
	file := func(role string, v interface{ Encode() ([]byte, error) }) (File, error) {
		b, err := v.Encode()
		return File{role, b}, err
	}
	v := View{
		Patches: func(path string) (Target, error) {
			for _, r := range all {
				if r.Target == path {
					return Target{r.Target, r.Bytes, r.SHA256}, nil
				}
			}
			return Target{}, missing
		},
		Rollout: func(path string, _ int64) (File, error) {
			if path == TiersPath {
				return file(RoleTargets, s.Tiers)
			}
			for _, y := range s.Selections {
				if path == SelectPath(y.Tier, y.Kernel.ID) {
					return file(RoleSelect, y)
				}
			}
			for _, p := range s.Promotions {
				if path == PromotionPath(p.Tier, p.SHA256) {
					return file(RolePromotion, p)
				}
			}
			return File{}, missing
		},
	}
	c, err := Decide(now, Machine{x.Tier, x.Kernel}, v)
	promoted := x.Tier == "canary" || slices.ContainsFunc(s.Promotions, func(p Promotion) bool {
		return p.Tier == x.Tier && p.SHA256 == x.SHA256 && !now.Before(p.PromotedAt)
	})
	if err != nil || c.Class == Take && (x.Hold || !promoted) || c.Class == Quarantine || c.Class == Halt {
		t.Fatalf("machine in %s decides %+v, %v for %+v", x.Tier, c, err, x)
	}
}
