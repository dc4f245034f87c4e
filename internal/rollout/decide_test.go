// SPDX-License-Identifier: Apache-2.0

package rollout_test

import (
	"errors"
	"maps"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	. "klatch/internal/rollout"
)

var (
	start  = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	stock  = build("6.1.0-50-cloud-amd64", 1)
	nearby = build("6.1.0-50-cloud-amd64", 2)
	good   = strings.Repeat("ab", 32)
	evil   = strings.Repeat("cd", 32)
)

func build(release string, id byte) kernel.Build {
	return kernel.Build{Distro: "debian-12", Arch: kernel.AMD64, Release: kernel.Release(release), ID: kernel.BuildID{id}}
}

func target(k kernel.Build, s livepatch.Sequence) string {
	return "debian-12/amd64/" + string(k.Release) + "/" + s.ModuleName() + ".lpb"
}

// world is both repositories and one machine. Tiers are canary, early (a day
// of soak) and stable (three days).
type world struct {
	t       *testing.T
	m       Machine
	now     time.Time
	patches map[string]Target
	rollout map[string]File
	broken  error // of every read of the rollout repository
}

func newWorld(t *testing.T, tier string) *world {
	w := &world{
		t: t, m: Machine{Tier: tier, Kernel: stock}, now: start,
		patches: map[string]Target{target(stock, 3): {target(stock, 3), 1000, good}}, rollout: map[string]File{},
	}
	w.put(RoleTargets, TiersPath, Tiers{TiersFormat, []Tier{{"canary", 0}, {"early", 24}, {"stable", 72}}})
	for _, tier := range []string{"canary", "early", "stable"} {
		w.put(RoleSelect, SelectPath(tier, stock.ID), selection(tier))
	}
	for _, tier := range []string{"early", "stable"} {
		w.put(RolePromotion, PromotionPath(tier, good), promotion(tier))
	}
	return w
}

func selection(tier string) Selection {
	return Selection{Format: SelectionFormat, Tier: tier, Kernel: stock, Sequence: 3, Target: target(stock, 3), Bytes: 1000, SHA256: good, Since: start.Add(-100 * time.Hour)}
}

// promotion is one whose soak of three days ends four hours before start.
func promotion(tier string) Promotion {
	return Promotion{Format: PromotionFormat, Tier: tier, Target: target(stock, 3), SHA256: good, Since: start.Add(-76 * time.Hour), PromotedAt: start.Add(-5 * time.Hour), Reason: "canaries are well"}
}

func (w *world) put(role, path string, v interface{ Encode() ([]byte, error) }) {
	w.t.Helper()
	b, err := v.Encode()
	if err != nil {
		w.t.Fatal(err)
	}
	w.rollout[path] = File{role, b}
}

func (w *world) view() View {
	missing := fault.New(fault.NotFound, "target_missing", "not in the signed list")
	return View{
		Patches: func(path string) (Target, error) {
			if t, ok := w.patches[path]; ok {
				return t, nil
			}
			return Target{}, missing
		},
		Rollout: func(path string, limit int64) (File, error) {
			f, ok := w.rollout[path]
			switch {
			case w.broken != nil:
				return File{}, w.broken
			case !ok:
				return File{}, missing
			case int64(len(f.Content)) > limit:
				return File{}, fault.New(fault.Untrusted, "metadata_malformed", "over the limit of %d", limit)
			}
			return f, nil
		},
	}
}

func (w *world) decide() (Choice, error) { return Decide(w.now, w.m, w.view()) }

func TestMachineTakesWhatBothWant(t *testing.T) {
	for _, tier := range []string{"canary", "early", "stable"} {
		c, err := newWorld(t, tier).decide()
		if err != nil || c.Class != Take || c.Target != target(stock, 3) || c.Sequence != 3 || c.SHA256 != good || c.Bytes != 1000 {
			t.Errorf("%s: %+v, %v", tier, c, err)
		}
	}
}

