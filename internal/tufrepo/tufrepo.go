// SPDX-License-Identifier: Apache-2.0

// Package tufrepo writes a TUF repository into a folder that any web server
// can serve. It owns the order of the writes, the versions and the expiries;
// it must not know what a target means. Reading a repository is package
// tufclient.
//
// Layout, with consistent snapshots (TUF specification 1.0, section 6.2):
//
//	metadata/N.root.json, N.targets.json, N.<release role>.json,
//	         N.snapshot.json, timestamp.json
//	targets/<folder>/<sha256>.<name>
//
// The top role "targets" delegates to release roles, each terminating, each
// with one pattern that no other one overlaps: one parent, no diamonds.
//
// Start with Publish. Its order is what makes it safe to die anywhere: targets
// first, then the metadata that names them, timestamp.json last. Until that
// last rename a client sees the old repository, after it the new one. No
// version number is used twice, so a file that a dead run left behind is never
// overwritten: the next run takes the next number.
//
// Where keys are with several people, Publish and Prepare return a Draft:
// metadata that waits for signatures. Each person adds theirs (Draft.Sign) and
// Complete writes the result.
package tufrepo

import (
	"context"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
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
// is online; root and targets are signed by hand. A top list without release
// roles holds the livepatches itself and lives as long as a release role.
const (
	RootLife      = 365 * 24 * time.Hour
	TargetsLife   = 180 * 24 * time.Hour
	ReleaseLife   = 60 * 24 * time.Hour
	SnapshotLife  = 7 * 24 * time.Hour
	TimestampLife = 48 * time.Hour
)

// Role is one role's signers and how many of them must sign.
type Role struct {
	Signers   []crypto.Signer
	Threshold int
}

// Keys are the signers at hand. Init needs those of the four top roles with
// their thresholds; everything later asks the metadata which keys a role has,
// and uses those that are here.
type Keys struct {
	Root, Targets, Snapshot, Timestamp Role
	Release                            Role // of all release roles; the threshold is not used
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
// Targets that are there already stay. A target goes into the list of the
// release role whose pattern it matches, else into the top list. Roles that
// are not there yet are delegated first, and take over their targets.
type Publication struct {
	Targets  []Target
	Withdraw []string
	Roles    []ReleaseRole
	Operator []OperatorRole // select and promotion, of an operator's repository
}

// Result says what the repository holds now.
type Result struct {
	Root, Targets, Snapshot, Timestamp int64            // versions
	Release                            map[string]int64 // by release role
	Expires                            time.Time
	Changed                            bool   // false: everything was published already
	Draft                              *Draft // not nil: nothing is published before others have signed
}

// Init makes the folder and signs the first root. Repeating it on a folder
// that has a root is a conflict. It returns the root for the trust anchor.
func Init(ctx context.Context, dir string, keys Keys, now time.Time) ([]byte, error) {
	d := newDisk(dir, nil)
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
	return Repository{Dir: dir}.Publish(ctx, p, keys, now)
}

// Refresh signs again what has lived through half of its life: the timestamp,
// the snapshot and, if the keys are there, the lists of targets.
func Refresh(ctx context.Context, dir string, keys Keys, now time.Time) (Result, error) {
	return Publish(ctx, dir, Publication{}, keys, now)
}

// Repository is a folder whose versions somebody else remembers too.
type Repository struct {
	Dir string
	// Least is the least version that a role may get next; nil where the
	// folder alone knows. A folder that was put back from a backup has
	// forgotten versions that clients have seen. Roots are not asked for: they
	// are numbered without a gap.
	Least func(role string) int64
}

// Publish is as the function of that name.
func (r Repository) Publish(ctx context.Context, p Publication, keys Keys, now time.Time) (Result, error) {
	d := newDisk(r.Dir, r.Least)
	unlock, err := d.lock()
	if err != nil {
		return Result{}, err
	}
	res, err := d.publish(ctx, p, keys, now)
	return res, errors.Join(err, unlock())
}

// disk is the folder and the three operations that change it, so that a test
// can make each of them fail.
type disk struct {
	dir    string
	write  func(name string, content []byte, mode fs.FileMode) error
	mkdir  func(name string, mode fs.FileMode) error
	remove func(dir string) error // left-over temporary files
	least  func(role string) int64
}

func newDisk(dir string, least func(string) int64) disk {
	if least == nil {
		least = func(string) int64 { return 0 }
	}
	return disk{dir, durable.WriteFile, os.MkdirAll, durable.RemoveTemp, least}
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
	all, err := newBag(keys)
	if err != nil {
		return nil, err
	}
	if err := sign(root, all, rootGroup(root, metadata.ROOT)); err != nil {
		return nil, err
	}
	if err := enough(root, metadata.ROOT, root); err != nil {
		return nil, err
	}
	b, err := encode(root)
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
	have, err := d.begin(now)
	if err != nil {
		return none, err
	}
	all, err := newBag(keys)
	if err != nil {
		return none, err
	}
	next, err := d.plan(have, p, all, now)
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
	return d.signAndApply(ctx, have, next, all, "publish", now)
}

// begin makes the folders, clears what a dead run left, and reads what is in
// force.
func (d disk) begin(now time.Time) (have, error) {
	for _, sub := range []string{"metadata", "targets"} {
		if err := d.mkdir(filepath.Join(d.dir, sub), 0o755); err != nil {
			return have{}, err
		}
	}
	if err := d.remove(filepath.Join(d.dir, "metadata")); err != nil {
		return have{}, err
	}
	h, err := d.load()
	if err != nil {
		return h, err
	}
	if h.root.Signed.IsExpired(now) {
		return h, fault.New(fault.Untrusted, "metadata_expired", "root %d expired at %s", h.root.Signed.Version, h.root.Signed.Expires.Format(time.RFC3339)).
			WithHint("sign a new root: klatch-forge keys renew root")
	}
	return h, nil
}

// plan makes the lists that a publication changes, and those that have lived
// through half of their life and can be signed here; unsigned.
func (d disk) plan(h have, p Publication, keys bag, now time.Time) (proposal, error) {
	next := proposal{lists: map[string]*listMeta{}}
	lists := map[string]*listMeta{metadata.TARGETS: copyList(h.top())}
	top := lists[metadata.TARGETS]
	changed := map[string]bool{metadata.TARGETS: h.top() == nil}
	for _, r := range delegations(top) {
		lists[r.Name] = copyList(h.lists[r.Name].meta)
	}
	for _, r := range p.Roles {
		if lists[r.Name()] != nil {
			continue
		}
		moved, err := delegate(top, r)
		if err != nil {
			return next, err
		}
		lists[r.Name()] = moved
		changed[metadata.TARGETS], changed[r.Name()] = true, true
	}
	if err := delegateOperator(top, lists, changed, p.Operator); err != nil {
		return next, err
	}
	for _, t := range p.Targets {
		role := owner(top, t.Path)
		added, err := put(lists[role], t)
		if err != nil {
			return next, err
		}
		changed[role] = changed[role] || added
	}
	for _, name := range p.Withdraw {
		for role, l := range lists {
			if _, there := l.Signed.Targets[name]; there {
				delete(l.Signed.Targets, name)
				changed[role] = true
			}
		}
	}
	for role, l := range lists {
		old := h.lists[role].meta
		if !changed[role] && (!halfGone(old.Signed.Expires, life(role, l), now) || !h.canSign(role, keys)) {
			continue
		}
		if err := d.renew(h, role, l, now); err != nil {
			return next, err
		}
		next.lists[role] = l
	}
	return next, nil
}

// renew gives a list its next version and a whole life.
func (d disk) renew(h have, role string, l *listMeta, now time.Time) (err error) {
	l.Signed.Expires = expiry(now, life(role, l))
	l.Signed.Version, err = d.nextVersion(role, h.listVersion(role))
	return err
}

func life(role string, l *listMeta) time.Duration {
	switch role {
	case RoleSelect:
		return SelectLife
	case RolePromotion:
		return PromotionLife
	}
	if role == metadata.TARGETS && len(delegations(l)) > 0 {
		return TargetsLife
	}
	return ReleaseLife
}

// owner is the role whose list a target belongs into.
func owner(top *listMeta, name string) string {
	for _, r := range delegations(top) {
		if ok, err := r.IsDelegatedPath(name); err == nil && ok {
			return r.Name
		}
	}
	return metadata.TARGETS
}

// put adds a target to a list and says whether that changed it.
func put(l *listMeta, t Target) (bool, error) {
	if err := checkPath(t.Path); err != nil {
		return false, err
	}
	f := metadata.TargetFile()
	f.Path, f.Length = t.Path, int64(len(t.Content))
	sum, err := hex.DecodeString(digest(t.Content))
	if err != nil {
		return false, err
	}
	f.Hashes = metadata.Hashes{"sha256": sum} // one only: go-tuf picks any of several for the file name
	if t.Custom != nil {
		f.Custom = &t.Custom
	}
	old, there := l.Signed.Targets[t.Path]
	switch {
	case there && !old.Equal(*f) && !t.Replace:
		return false, fault.New(fault.Conflict, "target_exists", "target %s is published with other content", t.Path).
			WithHint("a published file never changes; publish a higher sequence")
	case there && old.Equal(*f) && sameJSON(old.Custom, f.Custom):
		return false, nil
	}
	l.Signed.Targets[t.Path] = f
	return true, nil
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
