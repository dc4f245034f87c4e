// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/translog"
	"klatch/internal/wire"
)

// staged are the two files that the loader gets, open, as they were checked.
type staged struct{ manifest, module *os.File }

func (s staged) close() {
	for _, f := range []*os.File{s.manifest, s.module} {
		if f != nil {
			_ = f.Close() // opened for reading only
		}
	}
}

// shelfLife is how long after the end of the list that named it a livepatch may
// still be loaded from the disk: whoever was off line for longer does not know
// what was recalled meanwhile.
const shelfLife = 90 * 24 * time.Hour

// recheck checks a staged livepatch once more, from its files, by the anchor,
// the recalls and the log policy of this moment: days may have passed since it
// was staged, for a tracer, a stall, or an owner who wanted it so. It needs no
// network. The descriptors that it read are the ones that the loader gets.
func (a *Agent) recheck(w work) (_ staged, err error) {
	var s staged
	defer func() {
		if err != nil {
			s.close()
			err = at(StepRecheck, err)
		}
	}()
	if now := time.Now(); !w.Until.IsZero() && now.After(w.Until) {
		return s, fault.New(fault.Untrusted, "list_expired", "the signed list that named livepatch %d ended more than %d days ago", w.Sequence, int(shelfLife.Hours()/24)).
			WithHint("bring the machine to its server: klatch check")
	}
	anchor, policy, err := a.trusted()
	if err != nil {
		return s, err
	}
	recalls := a.keptRecalls(anchor)
	anchor = without(anchor, recalls)
	signed, err := open(a.stagePath(w.Sequence, manifestExt), livepatch.MaxManifest, &s.manifest)
	if err != nil {
		return s, err
	}
	module, err := open(a.stagePath(w.Sequence, moduleExt), livepatch.MaxModule, &s.module)
	if err != nil {
		return s, err
	}
	m, err := anchor.OpenManifest(signed)
	if err != nil {
		return s, err
	}
	o := a.lastSeen()
	err = cmp.Or(recalls.Check(m.Kernel.ID, m.Sequence), livepatch.CheckReplace(o.floor(), m.Sequence),
		meant(m, o.Facts.Kernel, wire.Offer{Target: w.Target, Sequence: w.Sequence}), checkModule(m.Module, module))
	if err != nil || policy == nil {
		return s, err
	}
	proof, err := durable.ReadFile(a.stagePath(w.Sequence, proofExt), translog.MaxProof)
	if errors.Is(err, fs.ErrNotExist) {
		return s, fault.New(fault.Untrusted, translog.CodeNoProof, "livepatch %d was staged when no log proof was asked for", w.Sequence)
	}
	if err != nil {
		return s, err
	}
	_, err = policy.Verify(proof, translog.EntryOf(w.Target, livepatch.Bundle{Manifest: signed, Module: module}.Encode()))
	return s, err
}

// open reads a file and keeps it open.
func open(path string, limit int64, keep **os.File) ([]byte, error) {
	f, err := durable.Open(path)
	if err != nil {
		return nil, fault.New(fault.Internal, "staged_damaged", "read what was staged: %w", err)
	}
	*keep = f
	b, err := durable.ReadLimited(f, path, limit)
	if err != nil {
		return nil, fault.New(fault.Internal, "staged_damaged", "read what was staged: %w", err)
	}
	return b, nil
}

// drop gives up what was staged and is not good any more. The next check judges
// anew what is offered.
func (a *Agent) drop(ctx context.Context, w work, err error) error {
	a.log.LogAttrs(ctx, slog.LevelWarn, "staged livepatch dropped", slog.Any("sequence", w.Sequence), slog.String("err", err.Error()))
	n := note{event: wire.EventRefused, sequence: w.Sequence, code: codeOr(err, "staged_damaged"), text: err.Error()}
	if err := a.unstage(0); err != nil {
		return err
	}
	return a.move(wire.Idle, nil, n)
}
