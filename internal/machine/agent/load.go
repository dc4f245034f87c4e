// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"time"

	"klatch/internal/fault"
	"klatch/internal/machine/facts"
	"klatch/internal/tracer"
	"klatch/internal/wire"
)

// staged waits until loading is allowed. Here, and only here and in stalled, a
// newer offer may take the place of the staged livepatch.
func (a *Agent) staged(ctx context.Context) (time.Duration, error) {
	now := time.Now()
	if a.checkIsDue(now) {
		if err := a.check(ctx); err != nil {
			return 0, err
		}
	}
	w := *a.journal().Work
	if wait := w.After.Sub(now); wait > 0 {
		return min(wait, a.untilCheck(now)), nil
	}
	if a.inHalt() {
		return a.untilCheck(now), nil // a person must look first
	}
	files, err := a.recheck(w)
	if err != nil {
		return 0, a.drop(ctx, w, err)
	}
	files.close()
	found, text := a.tracers(ctx, w)
	if ctx.Err() != nil {
		return 0, nil //nolint:nilerr // the next start looks again
	}
	if held := tracer.Refusing(found); len(held) > 0 {
		return 0, a.held(w, held)
	}
	return 0, a.move(wire.Loading, func(j *journal) {
		a.begin(j.Work)
		j.Work.Tracers = found
	}, note{event: wire.EventLoading, sequence: w.Sequence, fixes: w.Fixes, text: text, tracers: found})
}

// load hands the livepatch to the loader. After a crash it first looks
// whether the loader has already put it in.
func (a *Agent) load(ctx context.Context) (time.Duration, error) {
	w := *a.journal().Work
	if o := a.observe(ctx); o.loaded() == w.Sequence {
		return 0, a.move(wire.Transitioning, nil)
	}
	if a.inHalt() {
		return a.untilCheck(time.Now()), a.move(wire.Staged, nil)
	}
	files, err := a.recheck(w)
	if err != nil {
		return 0, a.drop(ctx, w, err)
	}
	defer files.close()

	st, err := a.cfg.Loader.Load(ctx, files.manifest, files.module)
	if ctx.Err() != nil {
		return 0, nil // the next start looks what became of it
	}
	if err == nil {
		a.saw(st)
		return 0, a.move(wire.Transitioning, nil)
	}
	a.log.LogAttrs(ctx, slog.LevelWarn, "load refused", slog.Any("sequence", w.Sequence),
		slog.String("code", string(fault.CodeOf(err))), slog.String("err", err.Error()))
	// The answer may have been lost after the kernel took it.
	if o := a.observe(ctx); o.loaded() == w.Sequence {
		return 0, a.move(wire.Transitioning, nil)
	}
	if later(err) {
		now := time.Now()
		return 0, a.move(wire.Staged, func(j *journal) {
			j.Work.Busy++
			j.Work.After = now.Add(backoff(j.Work.Busy, backoffFirst, backoffMost)).UTC()
			j.Work.Code, j.Work.Text = fault.CodeOf(err), err.Error()
		})
	}
	return 0, a.fail(fault.CodeOf(err), err.Error())
}

// later tells "not now" from "no". A refusal of the loader carries a kind;
// an error without one is a connection that broke.
func later(err error) bool {
	_, answered := errors.AsType[*fault.Error](err)
	return !answered || fault.Retry(err) || slices.Contains([]fault.Code{"transition_running", "kernel_busy"}, fault.CodeOf(err))
}

// watch looks at the transition until every task runs the new code, or until
// the deadline.
func (a *Agent) watch(ctx context.Context) (time.Duration, error) {
	w := *a.journal().Work
	lp, in, err := a.cfg.Machine.Livepatch(w.Sequence)
	if err != nil {
		a.log.LogAttrs(ctx, slog.LevelWarn, "transition not readable", slog.Any("sequence", w.Sequence), slog.String("err", err.Error()))
		return poll(time.Since(w.Began)), nil // it is read again
	}
	switch took := time.Since(w.Began); {
	case !in && w.Cancel:
		return 0, a.stalled(w)
	case !in:
		return 0, a.gone(ctx, w)
	case lp.Enabled && !lp.Transition:
		a.observe(ctx)
		return 0, a.move(wire.Soaking, func(j *journal) { j.Work.Cancel = false },
			note{event: wire.EventLoaded, sequence: w.Sequence, took: took, fixes: w.Fixes, code: atBoot(w)})
	case !lp.Enabled && !w.Cancel:
		// Somebody else is taking it out; it is gone soon.
		return poll(took), nil
	case took < a.cfg.Policy.Deadline:
		return min(poll(took), a.cfg.Policy.Deadline-took), nil
	}
	return a.cancel(ctx, w)
}

func atBoot(w work) fault.Code {
	if w.AtBoot {
		return "at_boot"
	}
	return ""
}

