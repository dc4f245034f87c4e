// SPDX-License-Identifier: Apache-2.0

package repo

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/server/archive"
	"klatch/internal/server/blob"
)

// MoveTo copies all files of the copy to another store, reads each back there,
// verifies the whole there as a stranger would, and then commits. No sync
// runs meanwhile. The old files stay; a run that was stopped goes on where it
// was, and until commit has returned the old place is the one that counts.
func (r *Repo) MoveTo(ctx context.Context, to blob.Store, tell func(done, total int, name string), commit func() error, now time.Time) (files int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := os.MkdirAll(r.memory, 0o700); err != nil {
		return 0, err
	}
	unlock, err := r.lock(ctx)
	if err != nil {
		return 0, err
	}
	files, err = r.moveTo(ctx, to, tell, now)
	if err == nil {
		err = commit()
	}
	return files, errors.Join(err, unlock())
}

func (r *Repo) moveTo(ctx context.Context, to blob.Store, tell func(done, total int, name string), now time.Time) (int, error) {
	there := New(to, r.memory, r.anchor, r.log)
	if _, _, err := there.look(ctx, now); err != nil && fault.CodeOf(err) != codeEmpty {
		if k := fault.KindOf(err); k == fault.Unavailable || k == fault.Denied || fault.CodeOf(err) == "no_bucket" {
			return 0, err
		}
		return 0, fault.New(fault.Conflict, "storage_taken", "%s holds a repository that this server's anchor does not verify: %w", to.Place(), err).
			WithHint("choose an empty folder or prefix")
	}
	before, _, err := r.look(ctx, now)
	if fault.CodeOf(err) == codeEmpty {
		return 0, nil // nothing to copy yet
	}
	if err != nil {
		return 0, err
	}
	names, err := r.files.List(ctx, "")
	if err != nil {
		return 0, err
	}
	names = slices.DeleteFunc(names, func(n string) bool { return !Servable(n) })
	slices.SortStableFunc(names, func(a, b string) int { return cmp.Compare(rank(a), rank(b)) })
	for i, n := range names {
		if tell != nil {
			tell(i, len(names), n)
		}
		if err := copyFile(ctx, r.files, to, n); err != nil {
			return i, err
		}
	}
	if err := there.load(ctx, now); err != nil {
		return len(names), err
	}
	c := there.Catalog()
	if c.Version != before.Timestamp || len(c.Problems) > 0 {
		return len(names), fault.New(fault.Untrusted, "move_incomplete", "%s holds metadata %d, want %d; damaged: %s", to.Place(), c.Version, before.Timestamp, strings.Join(c.Problems, "; ")).
			WithHint("nothing was switched; copy at this server first (klatch-server sync), then repeat")
	}
	return len(names), nil
}

// rank orders the files so that the new place is whole at every moment for who
// reads it: first what metadata names, the timestamp last.
func rank(name string) int {
	switch {
	case name == "metadata/timestamp.json":
		return 2
	case strings.HasPrefix(name, "metadata/"):
		return 1
	}
	return 0
}

// copyFile writes a file and reads it back. One that is there already, whole,
// is left alone.
func copyFile(ctx context.Context, from, to blob.Store, name string) error {
	content, err := blob.Read(ctx, from, name, archive.MaxFile)
	if err != nil {
		return err
	}
	if b, err := blob.Read(ctx, to, name, int64(len(content))); err == nil && bytes.Equal(b, content) {
		return nil
	}
	if err := to.Put(ctx, name, content, HeaderOf(name)); err != nil {
		return err
	}
	b, err := blob.Read(ctx, to, name, int64(len(content)))
	if err == nil && !bytes.Equal(b, content) {
		err = fault.New(fault.Unavailable, "storage_lies", "%s gives other bytes of %s than were written", to.Place(), name).
			WithHint("the new place cannot be used; nothing was switched")
	}
	return err
}
