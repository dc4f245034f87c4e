// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/translog"
	"klatch/internal/trust"
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
	o := a.observe(ctx)
	outcome, err := a.look(ctx, o)
	if ctx.Err() != nil {
		return nil //nolint:nilerr // we were asked to stop; that says nothing about the server
	}
	now := time.Now().UTC()
	a.afterCheck(err, now)
	if err != nil {
		return a.checkFailed(ctx, err, now)
	}
	a.serverReached()
	outcome.At, outcome.GoodAt = now, now
	a.log.LogAttrs(ctx, slog.LevelInfo, "check done", slog.String("result", outcome.Result), slog.String("code", string(outcome.Code)))
	return a.update(func(j *journal) { j.Check = outcome })
}

func (a *Agent) checkFailed(ctx context.Context, err error, now time.Time) error {
	before := a.journal().Check
	c := Check{
		At: now, GoodAt: before.GoodAt, Result: resultFailed,
		Code: fault.CodeOf(err), Kind: fault.KindOf(err), Text: err.Error(), Hint: fault.HintOf(err),
	}
	if c.Code == "" {
		c.Code = fault.Code(c.Kind)
	}
	a.log.LogAttrs(ctx, slog.LevelWarn, "check failed", slog.String("code", string(c.Code)), slog.String("err", c.Text))
	var notes []note
	// What was refused is told once, not each hour again.
	if c.Kind == fault.Untrusted && (before.Code != c.Code || before.Text != c.Text) {
		notes = append(notes, note{event: wire.EventRefused, code: c.Code, text: c.Text})
	}
	defer a.nudge()
	return a.update(func(j *journal) {
		j.Step++
		j.Check = c
		a.tell(j, now, notes)
	})
}

// look asks the server, verifies all that it says, and stages what is new. It
// changes nothing unless every step agrees.
func (a *Agent) look(ctx context.Context, o observation) (Check, error) {
	var none Check
	if o.FactsErr != nil {
		return none, o.FactsErr
	}
	anchor, policy, err := a.trusted()
	if err != nil {
		return none, err
	}
	if o.Loader == nil {
		return none, o.LoaderErr // without its record we could stage what it must refuse
	}
	answer, err := a.cfg.Server.Check(ctx, wire.CheckRequest{Facts: o.Facts, Sequence: o.loaded(), State: a.State()})
	if err != nil {
		return none, err
	}
	snapshot, err := a.cfg.Repository.Refresh(ctx, anchor, time.Now())
	if err != nil {
		return none, err
	}
	// A bad notice keeps nobody from a good livepatch, and is told all the same.
	noticeErr := a.takeNotice(ctx, snapshot, o.Facts.Kernel)
	if h, err := a.halted(policy); err != nil {
		return none, err
	} else if h != nil {
		return none, a.haltError(h)
	}
	c, err := a.follow(ctx, o, anchor, policy, snapshot, answer)
	if err == nil && noticeErr != nil {
		return none, noticeErr
	}
	return c, err
}

// follow stages what the server offers, if there is no reason against it.
func (a *Agent) follow(ctx context.Context, o observation, anchor *trust.Anchor, policy *translog.Policy, snapshot Snapshot, answer wire.CheckAnswer) (Check, error) {
	var none Check
	recalls, err := a.takeRecalls(ctx, snapshot, anchor, o)
	if err != nil {
		return none, err
	}
	anchor = without(anchor, recalls)
	if answer.Offer == nil {
		return Check{Result: resultCurrent, Code: fault.Code(answer.Reason)}, nil
	}
	offer := *answer.Offer
	if err := recalls.Check(o.Facts.Kernel.ID, offer.Sequence); err != nil {
		return none, untrusted(err)
	}
	j := a.journal()
	if code, text := o.stopped(j); code != "" {
		return Check{Result: resultCurrent, Code: code, Text: text}, nil
	}
	if b, ok := j.isBlocked(o.Facts.Kernel.ID, offer.Sequence); ok {
		return Check{Result: resultCurrent, Code: "blocked", Text: b.Text}, nil
	}
	if offer.Sequence == o.highest() && o.loaded() == 0 {
		// Confirmed once and not in the kernel: putting it back is the
		// loader's own work, at boot.
		return Check{Result: resultCurrent, Code: "loaded_at_boot_only"}, nil
	}
	if j.Work != nil && j.Work.Sequence >= offer.Sequence {
		return Check{Result: resultCurrent, Code: "staged"}, nil
	}
	if err := livepatch.CheckReplace(o.floor(), offer.Sequence); err != nil {
		return none, untrusted(err)
	}
	m, b, raw, err := fetch(ctx, snapshot, anchor, offer, o.Facts.Kernel)
	if err != nil {
		return none, err
	}
	if err := a.checkLog(ctx, snapshot, policy, offer.Target, raw); err != nil {
		return none, err
	}
	if err := livepatch.CheckReplace(o.floor(), m.Sequence); err != nil {
		return none, untrusted(err)
	}
	return Check{Result: resultOffered, Code: fault.Code(answer.Reason)}, a.stage(offer.Target, m, b)
}

