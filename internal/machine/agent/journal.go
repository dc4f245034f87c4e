// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/facts"
	"klatch/internal/stall"
	"klatch/internal/tracer"
	"klatch/internal/wire"
)

// journal is the agent's whole memory: where it is, what it must still tell
// the server, what it has done. It is one file, replaced whole, so phase,
// reports and history cannot disagree after a crash. Written down for people
// in docs/reference/machine.md.
type journal struct {
	Format string     `json:"format"`
	ID     string     `json:"id"`   // random; the reports' keys are made of it
	Step   uint64     `json:"step"` // counts moves; the reports' keys are made of it
	Phase  wire.Phase `json:"phase"`
	Since  time.Time  `json:"since"`
	BootID string     `json:"boot_id"` // boot in which the phase was entered
	Work   *work      `json:"work"`    // the livepatch under way; null when idle

	Blocked    []blocked     `json:"blocked"`              // not tried again
	Quarantine []Quarantined `json:"quarantine,omitempty"` // not fetched again
	Halt       *Halt         `json:"halt,omitempty"`       // but not that of a log, which is in its memory
	Floor      *Floor        `json:"time_floor,omitempty"`
	Accepted   *wire.Seen    `json:"accepted,omitempty"` // newest signed state
	Evidence   *evidenceSeen `json:"evidence_policy,omitempty"`
	Peak       []peak        `json:"peak,omitempty"` // highest sequences that root's record has shown
	Check      Check         `json:"check"`
	Seen       string        `json:"seen_boot_id"`    // boot that was reported
	Orderly    string        `json:"orderly_boot_id"` // boot in which the daemon was last stopped in order
	Reports    []wire.Report `json:"reports"`         // oldest first
	History    []Entry       `json:"history"`         // oldest first
}

// work is one livepatch on its way.
type work struct {
	Target   string             `json:"target,omitempty"`
	Kernel   kernel.Build       `json:"kernel"`
	Sequence livepatch.Sequence `json:"sequence"`
	Digest   string             `json:"sha256,omitempty"` // of the bundle
	Until    time.Time          `json:"until,omitzero"`   // not loaded from the disk later than this
	Module   livepatch.Module   `json:"module"`           // zero for one that the loader has put in at boot
	Fixes    []livepatch.Fix    `json:"fixes"`
	AtBoot   bool               `json:"at_boot,omitempty"`
	Stalls   int                `json:"stalls,omitempty"`
	Busy     int                `json:"busy,omitempty"` // loads put off
	After    time.Time          `json:"after,omitzero"` // not before this time
	Began    time.Time          `json:"began,omitzero"` // of this load
	Marks    facts.Marks        `json:"marks"`          // before this load
	Cancel   bool               `json:"cancel,omitempty"`
	Code     fault.Code         `json:"code,omitempty"` // why it is where it is, if that is not the plain way
	Text     string             `json:"text,omitempty"`
	Blocking []Blocking         `json:"blocking,omitempty"` // who kept the last transition from finishing
	Counts   []stall.Count      `json:"counts,omitempty"`   // of all of them
	Tracers  []tracer.Tracer    `json:"tracers,omitempty"`  // found before this load
}

// blocked is a livepatch that is not tried again until a newer one is offered
// or a person says so.
type blocked struct {
	Phase    wire.Phase         `json:"phase"` // failed or suspect
	Kernel   kernel.BuildID     `json:"build_id"`
	Sequence livepatch.Sequence `json:"sequence"`
	BootID   string             `json:"boot_id"`
	At       time.Time          `json:"at"`
	Code     fault.Code         `json:"code"`
	Text     string             `json:"text"`
	Digest   string             `json:"sha256,omitempty"` // of the bundle; absent: whichever
}

// same says whether a record is about these bytes, as far as both are known.
func (b blocked) same(d digests) bool {
	return b.Digest == "" || d.Bundle == "" || b.Digest == d.Bundle
}

// Check is the outcome of the last check and of the last good one.
type Check struct {
	At     time.Time  `json:"at,omitzero"`
	GoodAt time.Time  `json:"good_at,omitzero"` // server and metadata both answered, and all was verified
	Result string     `json:"result"`           // current, offered, failed; empty before the first
	Code   fault.Code `json:"code"`             // the server's reason, or why the check failed
	Kind   fault.Kind `json:"kind,omitempty"`   // of the failure
	Text   string     `json:"text,omitempty"`
	Hint   string     `json:"hint,omitempty"`
	Class  Class      `json:"class,omitempty"` // of a failure: what it means for the machine
	Step   Step       `json:"step,omitempty"`  // at which it failed
}

// The results of a check.
const (
	resultCurrent = "current"
	resultOffered = "offered"
	resultFailed  = "failed"
)

// Entry is one line of the history.
type Entry struct {
	At       time.Time          `json:"at"`
	Event    wire.Event         `json:"event"`
	Sequence livepatch.Sequence `json:"sequence"`
	Code     fault.Code         `json:"code"`
	Text     string             `json:"text"`
}

const (
	journalFormat = "klatch-journal/1"
	journalFile   = "journal.json"
	// maxJournal holds MaxQueuedReports reports of a few KiB each with room.
	maxJournal = 16 << 20
	maxHistory = 200
	maxBlocked = 50
)