// TestAttackR: all of these are signed by the keys that they say, and none may
// end in a load. What a thief of the server cannot even sign is tested on the
// metadata (package rolloutrepo).
func TestAttackR(t *testing.T) {
	for _, tt := range []struct {
		name  string
		tier  string
		do    func(w *world)
		class Class
		code  fault.Code
	}{
		{"target absent in patches", "canary", func(w *world) { clear(w.patches) }, Stay, "target_not_released"},
		{"digest differs", "canary", func(w *world) {
			s := selection("canary")
			s.SHA256 = evil
			w.put(RoleSelect, SelectPath("canary", stock.ID), s)
		}, Quarantine, "repositories_disagree"},
		{"length differs", "canary", func(w *world) {
			s := selection("canary")
			s.Bytes++
			w.put(RoleSelect, SelectPath("canary", stock.ID), s)
		}, Quarantine, "repositories_disagree"},
		{"path differs in patches", "canary", func(w *world) {
			w.patches[target(stock, 3)] = Target{target(stock, 4), 1000, good}
		}, Quarantine, "repositories_disagree"},
		{"ring without promotion", "stable", func(w *world) { delete(w.rollout, PromotionPath("stable", good)) }, Stay, CodeNotPromoted},
		{"promoted to the tier before only", "stable", func(w *world) {
			w.rollout[PromotionPath("stable", good)] = w.rollout[PromotionPath("early", good)]
		}, Stay, "promotion_mismatch"},
		{"promotion for other digest", "stable", func(w *world) {
			p := promotion("stable")
			p.SHA256 = evil
			w.put(RolePromotion, PromotionPath("stable", good), p)
		}, Stay, "promotion_mismatch"},
		{"promotion for other target", "stable", func(w *world) {
			p := promotion("stable")
			p.Target = target(stock, 2)
			w.put(RolePromotion, PromotionPath("stable", good), p)
		}, Stay, "promotion_mismatch"},
		{"promotion signed by the online key", "stable", func(w *world) {
			w.put(RoleSelect, PromotionPath("stable", good), promotion("stable"))
		}, Stay, "rollout_role"},
		{"tiers signed by the online key", "stable", func(w *world) {
			w.put(RoleSelect, TiersPath, Tiers{TiersFormat, []Tier{{"stable", 0}}})
		}, Stay, "rollout_role"},
		{"selection signed by the approvers", "canary", func(w *world) {
			w.put(RolePromotion, SelectPath("canary", stock.ID), selection("canary"))
		}, Stay, "rollout_role"},
		{"soak not elapsed", "stable", func(w *world) {
			p := promotion("stable")
			p.Since = start.Add(-71 * time.Hour)
			w.put(RolePromotion, PromotionPath("stable", good), p)
		}, Stay, CodeSoaking},
		{"since in the selection is no soak", "stable", func(w *world) {
			p := promotion("stable")
			p.Since = p.PromotedAt
			w.put(RolePromotion, PromotionPath("stable", good), p)
			s := selection("stable")
			s.Since = start.Add(-10000 * time.Hour)
			w.put(RoleSelect, SelectPath("stable", stock.ID), s)
		}, Stay, CodeSoaking},
		{"promotion of tomorrow", "stable", func(w *world) {
			p := promotion("stable")
			p.PromotedAt, p.Urgent = start.Add(24*time.Hour), true
			w.put(RolePromotion, PromotionPath("stable", good), p)
		}, Stay, CodeSoaking},
		{"urgent unsigned", "stable", func(w *world) {
			// The server may write into its own list only.
			delete(w.rollout, PromotionPath("stable", good))
			b := w.rollout[SelectPath("stable", stock.ID)].Content
			w.rollout[SelectPath("stable", stock.ID)] = File{RoleSelect, []byte(strings.Replace(string(b), `"hold": false`, `"urgent": true,`+"\n "+`"hold": false`, 1))}
		}, Stay, "selection_malformed"},
		{"cohort spoof", "stable", func(w *world) {
			w.rollout[SelectPath("stable", stock.ID)] = w.rollout[SelectPath("canary", stock.ID)]
		}, Stay, "selection_mismatch"},
		{"other machine's entry", "canary", func(w *world) {
			s := selection("canary")
			s.Kernel = nearby
			w.put(RoleSelect, SelectPath("canary", stock.ID), s)
		}, Stay, "wrong_build"},
		{"wrong release", "canary", func(w *world) { w.m.Kernel.Release = "6.1.0-51-cloud-amd64" }, Stay, "wrong_release"},
		{"wrong arch", "canary", func(w *world) { w.m.Kernel.Arch = "arm64" }, Stay, "wrong_arch"},
		{"tier that the operator does not have", "production", func(*world) {}, Stay, "tier_unknown"},
		{"hold", "canary", func(w *world) {
			s := selection("canary")
			s.Hold, s.Reason = true, "the database team asks"
			w.put(RoleSelect, SelectPath("canary", stock.ID), s)
		}, Stay, CodeHeld},
		{"nothing selected", "canary", func(w *world) { delete(w.rollout, SelectPath("canary", stock.ID)) }, Stay, CodeNotSelected},
		{"list of tiers gone", "canary", func(w *world) { delete(w.rollout, TiersPath) }, Stay, "tiers_missing"},
		{"list of tiers without a meaning", "canary", func(w *world) { w.rollout[TiersPath] = File{RoleTargets, []byte(`{"format":"klatch-tiers/2"}`)} }, Halt, "tiers_malformed"},
		{"expired rollout", "canary", func(w *world) { w.broken = fault.New(fault.Untrusted, "metadata_expired", "timestamp expired") }, Stay, "metadata_expired"},
	} {
		t.Run("Attack/R/"+tt.name, func(t *testing.T) {
			w := newWorld(t, tt.tier)
			tt.do(w)
			c, err := w.decide()
			code := c.Code
			if err != nil {
				code = fault.CodeOf(err)
			}
			if c.Class != tt.class || code != tt.code {
				t.Errorf("class %q code %q, want %q %q: %+v, %v", c.Class, code, tt.class, tt.code, c, err)
			}
			if err == nil && c.Reason == "" {
				t.Error("waits without a reason")
			}
			if c.Class == Quarantine && c.SHA256 == "" {
				t.Error("quarantine of nothing")
			}
		})
	}
}

