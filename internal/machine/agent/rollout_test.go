// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/rollout"
)

// operated makes the world's machine one of a tier, and the server one that
// offers whatever is published, as a server in the wrong hands would.
func (w *world) operated(tier string) *agenttest.Operator {
	w.operator, w.tier = agenttest.NewOperator(w), tier
	return w.operator
}

// TestAttackRollout: what a server may not do to a machine that believes an
// operator. It offers the livepatch itself in each case; its word counts for
// nothing.
func TestAttackRollout(t *testing.T) {
	const canary, stable = "canary", "stable"
	for _, tt := range []struct {
		name  string
		tier  string
		step  agent.Step // "": it waits, and that is no refusal
		class agent.Class
		code  fault.Code
		evil  func(w *world, o *agenttest.Operator)
	}{
		{"R/offered and not selected", canary, "", "", "current", func(*world, *agenttest.Operator) {}},
		{"R/cohort spoof in the reply", stable, "", "", "current", func(w *world, o *agenttest.Operator) {
			o.Select(canary, w.pub, w.machine.Kernel, 5, nil)
			w.server.Set(func(s *agenttest.Server) { s.Reason = "you are in tier canary" })
		}},
		{"R/another tier's entry under this one's name", stable, agent.StepSelection, agent.Stay, "selection_mismatch", func(w *world, o *agenttest.Operator) {
			o.Select(canary, w.pub, w.machine.Kernel, 5, nil)
			f, err := o.Read(w.Context(), rollout.SelectPath(canary, w.machine.Kernel.ID), 0)
			if err != nil {
				w.Fatal(err)
			}
			o.Put(rollout.SelectPath(stable, w.machine.Kernel.ID), f)
		}},
		{"R/another kernel's entry under this one's name", canary, agent.StepSelection, agent.Stay, "wrong_build", func(w *world, o *agenttest.Operator) {
			k := w.machine.Kernel
			k.ID = kernel.BuildID{7}
			w.pub.Publish(k, 5)
			o.Select(canary, w.pub, k, 5, nil)
			f, err := o.Read(w.Context(), rollout.SelectPath(canary, k.ID), 0)
			if err != nil {
				w.Fatal(err)
			}
			o.Put(rollout.SelectPath(canary, w.machine.Kernel.ID), f)
		}},
		{"R/target absent in patches", canary, agent.StepAgreement, agent.Stay, "target_not_released", func(w *world, o *agenttest.Operator) {
			sel := o.Select(canary, w.pub, w.machine.Kernel, 5, nil)
			w.pub.Withdraw(sel.Target)
		}},
		{"R/digest differs", canary, agent.StepAgreement, agent.Quarantine, "repositories_disagree", func(w *world, o *agenttest.Operator) {
			o.Select(canary, w.pub, w.machine.Kernel, 5, func(s *rollout.Selection) { s.SHA256 = s.SHA256[1:] + "0" })
		}},
		{"R/length differs", canary, agent.StepAgreement, agent.Quarantine, "repositories_disagree", func(w *world, o *agenttest.Operator) {
			o.Select(canary, w.pub, w.machine.Kernel, 5, func(s *rollout.Selection) { s.Bytes++ })
		}},
		{"R/ring without promotion", stable, "", "", rollout.CodeNotPromoted, func(w *world, o *agenttest.Operator) {
			o.Select(stable, w.pub, w.machine.Kernel, 5, nil)
		}},
		{"R/promotion signed by the server", stable, agent.StepSelection, agent.Stay, "rollout_role", func(w *world, o *agenttest.Operator) {
			sel := o.Select(stable, w.pub, w.machine.Kernel, 5, nil)
			o.Promote(sel, nil)
			path := rollout.PromotionPath(stable, sel.SHA256)
			f, err := o.Read(w.Context(), path, 0)
			if err != nil {
				w.Fatal(err)
			}
			f.Role = rollout.RoleSelect
			o.Put(path, f)
		}},
		{"R/promotion for other digest", stable, agent.StepTier, agent.Stay, "promotion_mismatch", func(w *world, o *agenttest.Operator) {
			sel := o.Select(stable, w.pub, w.machine.Kernel, 5, nil)
			o.Promote(sel, func(p *rollout.Promotion) { p.SHA256 = p.SHA256[1:] + "0" })
		}},
		{"R/soak not elapsed", stable, "", "", rollout.CodeSoaking, func(w *world, o *agenttest.Operator) {
			o.Promote(o.Select(stable, w.pub, w.machine.Kernel, 5, nil), nil)
		}},
		{"R/hold", canary, "", "", rollout.CodeHeld, func(w *world, o *agenttest.Operator) {
			o.Select(canary, w.pub, w.machine.Kernel, 5, func(s *rollout.Selection) { s.Hold, s.Reason = true, "we look at it" })
		}},
		{"R/expired rollout", canary, agent.StepRollout, agent.Stay, "metadata_expired", func(w *world, o *agenttest.Operator) {
			o.Select(canary, w.pub, w.machine.Kernel, 5, nil)
			o.Set(func(o *agenttest.Operator) {
				o.Fail = fault.New(fault.Untrusted, "metadata_expired", "operator's repository: timestamp is expired")
			})
		}},
		{"R/tiers that nobody can read", canary, agent.StepSelection, agent.Stop, "tiers_malformed", func(w *world, o *agenttest.Operator) {
			o.Select(canary, w.pub, w.machine.Kernel, 5, nil)
			o.Put(rollout.TiersPath, rollout.File{Role: rollout.RoleTargets, Content: []byte("{}")})
		}},
		{"R/level lower than what runs", canary, "", "", "ahead_of_tier", func(w *world, o *agenttest.Operator) {
			w.pub.Publish(w.machine.Kernel, 2)
			o.Select(canary, w.pub, w.machine.Kernel, 2, nil)
		}},
		{"R/selected and recalled", canary, agent.StepForward, agent.Quarantine, "recalled", func(w *world, o *agenttest.Operator) {
			o.Select(canary, w.pub, w.machine.Kernel, 5, nil)
			w.pub.Recall(recalls(w, 1))
		}},
	} {
		t.Run("Attack/"+tt.name, func(t *testing.T) {
			t.Parallel()
			inWorld(t, func(w *world) {
				o := w.operated(tt.tier)
				w.publish(3)
				o.Promote(o.Select(tt.tier, w.pub, w.machine.Kernel, 3, nil), func(p *rollout.Promotion) { p.Urgent = true })
				w.start()
				w.within(20*time.Minute, "confirmed")
				w.publish(5) // the server offers it from now on
				tt.evil(w, o)
				time.Sleep(5 * time.Hour)
				s := w.agent.Status(w.Context())
				if s.Check.Code != tt.code || s.Check.Class != tt.class || s.Check.Step != tt.step {
					w.Errorf("check %+v, want code %s at step %q, class %q", s.Check, tt.code, tt.step, tt.class)
				}
				if n := w.machine.Loads(); n != 1 || s.State.Sequence != 3 {
					w.Errorf("%d loads, state %+v", n, s.State)
				}
				if (tt.step != "") != s.Act {
					w.Errorf("a person must act: %t", s.Act)
				}
			})
		})
	}
}

