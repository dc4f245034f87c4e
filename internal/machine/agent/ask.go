// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"klatch/internal/fault"
	"klatch/internal/machine/advice"
	"klatch/internal/machine/bootkeys"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/tracer"
	"klatch/internal/trust"
	"klatch/internal/wire"
)

// Status is everything that can be told about this machine, version 1: the
// promise of klatch status --json.
type Status struct {
	Version  int        `json:"version"`
	State    wire.State `json:"state"`
	Act      bool       `json:"act"` // a person must do the next step
	At       time.Time  `json:"at"`
	Since    time.Time  `json:"since,omitzero"` // of the phase
	Facts    wire.Facts `json:"facts"`
	Identity *Identity  `json:"identity"` // null: not enrolled
	Trust    *Publisher `json:"trust"`    // null: no usable anchor
	// ModuleKey says whether the kernel will take the publisher's livepatches;
	// null: no usable anchor.
	ModuleKey *bootkeys.Verdict `json:"module_key"`
	// Rollout is who says what is wanted here; null: no operator is believed, and
	// the server chooses without tiers.
	Rollout *Operator `json:"rollout"`
	Check   Check     `json:"check"` // the last one
	// Halt says since when and why nothing is loaded; absent: nothing is halted.
	Halt *Halt `json:"halt,omitempty"`
	// Quarantine are the livepatches for this kernel build that are not fetched
	// again, the newest last.
	Quarantine []Quarantined `json:"quarantine,omitempty"`
	// Floor is the time that the clock may not be before; absent: none is known.
	Floor  *Floor            `json:"time_floor,omitempty"`
	Next   time.Time         `json:"next_check,omitzero"`
	Queued int               `json:"queued_reports"`
	Reboot advice.Advice     `json:"reboot"`
	Notice *Notice           `json:"notice"` // null: nothing is known of this kernel build
	Loader *loaderapi.Status `json:"loader"` // null: never reached
	// Blocking are the tasks that kept the last transition of the livepatch
	// under way from finishing, the worst first; Tracers is who else is attached
	// to the functions that it replaces.
	Blocking []Blocking      `json:"blocking,omitempty"`
	Tracers  []tracer.Tracer `json:"tracers,omitempty"`
	Problems []string        `json:"problems"` // what could not be found out, and why
}

// Publisher names whom the machine trusts.
type Publisher struct {
	Publisher string        `json:"publisher"`
	Profile   trust.Profile `json:"profile"`
}

// Status looks at the machine anew and tells what it sees.
func (a *Agent) Status(ctx context.Context) Status {
	o := a.observe(ctx)
	now := time.Now().UTC()
	a.mu.Lock()
	defer a.mu.Unlock()
	in := a.inputs(a.j, now)
	s := Status{
		Version: 1, State: describe(in), At: now, Since: a.j.Since, Facts: o.Facts,
		Check: a.j.Check, Next: a.next.UTC(), Queued: len(a.j.Reports), Reboot: in.advice(), Notice: in.longNotice(), Loader: o.Loader, Problems: []string{},
	}
	s.Act = NeedsPerson(s.State)
	s.Halt, s.Rollout = o.Halt, o.Operator
	for _, q := range a.j.Quarantine {
		if q.Kernel == o.Facts.Kernel.ID {
			s.Quarantine = append(s.Quarantine, q)
		}
	}
	if f := floor(a.j, a.cfg.Built); !f.Time.IsZero() {
		s.Floor = &f
	}
	if w := a.j.Work; w != nil {
		s.Blocking, s.Tracers = w.Blocking, w.Tracers
	}
	if id, ok := a.cfg.Server.Identity(); ok {
		s.Identity = &id
	}
	if o.AnchorErr == nil {
		s.Trust = &Publisher{o.Publisher, trust.Profile(o.Profile)}
		s.ModuleKey = o.KeyTrust
	}
	for _, err := range []error{o.FactsErr, o.AnchorErr, o.RolloutErr, o.KernelsErr, o.InErr, o.LoaderErr, a.told.err} {
		if err != nil {
			s.Problems = append(s.Problems, err.Error())
		}
	}
	return s
}

// State is the state by the last look.
func (a *Agent) State() wire.State {
	a.mu.Lock()
	defer a.mu.Unlock()
	return describe(a.inputs(a.j, time.Now()))
}

// History is what the machine did, newest first.
func (a *Agent) History() []Entry {
	h := slices.Clone(a.journal().History)
	slices.Reverse(h)
	return h
}

// CheckNow makes one check at once. The result of a check that failed is in
// the status; the error says that none was made.
func (a *Agent) CheckNow(ctx context.Context) error {
	return a.between(ctx, func(ctx context.Context) error {
		switch j := a.journal(); j.Phase {
		case wire.Idle, wire.Staged, wire.Stalled:
			return a.check(ctx)
		default:
			return fault.New(fault.Conflict, "under_way", "livepatch %d is %s", j.Work.Sequence, j.Phase).
				WithHint("look again when it is confirmed: klatch status")
		}
	})
}

// Enroll exchanges a token for this machine's credential and looks for a
// livepatch soon after.
func (a *Agent) Enroll(ctx context.Context, address string, token wire.Token) (Identity, error) {
	var id Identity
	err := a.between(ctx, func(ctx context.Context) error {
		if old, ok := a.cfg.Server.Identity(); ok {
			return fault.New(fault.Conflict, "enrolled", "this machine is enrolled already: %s at %s", old.MachineID, old.Server).
				WithHint("to change servers, stop klatchd and remove /var/lib/klatch/identity.json first")
		}
		o := a.observe(ctx)
		if o.FactsErr != nil {
			return o.FactsErr
		}
		var err error
		if id, err = a.cfg.Server.Enroll(ctx, address, token, o.Facts); err != nil {
			return err
		}
		a.log.LogAttrs(ctx, slog.LevelInfo, "enrolled", slog.String("machine_id", id.MachineID), slog.String("tier", id.Tier))
		a.netFails = 0
		if a.cfg.Policy.CheckInterval > 0 {
			a.setNext(time.Now())
		}
		return a.note(note{event: wire.EventEnrolled})
	})
	return id, err
}

// Retry forgets which livepatches failed, were suspect or are in quarantine,
// and ends the wait of a stalled one. It ends no halt: that is Resume.
func (a *Agent) Retry(ctx context.Context) error {
	return a.between(ctx, func(ctx context.Context) error {
		boot := a.bootID()
		now := time.Now().UTC()
		err := a.update(func(j *journal) {
			// What was taken out by hand stays out until the reboot.
			j.Blocked = slices.DeleteFunc(j.Blocked, func(b blocked) bool { return b.Code != codeTakenOut || b.BootID != boot })
			j.Quarantine = nil
			if j.Work != nil && (j.Phase == wire.Stalled || j.Phase == wire.Staged) {
				j.Work.After, j.Work.Busy, j.Work.Stalls = now, 0, 0
			}
		})
		if err != nil || a.journal().Phase != wire.Idle {
			return err
		}
		return a.check(ctx)
	})
}