// untrusted makes a refusal out of a conflict: the server offered what it may
// never offer.
func untrusted(err error) error {
	return fault.New(fault.Untrusted, fault.CodeOf(err), "offer of the server: %w", err).
		WithHint("tell whoever runs the server: it offered what this machine must refuse")
}

// fetch gets an offered livepatch and verifies it from the outside in: the
// signed list of targets, the target's digest, the bundle's form, the manifest
// signature, the kernel build, its own path, the module's digests.
func fetch(ctx context.Context, s Snapshot, anchor *trust.Anchor, offer wire.Offer, running kernel.Build) (m livepatch.Manifest, b livepatch.Bundle, raw []byte, err error) {
	raw, err = s.Fetch(ctx, offer.Target, livepatch.MaxBundle)
	if fault.KindOf(err) == fault.NotFound {
		err = untrusted(err)
	}
	if err != nil {
		return m, b, nil, err
	}
	if b, err = livepatch.ParseBundle(raw); err != nil {
		return m, b, nil, err
	}
	if m, err = anchor.OpenManifest(b.Manifest); err != nil {
		return m, b, nil, err
	}
	if err := kernel.Fits(m.Kernel, running); err != nil {
		return m, b, nil, err
	}
	if m.TargetPath() != offer.Target || m.Sequence != offer.Sequence {
		return m, b, nil, fault.New(fault.Untrusted, "wrong_target", "target %.200q with sequence %d holds %q with sequence %d", offer.Target, offer.Sequence, m.TargetPath(), m.Sequence)
	}
	return m, b, raw, checkModule(m.Module, b.Module)
}

func checkModule(want livepatch.Module, module []byte) error {
	short, long := sha256.Sum256(module), sha512.Sum512(module)
	if int64(len(module)) != want.Bytes || hex.EncodeToString(short[:]) != want.SHA256 || hex.EncodeToString(long[:]) != want.SHA512 {
		return fault.New(fault.Untrusted, "module_digest", "module %s: its bytes are not those of the manifest", want.Name)
	}
	return nil
}

const (
	stageDir    = "staged"
	manifestExt = ".manifest"
	moduleExt   = ".ko"
)

func (a *Agent) stagePath(s livepatch.Sequence, ext string) string {
	return filepath.Join(a.cfg.Dir, stageDir, s.ModuleName()+ext)
}

// stage puts a verified livepatch on disk, then says so in the journal. A
// crash in between leaves files that the next stage replaces.
func (a *Agent) stage(target string, m livepatch.Manifest, b livepatch.Bundle) error {
	if err := durable.WriteFile(a.stagePath(m.Sequence, moduleExt), b.Module, 0o600); err != nil {
		return err
	}
	if err := durable.WriteFile(a.stagePath(m.Sequence, manifestExt), b.Manifest, 0o600); err != nil {
		return err
	}
	w := &work{Target: target, Kernel: m.Kernel, Sequence: m.Sequence, Module: m.Module, Fixes: m.Fixes}
	if a.journal().Phase == wire.Stalled {
		if err := a.move(wire.Staged, nil); err != nil {
			return err
		}
	}
	return a.move(wire.Staged, func(j *journal) { j.Work = w },
		note{event: wire.EventStaged, sequence: m.Sequence, fixes: m.Fixes})
}

// unstage removes the files of all livepatches but one.
func (a *Agent) unstage(keep livepatch.Sequence) error {
	dir := filepath.Join(a.cfg.Dir, stageDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.TrimSuffix(strings.TrimSuffix(e.Name(), moduleExt), manifestExt) == keep.ModuleName() {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
