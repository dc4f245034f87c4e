// SPDX-License-Identifier: Apache-2.0

// Package opsim is a whole operator for tests: keys of people and of a server,
// a rollout anchor, and the operator's repository (package tufsim) with tiers,
// selections and promotions. Tests only.
package opsim

import (
	"crypto"
	"testing"
	"time"

	"klatch/internal/rollout"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/tufrepo"
)

// Operator signs whatever a test asks for. Root, targets and promotion are two
// of three keys each.
type Operator struct {
	*tufsim.Repo
	Anchor            *rollout.Anchor
	Select, Promotion []crypto.Signer
	t                 testing.TB
}

// New makes an operator of profile small with these tiers.
func New(t testing.TB, name string, now time.Time, tiers ...rollout.Tier) *Operator {
	t.Helper()
	o := &Operator{
		Repo: tufsim.New(t, name, now), t: t,
		Select: tufsim.Signers(name+"select", 1), Promotion: tufsim.Signers(name+"promotion", 3),
	}
	o.Anchor = &rollout.Anchor{Format: rollout.AnchorFormat, Operator: name, Profile: rollout.Small, Root: o.Root}
	o.Keys.Release.Signers = append(append(o.Keys.Release.Signers, o.Select...), o.Promotion...)
	p := tufrepo.Publication{
		Targets: []tufrepo.Target{o.target(rollout.TiersPath, rollout.Tiers{Format: rollout.TiersFormat, Tiers: tiers})},
		Operator: []tufrepo.OperatorRole{
			{Name: tufrepo.RoleSelect, Keys: public(o.Select), Threshold: 1},
			{Name: tufrepo.RolePromotion, Keys: public(o.Promotion), Threshold: 2},
		},
	}
	if _, err := tufrepo.Publish(t.Context(), o.Dir, p, o.Keys, now); err != nil {
		t.Fatal(err)
	}
	return o
}

func public(signers []crypto.Signer) []crypto.PublicKey {
	var out []crypto.PublicKey
	for _, s := range signers {
		out = append(out, s.Public())
	}
	return out
}

func (o *Operator) target(path string, v interface{ Encode() ([]byte, error) }) tufrepo.Target {
	o.t.Helper()
	b, err := v.Encode()
	if err != nil {
		o.t.Fatal(err)
	}
	return tufrepo.Target{Path: path, Content: b, Replace: true}
}

// Choose publishes a selection.
func (o *Operator) Choose(now time.Time, s rollout.Selection) {
	o.t.Helper()
	s.Format = rollout.SelectionFormat
	o.Publish(now, o.target(rollout.SelectPath(s.Tier, s.Kernel.ID), s))
}

// Promote publishes a promotion.
func (o *Operator) Promote(now time.Time, p rollout.Promotion) {
	o.t.Helper()
	p.Format = rollout.PromotionFormat
	o.Publish(now, o.target(rollout.PromotionPath(p.Tier, p.SHA256), p))
}

// Order replaces the tiers.
func (o *Operator) Order(now time.Time, tiers ...rollout.Tier) {
	o.t.Helper()
	o.Publish(now, o.target(rollout.TiersPath, rollout.Tiers{Format: rollout.TiersFormat, Tiers: tiers}))
}
