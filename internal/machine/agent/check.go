// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/translog"
	"klatch/internal/wire"
)

// idle waits for the next check, and takes over a livepatch that the loader
// has put in without us: at boot, or before our journal was lost.
func (a *Agent) idle(ctx context.Context) (time.Duration, error) {
	if w, ok := a.unconfirmed(); ok {
		return 0, a.move(wire.Transitioning, func(j *journal) {
			j.Work = &w
			a.begin(j.Work)
		})
	}
	if a.checkIsDue(time.Now()) {
		if err := a.check(ctx); err != nil {
			return 0, err
		}
		if a.journal().Phase != wire.Idle {
			return 0, nil
		}
	}
	return a.untilCheck(time.Now()), nil
}

// unconfirmed is a livepatch in the kernel that the loader still counts as an
// attempt and that we do not know to be bad.
func (a *Agent) unconfirmed() (work, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	st := a.seen.Loader
	if st == nil || a.seen.FactsErr != nil || st.Attempt == nil || st.Loaded == nil || st.Attempt.Sequence != st.Loaded.Sequence || !st.Loaded.Enabled {
		return work{}, false
	}
	// One that failed in an earlier boot and that the loader has put back was
	// confirmed before that, and root has cleared the breaker. It must be
	// confirmed again, or each boot counts as a death.
	b, bad := a.j.isBlocked(a.seen.Facts.Kernel.ID, st.Loaded.Sequence)
	if bad && (b.Phase != wire.Failed || b.BootID == a.seen.Facts.BootID || !st.Attempt.AtBoot) {
		return work{}, false
	}
	return work{
		Kernel: a.seen.Facts.Kernel, Sequence: st.Loaded.Sequence,
		Fixes: st.Loaded.Fixes, AtBoot: st.Attempt.AtBoot,
	}, true
}

// check is one look for something newer. Its outcome goes to the journal; the
// error is only for a journal that cannot be written.
func (a *Agent) check(ctx context.Context) error {
	t := &trial{Agent: a, o: a.observe(ctx), start: time.Now()}
	outcome, err := a.look(ctx, t)
	if ctx.Err() != nil {
		return nil //nolint:nilerr // we were asked to stop; that says nothing about the server
	}
	now := time.Now().UTC()
	a.afterCheck(err, now)
	if err != nil {
		return a.checkFailed(ctx, t, err, now)
	}
	a.serverReached()
	outcome.At, outcome.GoodAt = now, now
	a.log.LogAttrs(ctx, slog.LevelInfo, "check done", slog.String("result", outcome.Result), slog.String("code", string(outcome.Code)))
	return a.update(func(j *journal) { j.Check = outcome })
}

// checkFailed writes down what was refused, and what that means: the bytes go
// into quarantine, or the machine halts, in the same write.
func (a *Agent) checkFailed(ctx context.Context, t *trial, err error, now time.Time) error {
	before := a.journal().Check
	step, class := placeOf(err)
	if class == Quarantine && t.digests.Bundle == "" {
		class = Stay // the signed list names no bytes that could be remembered
	}
	c := Check{
		At: now, GoodAt: before.GoodAt, Result: resultFailed, Class: class, Step: step,
		Code: fault.CodeOf(err), Kind: fault.KindOf(err), Text: err.Error(), Hint: fault.HintOf(err),
	}
	if c.Code == "" {
		c.Code = fault.Code(c.Kind)
	}
	a.log.LogAttrs(ctx, slog.LevelWarn, "check failed", slog.String("class", string(class)), slog.String("step", string(step)),
		slog.String("code", string(c.Code)), slog.String("err", c.Text))
	var notes []note
	// What was refused is told once, not each hour again. Of a clock that is
	// behind the text changes with the time.
	news := before.Code != c.Code || before.Text != c.Text && step != StepClock
	if news && (c.Kind == fault.Untrusted || step == StepClock) {
		notes = append(notes, note{event: wire.EventRefused, sequence: t.offer.Sequence, code: c.Code, text: c.Text})
	}
	defer a.nudge()
	return a.update(func(j *journal) {
		j.Step++
		j.Check = c
		id := t.o.Facts.Kernel.ID
		if _, known := j.inQuarantine(t.basis, id, t.offer.Target, t.digests); class == Quarantine && !known {
			j.quarantine(Quarantined{At: now, Kernel: id, Target: t.offer.Target, Sequence: t.offer.Sequence,
				digests: t.digests, Basis: t.basis, Step: step, Code: c.Code, Text: clip(c.Text)})
		}
		if class == Stop && step != StepLog {
			j.halt(now, step, c.Code, clip(c.Text), t.inForce())
			a.seen.Halt = j.Halt
		}
		a.tell(j, now, notes)
	})
}

const (
	stageDir    = "staged"
	manifestExt = ".manifest"
	moduleExt   = ".ko"
	proofExt    = translog.ProofSuffix
)

func (a *Agent) stagePath(s livepatch.Sequence, ext string) string {
	return filepath.Join(a.cfg.Dir, stageDir, s.ModuleName()+ext)
}

// stage puts a verified livepatch on disk with all that is needed to check it
// once more, then says so in the journal. A crash in between leaves files that
// the next stage replaces.
func (a *Agent) stage(t *trial) error {
	m := t.manifest
	files := map[string][]byte{moduleExt: t.bundle.Module, manifestExt: t.bundle.Manifest}
	if t.policy != nil {
		files[proofExt] = t.proof
	}
	for ext, content := range files {
		if err := durable.WriteFile(a.stagePath(m.Sequence, ext), content, 0o600); err != nil {
			return err
		}
	}
	w := &work{Target: t.offer.Target, Kernel: m.Kernel, Sequence: m.Sequence, Module: m.Module, Fixes: m.Fixes, Digest: t.digests.Bundle}
	if !t.until.IsZero() {
		w.Until = t.until.Add(shelfLife).UTC()
	}
	if a.journal().Phase == wire.Stalled {
		if err := a.move(wire.Staged, nil); err != nil {
			return err
		}
	}
	return a.move(wire.Staged, func(j *journal) {
		j.Work = w
		j.Quarantine = slices.DeleteFunc(j.Quarantine, func(q Quarantined) bool { return q.Target == w.Target })
	}, note{event: wire.EventStaged, sequence: m.Sequence, fixes: m.Fixes})
}

// unstage removes the files of all livepatches but one.
func (a *Agent) unstage(keep livepatch.Sequence) error {
	dir := filepath.Join(a.cfg.Dir, stageDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.TrimSuffix(e.Name(), filepath.Ext(e.Name())) == keep.ModuleName() {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