func TestSoakEndsAtItsTimeAndUrgentDoesNotWait(t *testing.T) {
	w := newWorld(t, "stable")
	p := promotion("stable")
	p.Since = start.Add(-10 * time.Hour)
	w.put(RolePromotion, PromotionPath("stable", good), p)
	opens := p.Since.Add(72 * time.Hour)
	for at, want := range map[time.Time]Class{start: Stay, opens.Add(-time.Second): Stay, opens: Take} {
		w.now = at
		if c, err := w.decide(); err != nil || c.Class != want || !c.Opens.Equal(opens) {
			t.Errorf("at %s: %+v, %v", at, c, err)
		}
	}
	p.Urgent = true
	w.put(RolePromotion, PromotionPath("stable", good), p)
	w.now = start
	if c, err := w.decide(); err != nil || c.Class != Take {
		t.Errorf("urgent: %+v, %v", c, err)
	}
}

// Whatever one file says, a tier after the first takes nothing that no
// promotion names: each byte of the online key's file may be of its owner's
// choice.
func TestNoSelectionOpensATierByItself(t *testing.T) {
	w := newWorld(t, "stable")
	path := SelectPath("stable", stock.ID)
	original := w.rollout[path].Content
	maps.DeleteFunc(w.rollout, func(p string, f File) bool { return f.Role == RolePromotion })
	for i := range original {
		for _, c := range []byte{0, ' ', '0', '9', '"', 'a', '}', 0x80} {
			b := []byte(string(original))
			b[i] = c
			w.rollout[path] = File{RoleSelect, b}
			if got, err := w.decide(); got.Class == Take {
				t.Fatalf("byte %d as %q: %+v, %v", i, c, got, err)
			}
		}
	}
}

// What the network says is not taken for an answer.
func TestAnUnreachableRepositoryIsAnErrorAndNoAbsence(t *testing.T) {
	w := newWorld(t, "stable")
	v := w.view()
	cut := errors.New("connection reset")
	v.Patches = func(string) (Target, error) { return Target{}, cut }
	if c, err := Decide(start, w.m, v); !errors.Is(err, cut) || c.Class != Stay {
		t.Errorf("%+v, %v", c, err)
	}
	for _, hidden := range []string{TiersPath, SelectPath("stable", stock.ID), PromotionPath("stable", good)} {
		v := w.view()
		all := v.Rollout
		v.Rollout = func(path string, limit int64) (File, error) {
			if path == hidden {
				return File{}, cut
			}
			return all(path, limit)
		}
		if c, err := Decide(start, w.m, v); !errors.Is(err, cut) || c.Class != Stay {
			t.Errorf("%s: %+v, %v", hidden, c, err)
		}
	}
}
