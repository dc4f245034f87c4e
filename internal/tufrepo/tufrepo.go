// SPDX-License-Identifier: Apache-2.0

// Package tufrepo writes a TUF repository into a folder that any web server
// can serve. It owns the order of the writes, the versions and the expiries;
// it must not know what a target means. Reading a repository is package
// tufclient.
//
// Layout, with consistent snapshots (TUF specification 1.0, section 6.2):
//
//	metadata/N.root.json, N.targets.json, N.snapshot.json, timestamp.json
//	targets/<folder>/<sha256>.<name>
//
// Start with Publish. Its order is what makes it safe to die anywhere: targets
// first, then the metadata that names them, timestamp.json last. Until that
// last rename a client sees the old repository, after it the new one. No
// version number is used twice, so a file that a dead run left behind is never
// overwritten: the next run takes the next number.
package tufrepo

import (
	"context"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// How long each role's metadata lives. The timestamp is what tells a machine
// that nobody withholds news from it, so it is short and signed by a key that
// is online; the root is signed by hand.
const (
	RootLife      = 365 * 24 * time.Hour
	TargetsLife   = 60 * 24 * time.Hour
	SnapshotLife  = 7 * 24 * time.Hour
	TimestampLife = 48 * time.Hour
)

// Role is one role's signers and how many of them must sign.
type Role struct {
	Signers   []crypto.Signer
	Threshold int
}

// Keys are the signers of the four roles. Publish needs all but Root; Refresh
// needs Snapshot and Timestamp, and Targets only when targets run out.
type Keys struct {
	Root, Targets, Snapshot, Timestamp Role
}

// Target is one file to publish. Custom is a JSON value that the metadata
// carries with it; it may be nil.
type Target struct {
	Path    string
	Content []byte
	Custom  json.RawMessage
	// Replace lets the content take the place of other content under the same
	// path: for what is said anew, never for what is loaded. Metadata before
	// this one still leads to the old content.
	Replace bool
}

// Publication is what to add to the repository and what to stop offering.
// Targets that are there already stay.
type Publication struct {
	Targets  []Target
	Withdraw []string
}

// Result says what the repository holds now.
type Result struct {
	Root, Targets, Snapshot, Timestamp int64 // versions
	Expires                            time.Time
	Changed                            bool // false: everything was published already
}

// Init makes the folder and signs the first root. Repeating it on a folder
// that has a root is a conflict. It returns the root for the trust anchor.
func Init(ctx context.Context, dir string, keys Keys, now time.Time) ([]byte, error) {
	d := newDisk(dir)
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	root, err := d.init(ctx, keys, now)
	return root, errors.Join(err, unlock())
}

// Publish adds and withdraws targets. What is there already, byte for byte, is
// left alone; other content under a name that is taken is a conflict, because
// a published livepatch never changes (but see Target.Replace). After a crash at any point the same call
// completes the work.
func Publish(ctx context.Context, dir string, p Publication, keys Keys, now time.Time) (Result, error) {
	d := newDisk(dir)
	unlock, err := d.lock()
	if err != nil {
		return Result{}, err
	}
	r, err := d.publish(ctx, p, keys, now)
	return r, errors.Join(err, unlock())
}

// Refresh signs again what has lived through half of its life: the timestamp,
// the snapshot and, if the keys are there, the targets.
func Refresh(ctx context.Context, dir string, keys Keys, now time.Time) (Result, error) {
	return Publish(ctx, dir, Publication{}, keys, now)
}

// disk is the folder and the three operations that change it, so that a test
// can make each of them fail.
type disk struct {
	dir    string
	write  func(name string, content []byte, mode fs.FileMode) error
	mkdir  func(name string, mode fs.FileMode) error
	remove func(dir string) error // left-over temporary files
}

func newDisk(dir string) disk {
	return disk{dir, durable.WriteFile, os.MkdirAll, durable.RemoveTemp}
}

func (d disk) lock() (func() error, error) {
	if err := os.MkdirAll(d.dir, 0o755); err != nil {
		return nil, err
	}
	return durable.Lock(filepath.Join(d.dir, ".lock"))
}

func (d disk) metadata(name string) string { return filepath.Join(d.dir, "metadata", name) }

func (d disk) init(ctx context.Context, keys Keys, now time.Time) ([]byte, error) {
	if err := d.mkdir(filepath.Join(d.dir, "metadata"), 0o755); err != nil {
		return nil, err
	}
	if err := d.mkdir(filepath.Join(d.dir, "targets"), 0o755); err != nil {
		return nil, err
	}
	versions, err := d.versions(metadata.ROOT)
	if err != nil {
		return nil, err
	}
	if len(versions) > 0 {
		return nil, fault.New(fault.Conflict, "repository_exists", "repository %s has a root already", d.dir).
			WithHint("publish into it, or choose another folder")
	}
	root := metadata.Root(expiry(now, RootLife))
	for _, r := range []struct {
		name string
		role Role
	}{{metadata.ROOT, keys.Root}, {metadata.TARGETS, keys.Targets}, {metadata.SNAPSHOT, keys.Snapshot}, {metadata.TIMESTAMP, keys.Timestamp}} {
		if r.role.Threshold < 1 || r.role.Threshold > len(r.role.Signers) {
			return nil, fault.New(fault.Invalid, "bad_threshold", "role %s: threshold %d of %d keys", r.name, r.role.Threshold, len(r.role.Signers))
		}
		for _, s := range r.role.Signers {
			k, err := metadata.KeyFromPublicKey(s.Public())
			if err != nil {
				return nil, fmt.Errorf("role %s: key: %w", r.name, err)
			}
			if err := root.Signed.AddKey(k, r.name); err != nil {
				return nil, fmt.Errorf("role %s: key: %w", r.name, err)
			}
		}
		if n := len(root.Signed.Roles[r.name].KeyIDs); n != len(r.role.Signers) {
			return nil, fault.New(fault.Invalid, "bad_threshold", "role %s: one key is listed twice", r.name)
		}
		root.Signed.Roles[r.name].Threshold = r.role.Threshold
	}
	b, err := sign(root, root, metadata.ROOT, keys.Root)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return b, d.write(d.metadata("1.root.json"), b, 0o644)
}

func (d disk) publish(ctx context.Context, p Publication, keys Keys, now time.Time) (Result, error) {
	var none Result
	for _, sub := range []string{"metadata", "targets"} {
		if err := d.mkdir(filepath.Join(d.dir, sub), 0o755); err != nil {
			return none, err
		}
	}
	if err := d.remove(filepath.Join(d.dir, "metadata")); err != nil {
		return none, err
	}
	have, err := d.load()
	if err != nil {
		return none, err
	}
	if have.root.Signed.IsExpired(now) {
		return none, fault.New(fault.Untrusted, "metadata_expired", "root %d expired at %s", have.root.Signed.Version, have.root.Signed.Expires.Format(time.RFC3339)).
			WithHint("sign a new root: docs/howto/rotate-keys.md")
	}

	targets, changed, err := have.merge(p, now)
	if err != nil {
		return none, err
	}
	for _, t := range p.Targets {
		if err := ctx.Err(); err != nil {
			return none, err
		}
		if err := d.putTarget(t); err != nil {
			return none, err
		}
	}
	if halfGone(have.targetsExpires(), TargetsLife, now) && len(keys.Targets.Signers) >= keys.Targets.Threshold && keys.Targets.Threshold > 0 {
		changed = true
	}
	targetsBytes := have.targetsBytes
	if changed || have.targets == nil {
		targets.Signed.Expires = expiry(now, TargetsLife)
		if targets.Signed.Version, err = d.nextVersion(metadata.TARGETS, have.targetsVersion()); err != nil {
			return none, err
		}
		if targetsBytes, err = writeVersioned(d, targets, have.root, metadata.TARGETS, keys.Targets); err != nil {
			return none, err
		}
	} else {
		targets = have.targets
	}

	snapshot, snapshotBytes := have.snapshot, have.snapshotBytes
	newSnapshot := changed || snapshot == nil || halfGone(snapshot.Signed.Expires, SnapshotLife, now)
	if newSnapshot {
		if err := ctx.Err(); err != nil {
			return none, err
		}
		snapshot = metadata.Snapshot(expiry(now, SnapshotLife))
		snapshot.Signed.Meta = map[string]*metadata.MetaFiles{"targets.json": describe(targetsBytes, targets.Signed.Version)}
		if snapshot.Signed.Version, err = d.nextVersion(metadata.SNAPSHOT, have.snapshotVersion()); err != nil {
			return none, err
		}
		if snapshotBytes, err = writeVersioned(d, snapshot, have.root, metadata.SNAPSHOT, keys.Snapshot); err != nil {
			return none, err
		}
	}

	timestamp := have.timestamp
	newTimestamp := newSnapshot || timestamp == nil || halfGone(timestamp.Signed.Expires, TimestampLife, now)
	if newTimestamp {
		if err := ctx.Err(); err != nil {
			return none, err
		}
		timestamp = metadata.Timestamp(expiry(now, TimestampLife))
		timestamp.Signed.Version = have.timestampVersion() + 1
		timestamp.Signed.Meta = map[string]*metadata.MetaFiles{"snapshot.json": describe(snapshotBytes, snapshot.Signed.Version)}
		b, err := sign(timestamp, have.root, metadata.TIMESTAMP, keys.Timestamp)
		if err != nil {
			return none, err
		}
		if err := d.write(d.metadata("timestamp.json"), b, 0o644); err != nil {
			return none, err
		}
	}
	return Result{
		Root: have.root.Signed.Version, Targets: targets.Signed.Version,
		Snapshot: snapshot.Signed.Version, Timestamp: timestamp.Signed.Version,
		Expires: timestamp.Signed.Expires, Changed: newTimestamp,
	}, nil
}

// putTarget writes a target under its digest. A file that is there with the
// right content stays as it is.
func (d disk) putTarget(t Target) error {
	name := filepath.Join(d.dir, "targets", filepath.FromSlash(blobPath(t)))
	if old, err := durable.ReadFile(name, int64(len(t.Content))); err == nil && string(old) == string(t.Content) {
		return nil
	}
	if err := d.mkdir(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	for dir := filepath.Dir(name); len(dir) >= len(d.dir); dir = filepath.Dir(dir) {
		if err := durable.SyncDir(dir); err != nil {
			return err
		}
	}
	return d.write(name, t.Content, 0o644)
}

// Has says whether the folder holds this content under the target's name. The
// metadata may not name it yet, where a run died.
func Has(dir string, t Target) bool {
	old, err := durable.ReadFile(filepath.Join(dir, "targets", filepath.FromSlash(blobPath(t))), int64(len(t.Content)))
	return err == nil && string(old) == string(t.Content)
}

func blobPath(t Target) string {
	return path.Join(path.Dir(t.Path), digest(t.Content)+"."+path.Base(t.Path))
}

var segment = regexp.MustCompile(`^[0-9A-Za-z_][0-9A-Za-z.+~_-]{0,127}$`)

// checkPath refuses names that a file system or a URL could read otherwise
// than we mean them.
func checkPath(p string) error {
	parts := strings.Split(p, "/")
	if len(p) > 512 || slices.ContainsFunc(parts, func(s string) bool { return !segment.MatchString(s) }) {
		return fault.New(fault.Invalid, "bad_target_path", "%.160q is not a target path", p)
	}
	return nil
}

func (h have) merge(p Publication, now time.Time) (*metadata.Metadata[metadata.TargetsType], bool, error) {
	targets := metadata.Targets(expiry(now, TargetsLife))
	if h.targets != nil {
		maps.Copy(targets.Signed.Targets, h.targets.Signed.Targets)
		targets.Signed.Delegations = h.targets.Signed.Delegations
	}
	changed := false
	for _, t := range p.Targets {
		if err := checkPath(t.Path); err != nil {
			return nil, false, err
		}
		f := metadata.TargetFile()
		f.Path, f.Length = t.Path, int64(len(t.Content))
		sum, err := hex.DecodeString(digest(t.Content))
		if err != nil {
			return nil, false, err
		}
		f.Hashes = metadata.Hashes{"sha256": sum} // one only: go-tuf picks any of several for the file name
		if t.Custom != nil {
			f.Custom = &t.Custom
		}
		old, there := targets.Signed.Targets[t.Path]
		switch {
		case there && !old.Equal(*f) && !t.Replace:
			return nil, false, fault.New(fault.Conflict, "target_exists", "target %s is published with other content", t.Path).
				WithHint("a published file never changes; publish a higher sequence")
		case there && old.Equal(*f) && sameJSON(old.Custom, f.Custom):
			continue
		}
		targets.Signed.Targets[t.Path] = f
		changed = true
	}
	for _, name := range p.Withdraw {
		if _, there := targets.Signed.Targets[name]; there {
			delete(targets.Signed.Targets, name)
			changed = true
		}
	}
	return targets, changed, nil
}
