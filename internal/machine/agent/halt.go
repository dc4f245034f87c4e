// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/translog"
	"klatch/internal/wire"
)

// Halt says that nothing is loaded until a person has looked, or until a newer
// signed policy came. What is loaded stays loaded.
type Halt struct {
	At   time.Time  `json:"at"`
	Step Step       `json:"step,omitempty"` // absent in a halt of the log that an older version wrote
	Code fault.Code `json:"code,omitempty"` // as above
	Text string     `json:"text"`

	// Of the log only: the two checkpoints that contradict each other.
	Log   string `json:"log,omitempty"`   // verifier key
	Seen  string `json:"seen,omitempty"`  // checkpoint, a signed note
	Shown string `json:"shown,omitempty"` // the one that contradicts it

	// Of all others: the policy in force. A newer one ends the halt.
	inForce
}

// inForce is the signed policy that a look found.
type inForce struct {
	Basis   string `json:"basis,omitempty"`   // digest of the anchor
	Recalls int64  `json:"recalls,omitempty"` // version
	Rollout int64  `json:"rollout,omitempty"` // version of the operator's top list
}

// newer says whether a halt is answered: by another anchor; of the recalls by
// higher ones, of the operator's by a newer top list. That root's record went
// back no policy answers.
func (p inForce) newer(h Halt) bool {
	return p.Basis != h.Basis || h.Code == codeRecallsBack && p.Recalls > h.Recalls || h.Step == StepSelection && p.Rollout > h.Rollout
}

const codeMemoryBack fault.Code = "memory_back"

func (h Halt) step() Step       { return cmp.Or(h.Step, StepLog) }
func (h Halt) code() fault.Code { return cmp.Or(h.Code, translog.CodeInconsistent) }

// halted is the halt that counts: of the journal, or of a log that the owner of
// this machine still believes.
func (a *Agent) halted(policy *translog.Policy) (*Halt, error) {
	if h := a.journal().Halt; h != nil {
		return h, nil
	}
	return a.logHalted(policy)
}

func (a *Agent) haltError(h *Halt) error {
	hint := "find out what happened, then as root: klatch resume"
	if h.step() == StepLog {
		hint = fmt.Sprintf(logHaltHint, a.logMemoryPath())
	}
	return &refusal{h.step(), Stop, fault.New(fault.Untrusted, h.code(), "halted since %s: %s", h.At.UTC().Format(time.RFC3339), h.Text).WithHint("%s", hint)}
}

// inHalt says that nothing may be loaded now, not even what was staged
// before: there is a halt, or nobody can know.
func (a *Agent) inHalt() bool {
	_, policy, err := a.trusted()
	if err != nil {
		return true // nobody can know
	}
	h, err := a.halted(policy)
	return h != nil || err != nil
}

// endHalt ends a halt that a newer signed policy answers.
func (a *Agent) endHalt(p inForce) error {
	h := a.journal().Halt
	if h == nil || !p.newer(*h) {
		return nil
	}
	a.log.LogAttrs(context.Background(), slog.LevelWarn, "halt ended by a newer signed policy", slog.String("code", string(h.Code)))
	return a.endedHalt("by a newer signed policy")
}

func (a *Agent) endedHalt(how string) error {
	now := time.Now().UTC()
	err := a.update(func(j *journal) {
		j.Step++
		code := fault.Code("halt_ended")
		j.Halt = nil
		a.tell(j, now, []note{{event: wire.EventRefused, code: code, text: "the halt was ended " + how}})
	})
	a.nudge()
	return err
}

// Resume ends a halt after a person has looked. What contradicted each other of
// a log is kept beside the memory, as evidence.
func (a *Agent) Resume(ctx context.Context) error {
	return a.between(ctx, func(ctx context.Context) error {
		o := a.observe(ctx)
		if o.Halt == nil {
			return fault.New(fault.Conflict, "not_halted", "this machine is not halted").WithHint("see klatch status")
		}
		if o.Halt.step() == StepLog {
			kept := fmt.Sprintf("%s.halt-%d", a.logMemoryPath(), time.Now().Unix())
			if err := os.Rename(a.logMemoryPath(), kept); err != nil {
				return err
			}
			if err := durable.SyncDir(a.cfg.Dir); err != nil {
				return err
			}
		}
		// A person has said that what there is now is right.
		if err := a.update(func(j *journal) { j.Peak = nil }); err != nil {
			return err
		}
		if err := a.endedHalt("by a person"); err != nil {
			return err
		}
		a.observe(ctx)
		if a.journal().Phase != wire.Idle {
			return nil
		}
		return a.check(ctx)
	})
}

// peak is the highest sequence that root's record ever showed here.
type peak struct {
	Kernel   kernel.BuildID     `json:"build_id"`
	Sequence livepatch.Sequence `json:"sequence"`
}

// maxPeaks limits how many kernel builds are remembered.
const maxPeaks = 20

// checkPeak compares root's record with what was seen of it before. One that is
// behind lets an older livepatch in: a disk was restored, or somebody turned
// the record back.
func (a *Agent) checkPeak(o observation) error {
	id, have := o.Facts.Kernel.ID, o.highest()
	before := a.journal().peakOf(id)
	if have < before {
		return fault.New(fault.Untrusted, codeMemoryBack, "root's record says that livepatch %d is the highest ever confirmed on this kernel; it said %d before", have, before).
			WithHint("find out whether this disk was restored from a backup, then as root: klatch resume")
	}
	if have == before {
		return nil
	}
	return a.update(func(j *journal) { j.raisePeak(id, have) })
}

func (j journal) peakOf(id kernel.BuildID) livepatch.Sequence {
	for _, p := range j.Peak {
		if p.Kernel == id {
			return p.Sequence
		}
	}
	return 0
}

func (j *journal) raisePeak(id kernel.BuildID, s livepatch.Sequence) {
	next := []peak{}
	for _, p := range j.Peak {
		if p.Kernel != id {
			next = append(next, p)
		}
	}
	j.Peak = tail(append(next, peak{id, s}), maxPeaks)
}

// halt writes a halt down that is not the log's.
func (j *journal) halt(now time.Time, step Step, code fault.Code, text string, p inForce) {
	if j.Halt == nil {
		j.Halt = &Halt{At: now, Step: step, Code: code, Text: text, inForce: p}
	}
}
