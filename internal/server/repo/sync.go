// SPDX-License-Identifier: Apache-2.0

package repo

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/obs"
	"klatch/internal/tufclient"
)

// Source is where a copy comes from, and what of it is wanted.
type Source struct {
	BaseURL string
	Client  *http.Client
	Rules   Rules
	// Has says of an export which files it holds (by tufclient.BlobPath); what
	// it lacks is left out, not broken. Nil for a source that should hold all
	// that it does not list as left out.
	Has func(blobPath string) bool
	// Progress is told of each file before it is fetched; may be nil.
	Progress func(done, total int, t tufclient.Target)
}

// Result says what a Sync did.
type Result struct {
	Changed      bool
	Copied, Kept int
	Livepatches  int
	Recalls      int64 // version
	Version      int64
	Expires      time.Time
	Broken       []string  // nothing was switched because of these
	LeftOut      []LeftOut // livepatches that are not copied on purpose
}

// Sync brings the copy to the publisher's newest state: verify the metadata
// against the anchor, copy and open each file, then replace the metadata with
// the timestamp last. A file that is broken is reported, the others are still
// copied, and nothing is switched: the machines keep seeing the old state. Any
// failed run is completed by the next one.
//
// What the rules leave out, or the mirror above, is no problem: the metadata
// is taken whole, so recalls arrive at once, and the rest is not offered.
func (r *Repo) Sync(ctx context.Context, src Source, now time.Time) (Result, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := src.Rules.Validate(); err != nil {
		return Result{}, err
	}
	if err := os.MkdirAll(r.memory, 0o700); err != nil {
		return Result{}, err
	}
	unlock, err := r.lock(ctx)
	if err != nil {
		return Result{}, err
	}
	res, err := r.sync(ctx, src, now)
	return res, errors.Join(err, unlock())
}

// lockWait is how long another process, a sync by hand beside serve, is waited
// for.
const lockWait = 30 * time.Second

func (r *Repo) lock(ctx context.Context) (func() error, error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for {
		unlock, err := durable.Lock(filepath.Join(r.memory, ".lock"))
		if fault.CodeOf(err) != "locked" {
			return unlock, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-again.C:
		}
	}
}

func (r *Repo) sync(ctx context.Context, src Source, now time.Time) (Result, error) {
	snapshot, err := tufclient.Refresh(ctx, tufclient.Config{Root: r.anchor.Root, Dir: r.memory, BaseURL: src.BaseURL, Client: src.Client, Now: now})
	if err != nil {
		return Result{}, err
	}
	take, left, err := r.chosen(ctx, src, snapshot, now)
	if err != nil {
		return Result{}, err
	}
	res := Result{Version: snapshot.Timestamp, Expires: snapshot.Expires, LeftOut: bundlesOf(left)}
	current, chosen := r.Catalog(), fingerprint(take, left)
	if current.Version == snapshot.Timestamp && current.chosen == chosen && len(current.Problems) == 0 {
		res.Livepatches, res.Kept, res.Recalls = len(current.Entries), len(take), current.Recalls
		return res, r.syncLogs(ctx, snapshot) // the anchor may ask for one since
	}

	next := &Catalog{Publisher: r.anchor.Publisher, Version: snapshot.Timestamp, Expires: snapshot.Expires, LeftOut: bundlesOf(left), chosen: chosen}
	if err := r.copyTargets(ctx, src, snapshot, take, next, &res); err != nil {
		return res, err
	}
	if err := r.withdrawn(ctx, next, take); err != nil {
		return res, err
	}
	// The log goes before the metadata: a machine that sees a livepatch must
	// be able to compare the log.
	if err := r.syncLogs(ctx, snapshot); err != nil {
		return res, err
	}
	if next.leftSum, err = r.switchTo(ctx, snapshot, left); err != nil {
		return res, err
	}
	res.Changed, res.Livepatches, res.Recalls = true, len(next.Entries), next.Recalls
	r.install(next)
	return res, nil
}

// copyTargets brings each file here, whole, and opens the livepatches.
func (r *Repo) copyTargets(ctx context.Context, src Source, snapshot *tufclient.Snapshot, take []tufclient.Target, next *Catalog, res *Result) error {
	for i, t := range take {
		content, err := r.readTarget(ctx, t)
		fresh := err != nil
		if fresh {
			if src.Progress != nil {
				src.Progress(i, len(take), t)
			}
			content, err = snapshot.Download(ctx, t, limitOf(t))
		}
		var entry *Entry
		if err == nil {
			entry, err = r.open(t, content)
		}
		if err == nil && fresh {
			err = r.files.Put(ctx, targetName(t), content, HeaderOf(targetName(t)))
		}
		if err != nil {
			if ctx.Err() != nil {
				return err
			}
			r.log.LogAttrs(ctx, slog.LevelError, "file of the repository is broken", slog.String("target", t.Path), obs.Err(err))
			res.Broken = append(res.Broken, fmt.Sprintf("%s: %s", t.Path, err))
			continue
		}
		if fresh {
			res.Copied++
		} else {
			res.Kept++
		}
		if entry != nil {
			next.Entries = append(next.Entries, *entry)
		}
	}
	if len(res.Broken) == 0 {
		return nil
	}
	return fault.New(fault.Untrusted, "sync_broken", "%d of %d files are broken, the old state stays: %s", len(res.Broken), len(take), strings.Join(res.Broken, "; ")).
		WithHint("publish again at the source, then repeat; what was copied is kept")
}

// chosen reads what the source leaves out and divides the signed targets.
func (r *Repo) chosen(ctx context.Context, src Source, snapshot *tufclient.Snapshot, now time.Time) (take []tufclient.Target, left []LeftOut, err error) {
	absent := func(t tufclient.Target) (Why, bool) { return NotThere, !src.Has(tufclient.BlobPath(t)) }
	if src.Has == nil {
		above := map[string]LeftOut{}
		b, err := snapshot.Static(ctx, leftOutFile, maxLeftOut)
		if err == nil {
			above, err = parseLeftOut(b)
		}
		if err != nil && fault.KindOf(err) != fault.NotFound {
			return nil, nil, err
		}
		absent = func(t tufclient.Target) (Why, bool) {
			_, gone := above[t.Path]
			return ByUpstream, gone
		}
	}
	take, left = choose(snapshot.Targets(), src.Rules, func(t tufclient.Target) (Why, bool) {
		why, gone := absent(t)
		if gone {
			if _, err := r.readTarget(ctx, t); err == nil {
				gone = false // the source has it no more, we have
			}
		}
		return why, gone
	}, now)
	return take, left, nil
}

// switchTo replaces the metadata, timestamp.json last. While both states can
// be seen, the list of what is left out is that of both.
func (r *Repo) switchTo(ctx context.Context, snapshot *tufclient.Snapshot, left []LeftOut) (leftSum string, err error) {
	old, _, err := r.readLeftOut(ctx)
	if err != nil {
		return "", err
	}
	both := append([]LeftOut{}, left...)
	for _, l := range left {
		delete(old, l.Target)
	}
	for _, l := range old {
		both = append(both, l)
	}
	if _, err := r.writeLeftOut(ctx, both); err != nil {
		return "", err
	}
	for _, f := range snapshot.Files() { // timestamp.json is the last one
		if err := r.putFile(ctx, "metadata/"+f.Name, f.Content); err != nil {
			return "", err
		}
	}
	return r.writeLeftOut(ctx, left)
}
