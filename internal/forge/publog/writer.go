// SPDX-License-Identifier: Apache-2.0

package publog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"
	"k8s.io/klog/v2"

	"klatch/internal/fault"
	"klatch/internal/translog"
)

// patience bounds the wait for the log's own disk work. It writes a few files.
const patience = 2 * time.Minute

// writer is Tessera, opened for one run. It syncs what it writes, replaces
// files whole, and moves its tree state last, so a run that dies leaves the
// log as it was or as it was to be.
type writer struct {
	add1     func(context.Context, *tessera.Entry) tessera.IndexFuture
	shutdown func(context.Context) error
	reader   tessera.LogReader
	cancel   context.CancelFunc
	log      *Log
}

func (l *Log) openWriter(ctx context.Context) (*writer, error) {
	// Tessera tells its steps through klog; what matters comes back as errors.
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	signer, err := note.NewSigner(l.secret)
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_key", "log key: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	w, err := l.tessera(ctx, signer)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("open log %s: %w", l.Dir, err)
	}
	w.cancel = cancel
	return w, nil
}

func (l *Log) tessera(ctx context.Context, signer note.Signer) (*writer, error) {
	driver, err := posix.New(ctx, posix.Config{Path: l.Dir})
	if err != nil {
		return nil, err
	}
	a, shutdown, reader, err := tessera.NewAppender(ctx, driver, tessera.NewAppendOptions().
		WithCheckpointSigner(signer).
		WithCheckpointInterval(100*time.Millisecond). // the shortest that Tessera takes
		WithCheckpointRepublishInterval(0).
		WithBatching(1024, 5*time.Millisecond).
		WithGarbageCollectionInterval(0). // see prune
		WithShutdownTimeout(patience))
	if err != nil {
		return nil, err
	}
	return &writer{add1: a.Add, shutdown: shutdown, reader: reader, log: l}, nil
}

func (w *writer) close() { w.cancel() }

// add returns when a checkpoint covers the entries.
func (w *writer) add(ctx context.Context, entries []translog.Entry) error {
	var futures []tessera.IndexFuture
	for _, e := range entries {
		futures = append(futures, w.add1(ctx, tessera.NewEntry(e.Encode())))
	}
	for i, f := range futures {
		if _, err := f(); err != nil {
			return fmt.Errorf("add %s to the log: %w", entries[i].Target, err)
		}
	}
	if err := w.shutdown(ctx); err != nil {
		return fmt.Errorf("wait for the log's checkpoint: %w", err)
	}
	return nil
}

// settle waits until the newest checkpoint covers all that is in the tree.
func (w *writer) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		size, err := w.reader.IntegratedSize(ctx)
		if err != nil {
			return fmt.Errorf("read the log's tree: %w", err)
		}
		signed, err := w.reader.ReadCheckpoint(ctx)
		if err != nil {
			return fmt.Errorf("read the log's checkpoint: %w", err)
		}
		c, err := w.log.Policy.OpenUnwitnessed(signed)
		if err != nil {
			return err
		}
		switch have := uint64(c.Size); { //nolint:gosec // a checkpoint's size is not negative
		case have == size:
			return nil
		case have > size:
			return fault.New(fault.Conflict, translog.CodeRollback, "log %s has %d entries, its checkpoint says %d", w.log.Dir, size, have).
				WithHint("the folder was restored in part; restore all of it, or read docs/howto/audit-the-log.md")
		}
		select {
		case <-ctx.Done():
			return errors.Join(errors.New("wait for the log's checkpoint"), ctx.Err())
		case <-again.C:
		}
	}
}