// TestAMachineFollowsItsTier: the first tier at once, the second after its soak.
func TestAMachineFollowsItsTier(t *testing.T) {
	inWorld(t, func(w *world) {
		o := w.operated("canary")
		w.pub.Publish(w.machine.Kernel, 1)
		o.Select("canary", w.pub, w.machine.Kernel, 1, nil)
		w.start()
		w.within(20*time.Minute, "confirmed")
		s := w.agent.Status(w.Context())
		if s.Rollout == nil || s.Rollout.Tier != "canary" || s.State.Seen == nil || s.State.Seen.Rollout == nil || s.State.Seen.Rollout.Timestamp != 9 || s.State.Seen.Patches == nil {
			w.Errorf("rollout %+v, seen %+v", s.Rollout, s.State.Seen)
		}
		w.stop()
		w.tier = "stable"
		w.start()
		w.pub.Publish(w.machine.Kernel, 2)
		o.Promote(o.Select("stable", w.pub, w.machine.Kernel, 2, nil), nil)
		time.Sleep(20 * time.Hour)
		w.wantState("confirmed", "")
		if s := w.agent.Status(w.Context()); s.State.Sequence != 1 || s.Check.Code != rollout.CodeSoaking {
			w.Errorf("before the soak is over: %+v, %+v", s.State, s.Check)
		}
		time.Sleep(10 * time.Hour)
		if s := w.state(); s.State != "confirmed" || s.Sequence != livepatch.Sequence(2) {
			w.Errorf("after it: %+v", s)
		}
	})
}

// TestARolloutAnchorIsNotIgnored: without a tier, or with an anchor that cannot
// be believed, the machine does not fall back to the server's word.
func TestARolloutAnchorIsNotIgnored(t *testing.T) {
	for name, spoil := range map[string]func(*world) fault.Code{
		"no tier": func(w *world) fault.Code { w.operated(""); return "tier_unset" },
		"not believed": func(w *world) fault.Code {
			w.operated("canary")
			w.notOperator = fault.New(fault.Untrusted, "rollout_anchor_malformed", "rollout_anchor: not in its one form")
			return "rollout_anchor_malformed"
		},
		"a tier that the operator does not have": func(w *world) fault.Code { w.operated("gamma"); return "tier_unknown" },
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				code := spoil(w)
				w.publish(1)
				w.start()
				time.Sleep(5 * time.Hour)
				w.wantState("check_failed", code)
				if w.machine.Loads() != 0 {
					w.Error("loaded all the same")
				}
			})
		})
	}
}

// TestTiersThatAreRepairedEndTheHalt: the operator's people signed nonsense, and
// then a newer list.
func TestTiersThatAreRepairedEndTheHalt(t *testing.T) {
	inWorld(t, func(w *world) {
		o := w.operated("canary")
		good, err := o.Read(w.Context(), rollout.TiersPath, 0)
		if err != nil {
			w.Fatal(err)
		}
		w.publish(1)
		o.Select("canary", w.pub, w.machine.Kernel, 1, nil)
		o.Put(rollout.TiersPath, rollout.File{Role: rollout.RoleTargets, Content: []byte("{}")})
		w.start()
		w.within(3*time.Hour, "halted")
		o.Put(rollout.TiersPath, good) // the same version again is nobody's word
		time.Sleep(5 * time.Hour)
		w.wantState("halted", "tiers_malformed")
		o.Set(func(o *agenttest.Operator) { o.Version++ })
		w.within(3*time.Hour, "confirmed")
	})
}
