// SPDX-License-Identifier: Apache-2.0

// Package ingest takes what machines say, checks its form and remembers it,
// and answers checks from the catalog. What a machine says is believed for
// pages and for targeting, never for trust. Start with Check.
package ingest

import (
	"context"
	"log/slog"
	"regexp"
	"slices"
	"time"

	"klatch/internal/fault"
	"klatch/internal/fleet"
	"klatch/internal/obs"
	"klatch/internal/server/enroll"
	"klatch/internal/server/store"
	"klatch/internal/stall"
	"klatch/internal/tracer"
	"klatch/internal/wire"
)

// Limits of texts inside a body, in bytes: a page shows them.
const (
	maxHostname = 253 // RFC 1035
	maxWord     = 64
	maxFixes    = 10_000
	maxSymbol   = 512 // KSYM_NAME_LEN
)

// maxClockLead is how far a machine's clock may be ahead before its report
// counts as of now.
const maxClockLead = 5 * time.Minute

// Ingester answers checks and takes reports.
type Ingester struct {
	Machines  store.Machines
	Reports   store.Reports
	Published func(tier string) []fleet.Published // what a tier may have at the moment
	Absent    func() []fleet.Absent               // what is left out of the copy; may be nil
	Now       func() time.Time
	Log       *slog.Logger
}

// Check notes the machine's state and says what to load.
func (i *Ingester) Check(ctx context.Context, machineID string, q wire.CheckRequest) (wire.CheckAnswer, error) {
	if err := ValidFacts(q.Facts); err != nil {
		return wire.CheckAnswer{}, err
	}
	if err := validState(q.State); err != nil {
		return wire.CheckAnswer{}, err
	}
	now := i.Now()
	if err := i.Machines.Seen(ctx, i.sighting(machineID, now, now, q.State, q.Facts)); err != nil {
		return wire.CheckAnswer{}, err
	}
	// The tier is the one that the machine was enrolled in. A machine with the
	// operator's anchor asks for itself, by the tier of its own settings.
	m, err := i.Machines.Machine(ctx, machineID)
	if err != nil {
		return wire.CheckAnswer{}, err
	}
	a := fleet.Decide(i.Published(m.Tier), q.Facts.Kernel, q.Sequence)
	if i.Absent != nil {
		above := q.Sequence
		if a.Offer != nil {
			above = max(above, a.Offer.Sequence)
		}
		a.Absent = fleet.Missing(i.Absent(), q.Facts.Kernel, above)
	}
	return a, nil
}

func (i *Ingester) sighting(machineID string, now, at time.Time, s wire.State, f wire.Facts) store.Sighting {
	return store.Sighting{MachineID: machineID, Tier: enroll.DefaultTier, Seen: now, StateAt: at, State: s, Facts: f}
}

// Report remembers a report. The same key again is answered like the first
// time: the machine may not have heard the answer.
func (i *Ingester) Report(ctx context.Context, machineID string, r wire.Report) error {
	if !word.MatchString(r.Key) {
		return bad("key %.80q is not 1 to %d letters, digits, dashes and underscores", r.Key, maxWord)
	}
	if !slices.Contains(events, r.Event) {
		return bad("event %.80q is not known", r.Event)
	}
	if len(r.Text) > wire.MaxText || len(r.Fixes) > maxFixes || r.Took < 0 || (r.Code != "" && !word.MatchString(string(r.Code))) {
		return bad("text, fixes, took_ms or code out of range")
	}
	if err := validObstacles(r); err != nil {
		return err
	}
	if err := ValidFacts(r.Facts); err != nil {
		return err
	}
	if err := validState(r.State); err != nil {
		return err
	}
	now := i.Now()
	at := r.At
	if at.IsZero() || at.After(now.Add(maxClockLead)) {
		at = now
	}
	fresh, err := i.Reports.AddReport(ctx, i.sighting(machineID, now, at, r.State, r.Facts), r)
	if err != nil {
		return err
	}
	if fresh {
		i.Log.LogAttrs(ctx, slog.LevelInfo, "report received", obs.MachineID(machineID), slog.String("event", string(r.Event)),
			obs.BuildID(r.Facts.Kernel), obs.Sequence(r.Sequence), slog.String("code", string(r.Code)))
	}
	return nil
}

var events = []wire.Event{wire.EventEnrolled, wire.EventStaged, wire.EventLoading, wire.EventLoaded, wire.EventConfirmed,
	wire.EventStalled, wire.EventSuspect, wire.EventFailed, wire.EventBooted, wire.EventRefused}

var word = regexp.MustCompile(`^[0-9A-Za-z_.-]{1,64}$`)

func bad(format string, args ...any) error {
	return fault.New(fault.Invalid, "bad_report", format, args...)
}

// ValidFacts checks what a machine says of itself, at its enrollment too.
func ValidFacts(f wire.Facts) error {
	k := f.Kernel
	switch {
	case f.Hostname == "" || len(f.Hostname) > maxHostname:
		return bad("hostname of %d bytes, want 1 to %d", len(f.Hostname), maxHostname)
	case k.ID.IsZero() || k.Release == "" || k.Arch == "" || k.Distro == "":
		return bad("facts name no complete kernel build")
	case len(f.BootID) > maxWord || len(f.Lockdown) > maxWord || len(f.Enforced) > maxWord || len(f.Version) > maxWord ||
		len(f.SecureBoot) > maxWord || len(f.KeyTrust) > maxWord:
		return bad("a fact is over %d bytes", maxWord)
	}
	return nil
}

// validObstacles bounds what kept a livepatch out. A class or a kind that is
// not known here is kept: a newer machine may know more.
func validObstacles(r wire.Report) error {
	if len(r.Stall) > stall.MaxCounts || len(r.Tracers) > tracer.MaxTracers {
		return bad("%d counts of a stall and %d tracers, at most %d and %d", len(r.Stall), len(r.Tracers), stall.MaxCounts, tracer.MaxTracers)
	}
	for _, c := range r.Stall {
		if c.Tasks < 1 || !word.MatchString(string(c.Class)) || len(c.Object) > maxWord || len(c.Function) > maxSymbol {
			return bad("a count of a stall is out of range")
		}
	}
	for _, t := range r.Tracers {
		if !word.MatchString(string(t.Kind)) || !word.MatchString(string(t.Effect)) || len(t.Object) > maxWord ||
			len(t.Function) > maxSymbol || len(t.By) > maxSymbol {
			return bad("a tracer is out of range")
		}
	}
	return nil
}

func validState(s wire.State) error {
	if len(s.State) > maxWord || len(s.Reason) > maxWord || len(s.Phase) > maxWord || len(s.Advice) > maxWord ||
		len(s.Text) > wire.MaxText || len(s.NextStep) > wire.MaxText || len(s.Fixes) > maxFixes || len(s.Reasons) > maxWord {
		return bad("a member of state is too long")
	}
	if n := s.Notice; n != nil && (len(n.Support) > maxWord || len(n.Until) > maxWord || len(n.Ended) > maxWord || len(n.CVEs) > wire.MaxNoticeCVEs || n.Reboots < 0) {
		return bad("notice of state is out of range")
	}
	if len(s.Class) > maxWord || len(s.Step) > maxWord {
		return bad("a member of state is too long")
	}
	if seen := s.Seen; seen != nil {
		if len(seen.Logs) > wire.MaxSeenLogs {
			return bad("state tells of %d logs", len(seen.Logs))
		}
		for _, l := range seen.Logs {
			if len(l.Log) > maxHostname || len(l.Root) > maxWord || l.Size < 0 {
				return bad("a log of state is out of range")
			}
		}
	}
	return nil
}
