// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"

	"klatch/internal/fault"
	"klatch/internal/rollout"
	"klatch/internal/wire"
)

// Operator names who says what is wanted on this machine.
type Operator struct {
	Operator string          `json:"operator"`
	Profile  rollout.Profile `json:"profile"`
	Tier     string          `json:"tier"` // of this machine's own configuration
}

// operatorAnchor reads the operator's anchor; nil where none is installed. One
// that is there and cannot be believed is no reason to go without.
func (a *Agent) operatorAnchor() (*rollout.Anchor, error) {
	if a.cfg.Operator == nil {
		return nil, nil
	}
	o, err := a.cfg.Operator()
	if err != nil || o == nil {
		return nil, err
	}
	if a.cfg.Tier == "" {
		return nil, fault.New(fault.Conflict, "tier_unset", "a rollout anchor of %s is installed, and this machine has no tier", o.Operator).
			WithHint("name the tier in /etc/klatch/conf.d, such as: tier = \"canary\"; then systemctl restart klatchd")
	}
	return o, nil
}

// refreshRollout brings the operator's metadata up to date, by a root and in a
// memory of its own.
func (t *trial) refreshRollout(ctx context.Context) (err error) {
	if t.operator == nil {
		return nil
	}
	if t.rollout, err = t.cfg.Rollout.Refresh(ctx, t.operator, t.start); err != nil {
		if fault.CodeOf(err) == codeClock {
			return at(StepClock, err)
		}
		return err
	}
	v, signed := t.rollout.Metadata()
	if err := t.raiseFloor(t.start, signed, "rollout"); err != nil {
		return err
	}
	return t.sawVersions(func(s *wire.Seen) { s.Rollout = &v })
}

// choose finds what is meant for this machine: by the operator's signed
// selection, or, where no operator is believed, by the server.
func (t *trial) choose(ctx context.Context) error {
	if t.operator != nil {
		return t.chooseSelected(ctx)
	}
	t.reason = fault.Code(t.answer.Reason)
	if t.answer.Offer == nil {
		t.done = &Check{Result: resultCurrent, Code: t.reason, Text: leftOut(t.answer)}
		return nil
	}
	t.offer = *t.answer.Offer
	return nil
}

// decided is where package rollout's refusals stand in the order.
var decided = map[fault.Code]Step{
	"target_not_released": StepAgreement, "repositories_disagree": StepAgreement,
	"promotion_mismatch": StepTier, "promotion_malformed": StepTier,
}

// chooseSelected has package rollout decide. Tier and kernel are what this
// machine knows by itself; what the server answered is not asked.
func (t *trial) chooseSelected(ctx context.Context) error {
	c, err := rollout.Decide(t.start, rollout.Machine{Tier: t.cfg.Tier, Kernel: t.o.Facts.Kernel}, rollout.View{
		Patches: func(path string) (rollout.Target, error) { l, err := t.snapshot.Named(path); return l.Target, err },
		Rollout: func(path string, limit int64) (rollout.File, error) { return t.rollout.Read(ctx, path, limit) },
	})
	t.offer = wire.Offer{Target: c.Target, Sequence: c.Sequence}
	t.digests.Bundle = c.SHA256
	if err != nil {
		step, ok := decided[fault.CodeOf(err)]
		if !ok {
			step = StepSelection
		}
		return &refusal{step: step, class: Class(c.Class), err: err}
	}
	if c.Class != rollout.Take {
		t.done = &Check{Result: resultCurrent, Code: c.Code, Text: c.Reason}
	}
	t.reason = "selected"
	return nil
}

// ahead is for a machine that has what its tier is to run, or more: it was in
// an earlier tier before. It never goes back.
func (t *trial) ahead() *Check {
	loaded := t.o.loaded()
	switch {
	case t.operator == nil || loaded == 0 || t.offer.Sequence > loaded:
		return nil
	case t.offer.Sequence == loaded:
		return &Check{Result: resultCurrent, Code: "current"}
	}
	return &Check{Result: resultCurrent, Code: "ahead_of_tier", Text: fmt.Sprintf("tier %s is to run livepatch %d, and %d runs here", t.cfg.Tier, t.offer.Sequence, loaded)}
}