func openJournal(dir string) (journal, error) {
	path := filepath.Join(dir, journalFile)
	b, err := durable.ReadFile(path, maxJournal)
	if errors.Is(err, fs.ErrNotExist) {
		return journal{Format: journalFormat, ID: rand.Text(), Phase: wire.Idle}, nil
	}
	if err != nil {
		return journal{}, err
	}
	var j journal
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(&j); err != nil || j.Format != journalFormat || edges[j.Phase] == nil || j.Work == nil && j.Phase != wire.Idle {
		return journal{}, fault.New(fault.Internal, "journal_malformed", "read journal %s: not what this version writes: %w", path, err).
			WithHint("keep a copy and remove the file: what is loaded stays loaded, reports and history are lost")
	}
	return j, nil
}

// journal is a copy to read.
func (a *Agent) journal() journal {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.j
}

// update changes the journal on disk, then in memory. On return the change is
// durable; on error nothing has changed.
func (a *Agent) update(change func(*journal)) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	next := a.j
	next.Blocked = slices.Clone(next.Blocked)
	next.Quarantine = slices.Clone(next.Quarantine)
	next.Peak = slices.Clone(next.Peak)
	next.Reports = slices.Clone(next.Reports)
	next.History = slices.Clone(next.History)
	if next.Work != nil {
		w := *next.Work
		next.Work = &w
	}
	change(&next)
	b, err := json.Marshal(next)
	if err != nil {
		return fmt.Errorf("encode journal: %w", err)
	}
	if err := durable.WriteFile(filepath.Join(a.cfg.Dir, journalFile), append(b, '\n'), 0o600); err != nil {
		return err
	}
	a.j = next
	return nil
}

// move goes from one phase to the next: the phase, the reports about it and
// the history become durable in one write.
func (a *Agent) move(to wire.Phase, change func(*journal), tell ...note) error {
	from := a.journal().Phase
	if !slices.Contains(edges[from], to) {
		return fmt.Errorf("move from phase %s to %s: no such edge", from, to)
	}
	now := time.Now().UTC()
	boot := a.bootID()
	err := a.update(func(j *journal) {
		j.Step++
		j.Phase, j.Since, j.BootID = to, now, boot
		if change != nil {
			change(j)
		}
		if to == wire.Idle {
			j.Work = nil
		}
		a.tell(j, now, tell)
	})
	if err != nil {
		return err
	}
	a.log.LogAttrs(context.Background(), slog.LevelInfo, "phase entered",
		slog.String("phase", string(to)), slog.Any("sequence", a.sequenceUnderWay()))
	a.nudge()
	return nil
}

// note is something to tell the server and to remember.
type note struct {
	event    wire.Event
	sequence livepatch.Sequence
	code     fault.Code
	text     string
	took     time.Duration
	fixes    []livepatch.Fix
	stall    []stall.Count
	tracers  []tracer.Tracer
}

// tell puts notes into the history and, once the machine is enrolled, into
// the queue. A key follows from the step, so a step that is repeated after a
// crash makes the same report again and not a second one. The caller holds
// the lock.
func (a *Agent) tell(j *journal, now time.Time, notes []note) {
	_, enrolled := a.cfg.Server.Identity()
	for i, n := range notes {
		j.History = append(j.History, Entry{At: now, Event: n.event, Sequence: n.sequence, Code: n.code, Text: n.text})
		if !enrolled {
			continue
		}
		key := sha256.Sum256(fmt.Appendf(nil, "%s %d %d %s", j.ID, j.Step, i, n.event))
		j.Reports = append(j.Reports, wire.Report{
			Key: hex.EncodeToString(key[:16]), Event: n.event, At: now, BootID: a.seen.Facts.BootID,
			Sequence: n.sequence, Code: n.code, Text: clip(n.text), Took: n.took.Milliseconds(), Fixes: cves(n.fixes),
			Stall: n.stall, Tracers: n.tracers,
			State: describe(a.inputs(*j, now)), Facts: a.seen.Facts,
		})
	}
	j.History = tail(j.History, maxHistory)
	j.Reports = tail(j.Reports, wire.MaxQueuedReports)
}

// note writes down something that is no move.
func (a *Agent) note(n ...note) error {
	now := time.Now().UTC()
	err := a.update(func(j *journal) {
		j.Step++
		a.tell(j, now, n)
	})
	a.nudge()
	return err
}

func tail[T any](s []T, n int) []T { return s[max(0, len(s)-n):] }

// clip bounds a text that may hold foreign words, such as the names of tasks:
// the server refuses a longer one, and with it the check or the report.
func clip(s string) string {
	const more = " …"
	s = strings.ToValidUTF8(s, "?") // a byte that is none would grow on the way
	if len(s) > wire.MaxText {
		s = strings.ToValidUTF8(s[:wire.MaxText-len(more)], "") + more
	}
	return s
}

func cves(fixes []livepatch.Fix) []cve.ID {
	var ids []cve.ID
	for _, f := range fixes {
		ids = append(ids, f.CVE)
	}
	return ids
}

func (a *Agent) sequenceUnderWay() livepatch.Sequence {
	if w := a.journal().Work; w != nil {
		return w.Sequence
	}
	return 0
}
