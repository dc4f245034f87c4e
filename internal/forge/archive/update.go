// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// listsFresh is how long downloaded package lists are used again. Security
// uploads are days apart.
const listsFresh = 6 * time.Hour

// Update fetches the package lists unless those on disk are fresh. Where
// another process fetches them it waits for that one and takes its lists.
func (a *Archive) Update(ctx context.Context, force bool) error {
	asked := time.Now()
	if a.fresh(asked.Add(-listsFresh)) && !force {
		return nil
	}
	unlock, err := a.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock() //nolint:errcheck // nothing was written
	if a.fresh(asked) || a.fresh(asked.Add(-listsFresh)) && !force {
		return nil // by the one that we waited for
	}
	if _, err := a.apt(ctx, a.dir, "apt-get", "-q", "update", "--error-on=any"); err != nil {
		return err
	}
	return os.WriteFile(a.path("updated"), nil, 0o644) //nolint:forbidigo // a time stamp, losing it costs one update
}

func (a *Archive) fresh(since time.Time) bool {
	st, err := os.Stat(a.path("updated"))
	return err == nil && st.ModTime().After(since)
}

// lock is ours, not apt's: apt fails at once where its own is taken.
func (a *Archive) lock(ctx context.Context) (func() error, error) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for told := false; ; told = true {
		unlock, err := durable.Lock(a.path("klatch.lock"))
		if fault.CodeOf(err) != "locked" {
			return unlock, err
		}
		if !told && a.Say != nil {
			a.Say("another process fetches the package lists; waiting for it")
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-tick.C:
		}
	}
}

// partOld is the age at which the folder of a download belongs to nobody: a
// package takes minutes.
const partOld = 24 * time.Hour

// removeOldParts removes what downloads that were killed have left.
func (a *Archive) removeOldParts() error {
	parts, err := filepath.Glob(filepath.Join(a.path("debs"), ".part-*"))
	if err != nil {
		return err
	}
	for _, p := range parts {
		if st, err := os.Stat(p); err == nil && time.Since(st.ModTime()) > partOld {
			if err := os.RemoveAll(p); err != nil {
				return err
			}
		}
	}
	return nil
}
