// SPDX-License-Identifier: Apache-2.0

package agenttest

import (
	"context"
	"sync"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/rollout"
	"klatch/internal/wire"
)

// Operator is an operator's repository in memory: what it holds counts as
// verified. Tiers are canary and stable; stable soaks for a day.
type Operator struct {
	Anchor *rollout.Anchor
	t      testing.TB

	mu    sync.Mutex
	files map[string]rollout.File
	// Fail is the answer to the next refreshes.
	Fail error
	// Version is that of the top list.
	Version int64
}

// NewOperator makes one of profile lab.
func NewOperator(t testing.TB) *Operator {
	o := &Operator{t: t, files: map[string]rollout.File{}, Anchor: &rollout.Anchor{
		Format: rollout.AnchorFormat, Operator: "ops", Profile: rollout.Lab, Root: []byte("{}"),
	}}
	tiers := rollout.Tiers{Format: rollout.TiersFormat, Tiers: []rollout.Tier{{Name: "canary"}, {Name: "stable", SoakHours: 24}}}
	b, err := tiers.Encode()
	o.put(rollout.RoleTargets, rollout.TiersPath, b, err)
	return o
}

func (o *Operator) put(role, path string, b []byte, err error) {
	o.t.Helper()
	if err != nil {
		o.t.Fatal(err)
	}
	o.Put(path, rollout.File{Role: role, Content: b})
}

// Put puts any file under any name.
func (o *Operator) Put(path string, f rollout.File) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.files[path] = f
}

// Set changes how the repository behaves.
func (o *Operator) Set(f func(*Operator)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f(o)
}

// Select selects a livepatch that a publisher has for a tier; change may spoil
// the selection.
func (o *Operator) Select(tier string, p *Publisher, k kernel.Build, s livepatch.Sequence, change func(*rollout.Selection)) rollout.Selection {
	o.t.Helper()
	m := livepatch.Manifest{Kernel: k, Module: livepatch.Module{Name: s.ModuleName()}}
	sel := rollout.Selection{Format: rollout.SelectionFormat, Tier: tier, Kernel: k, Sequence: s, Target: m.TargetPath(), Since: time.Now().UTC().Truncate(time.Second)}
	if t, err := p.Named(sel.Target); err == nil {
		sel.Bytes, sel.SHA256 = t.Bytes, t.SHA256
	}
	if change != nil {
		change(&sel)
	}
	b, err := sel.Encode()
	o.put(rollout.RoleSelect, rollout.SelectPath(tier, k.ID), b, err)
	return sel
}

// Promote opens a tier for what is selected.
func (o *Operator) Promote(sel rollout.Selection, change func(*rollout.Promotion)) {
	o.t.Helper()
	now := time.Now().UTC().Truncate(time.Second)
	p := rollout.Promotion{Format: rollout.PromotionFormat, Tier: sel.Tier, Target: sel.Target, SHA256: sel.SHA256, Since: now, PromotedAt: now, Reason: "well"}
	if change != nil {
		change(&p)
	}
	b, err := p.Encode()
	o.put(rollout.RolePromotion, rollout.PromotionPath(sel.Tier, sel.SHA256), b, err)
}

// Refresh gives the repository as it is now.
func (o *Operator) Refresh(context.Context, *rollout.Anchor, time.Time) (agent.RolloutSnapshot, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o, o.Fail
}

// Read gets a file.
func (o *Operator) Read(_ context.Context, path string, _ int64) (rollout.File, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f, ok := o.files[path]
	if !ok {
		return f, fault.New(fault.NotFound, "target_missing", "target %q is not in the signed list", path)
	}
	return f, nil
}

// Metadata says which state this is.
func (o *Operator) Metadata() (v wire.Versions, signed time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return wire.Versions{Root: 1, Timestamp: 9, Snapshot: 1, Targets: o.Version}, signed
}