// cancel reverses a transition that does not finish. Who kept it from
// finishing is written down first: afterwards nobody can tell.
func (a *Agent) cancel(ctx context.Context, w work) (time.Duration, error) {
	if !w.Cancel {
		o := a.inTheWay(ctx)
		if ctx.Err() != nil {
			return 0, nil //nolint:nilerr // the next start asks again
		}
		if err := a.update(func(j *journal) {
			j.Work.Cancel, j.Work.Code, j.Work.Text = true, o.code, o.text
			j.Work.Blocking, j.Work.Counts = o.blocking, o.counts
		}); err != nil {
			return 0, err
		}
	}
	st, err := a.cfg.Loader.Cancel(ctx, w.Sequence)
	if err == nil {
		a.saw(st)
		return time.Second, nil // the folder disappears when the last task is back
	}
	if ctx.Err() == nil {
		a.log.LogAttrs(ctx, slog.LevelWarn, "transition not canceled", slog.Any("sequence", w.Sequence), slog.String("err", err.Error()))
	}
	return 5 * time.Second, nil // it may have finished meanwhile; watch looks again
}

// stalled is entered when the kernel is back at the old code.
func (a *Agent) stalled(w work) error {
	now := time.Now()
	return a.move(wire.Stalled, func(j *journal) {
		j.Work.Cancel = false
		j.Work.Stalls++
		j.Work.After = now.Add(backoff(j.Work.Stalls, a.cfg.Policy.StallRetry, stallMost)).UTC()
	}, note{event: wire.EventStalled, sequence: w.Sequence, code: cmp.Or(w.Code, codeDeadline), text: w.Text, took: now.Sub(w.Began), stall: w.Counts})
}

// restage waits after a stall. A newer offer ends the wait.
func (a *Agent) restage(ctx context.Context) (time.Duration, error) {
	now := time.Now()
	if a.checkIsDue(now) {
		if err := a.check(ctx); err != nil || a.journal().Phase != wire.Stalled {
			return 0, err
		}
	}
	w := *a.journal().Work
	if wait := w.After.Sub(now); wait > 0 {
		return min(wait, a.untilCheck(now)), nil
	}
	return 0, a.move(wire.Staged, nil)
}

// soak waits for trouble. Without any the loader is asked to confirm; it
// looks for itself.
func (a *Agent) soak(ctx context.Context) (time.Duration, error) {
	j := a.journal()
	w := *j.Work
	lp, in, err := a.cfg.Machine.Livepatch(w.Sequence)
	if err != nil {
		a.log.LogAttrs(ctx, slog.LevelWarn, "livepatch not readable", slog.Any("sequence", w.Sequence), slog.String("err", err.Error()))
		return 5 * time.Second, nil //nolint:nilerr // it is read again
	}
	if !in || !lp.Enabled {
		return 0, a.gone(ctx, w)
	}
	verdict, text := a.cfg.Machine.Since(w.Marks)
	if verdict == facts.Trouble {
		return 0, a.suspect(text)
	}
	if left := a.cfg.Policy.soak(w) - time.Since(j.Since); left > 0 {
		return min(left, 5*time.Second), nil
	}
	st, err := a.cfg.Loader.Confirm(ctx, w.Sequence)
	if ctx.Err() != nil {
		return 0, nil //nolint:nilerr // we were asked to stop; the next start asks again
	}
	if err != nil {
		a.log.LogAttrs(ctx, slog.LevelWarn, "livepatch not confirmed", slog.Any("sequence", w.Sequence), slog.String("err", err.Error()))
		return backoffFirst, a.update(func(j *journal) { j.Work.Code, j.Work.Text = fault.CodeOf(err), err.Error() })
	}
	a.saw(st)
	n := note{event: wire.EventConfirmed, sequence: w.Sequence, fixes: w.Fixes, code: atBoot(w)}
	if verdict == facts.Unclear {
		n.code, n.text = "soak_unclear", text
	}
	return 0, a.move(wire.Confirmed, func(j *journal) {
		j.Work.Code, j.Work.Text = "", ""
		j.raisePeak(w.Kernel.ID, max(j.peakOf(w.Kernel.ID), w.Sequence))
	}, n)
}

// gone is for a livepatch that left the kernel without our asking: root took
// it out, or the kernel reversed it.
func (a *Agent) gone(ctx context.Context, w work) error {
	a.observe(ctx)
	return a.fail(codeTakenOut, fmt.Sprintf("livepatch %d was taken out of the kernel by hand", w.Sequence))
}

// fail ends the journey of the livepatch under way; nothing of it is loaded.
func (a *Agent) fail(code fault.Code, text string) error {
	if code == "" {
		code = "refused"
	}
	return a.block(wire.Failed, wire.EventFailed, code, text)
}

// suspect ends it too, but the livepatch stays loaded: taking it out may be
// worse, and a newer one supersedes it.
func (a *Agent) suspect(text string) error {
	return a.block(wire.Suspect, wire.EventSuspect, "kernel_trouble", text)
}

func (a *Agent) block(to wire.Phase, event wire.Event, code fault.Code, text string) error {
	w := *a.journal().Work
	boot := a.bootID()
	now := time.Now().UTC()
	return a.move(to, func(j *journal) {
		j.Work.Code, j.Work.Text = code, text
		j.Blocked = tail(append(j.Blocked, blocked{
			Phase: to, Kernel: w.Kernel.ID, Sequence: w.Sequence, BootID: boot, At: now, Code: code, Text: text, Digest: w.Digest,
		}), maxBlocked)
	}, note{event: event, sequence: w.Sequence, code: code, text: text, fixes: w.Fixes})
}

// finish ends a journey, however it went. The report about it is in the
// journal already.
func (a *Agent) finish() (time.Duration, error) {
	w := *a.journal().Work
	if err := a.unstage(w.Sequence); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	return 0, a.move(wire.Idle, nil)
}
