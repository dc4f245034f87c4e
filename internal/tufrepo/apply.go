// SPDX-License-Identifier: Apache-2.0

package tufrepo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// proposal is metadata of the offline roles that is to come into force: a new
// root or none, and the lists that change.
type proposal struct {
	root  *rootMeta
	lists map[string]*listMeta
}

// effective are the root and the top list that hold once the proposal does.
func (p proposal) effective(h have) (*rootMeta, *listMeta) {
	root, top := h.root, h.top()
	if p.root != nil {
		root = p.root
	}
	if l := p.lists[metadata.TARGETS]; l != nil {
		top = l
	}
	return root, top
}

// needs lists for a role the groups of keys that must sign, and the one that
// should: keys that clients know until they have the new root.
func (p proposal) needs(h have, role string) (must []group, should []group) {
	root, top := p.effective(h)
	switch {
	case role == metadata.ROOT:
		return []group{rootGroup(h.root, role), rootGroup(root, role)}, nil
	case role == metadata.TARGETS && p.root != nil:
		return []group{rootGroup(root, role)}, []group{rootGroup(h.root, role)}
	case role == metadata.TARGETS:
		return []group{rootGroup(root, role)}, nil
	}
	return []group{releaseGroup(top, role)}, nil
}

// canSign says whether enough of a role's keys are at hand.
func (h have) canSign(role string, keys bag) bool {
	must, _ := proposal{}.needs(h, role)
	for _, g := range must {
		n := 0
		for _, id := range g.ids {
			if keys[id] != nil {
				n++
			}
		}
		if n < g.threshold || g.threshold < 1 {
			return false
		}
	}
	return true
}

// sign adds the signatures of the keys at hand to all parts.
func (p proposal) sign(h have, keys bag) error {
	if p.root != nil {
		must, _ := p.needs(h, metadata.ROOT)
		if err := sign(p.root, keys, must...); err != nil {
			return err
		}
	}
	for role, l := range p.lists {
		must, should := p.needs(h, role)
		if err := sign(l, keys, append(must, should...)...); err != nil {
			return err
		}
	}
	return nil
}

// check asks of each part, as a client would, whether its signatures are
// enough.
func (p proposal) check(h have) error {
	root, top := p.effective(h)
	if p.root != nil {
		if err := enough(h.root, metadata.ROOT, p.root); err != nil {
			return err
		}
		if err := enough(p.root, metadata.ROOT, p.root); err != nil {
			return err
		}
	}
	for role, l := range p.lists {
		if role == metadata.TARGETS {
			if err := enough(root, role, l); err != nil {
				return err
			}
		} else if err := top.VerifyDelegate(role, l); err != nil {
			return fault.New(fault.Untrusted, "keys_not_in_role", "sign %s: clients would refuse the result: %w", role, err).
				WithHint("use the keys that targets %d names for %s", top.Signed.Version, role)
		}
	}
	return nil
}

func (d disk) signAndApply(ctx context.Context, h have, p proposal, keys bag, reason string, now time.Time) (Result, error) {
	if err := p.sign(h, keys); err != nil {
		return Result{}, err
	}
	if err := p.check(h); fault.KindOf(err) == fault.Untrusted {
		draft, derr := newDraft(h, p, reason, now)
		if derr != nil {
			return Result{}, derr
		}
		return Result{Root: h.root.Signed.Version, Draft: draft}, err
	} else if err != nil {
		return Result{}, err
	}
	return d.apply(ctx, h, p, keys, now)
}

// apply brings a proposal that is signed into force. Lists go first, each
// under a name that nothing points to yet; then the snapshot; then
// timestamp.json and the new root. Of these two the timestamp is first where
// everything that it leads to is signed for the old root too: a client accepts
// before, between and after. Without the old keys the root is first, and until
// the timestamp follows a client stays with what it has.
func (d disk) apply(ctx context.Context, h have, p proposal, keys bag, now time.Time) (Result, error) {
	var none Result
	root, _ := p.effective(h)
	in := maps.Clone(h.lists)
	// Release roles first: the top list never names a role without its file.
	for _, role := range slices.SortedFunc(maps.Keys(p.lists), topLast) {
		if err := ctx.Err(); err != nil {
			return none, err
		}
		b, err := d.putVersioned(role, p.lists[role].Signed.Version, p.lists[role])
		if err != nil {
			return none, err
		}
		in[role] = list{p.lists[role], b}
	}
	roots := []*rootMeta{root, h.root}
	snapshot, snapshotBytes, err := d.snapshot(h, p, in, roots, keys, now)
	if err != nil {
		return none, err
	}
	timestamp, timestampBytes, err := d.nextTimestamp(h, snapshot, snapshotBytes, online(in[metadata.TARGETS].meta, TimestampLife), roots, keys, now)
	if err != nil {
		return none, err
	}
	putTimestamp := func() error {
		if timestamp == h.timestamp {
			return nil
		}
		return d.write(d.metadata("timestamp.json"), timestampBytes, 0o644)
	}
	putRoot := func() error {
		if p.root == nil {
			return nil
		}
		_, err := d.putVersioned(metadata.ROOT, p.root.Signed.Version, p.root)
		return err
	}
	steps := []func() error{putTimestamp, putRoot}
	if p.root != nil && (h.root.VerifyDelegate(metadata.TARGETS, in[metadata.TARGETS].meta) != nil ||
		h.root.VerifyDelegate(metadata.SNAPSHOT, snapshot) != nil || h.root.VerifyDelegate(metadata.TIMESTAMP, timestamp) != nil) {
		slices.Reverse(steps)
	}
	for _, step := range steps {
		if err := ctx.Err(); err != nil {
			return none, err
		}
		if err := step(); err != nil {
			return none, err
		}
	}
	r := Result{
		Root: root.Signed.Version, Targets: in[metadata.TARGETS].meta.Signed.Version, Release: map[string]int64{},
		Snapshot: snapshot.Signed.Version, Timestamp: timestamp.Signed.Version,
		Expires: timestamp.Signed.Expires, Changed: timestamp != h.timestamp || p.root != nil,
	}
	for _, dr := range delegations(in[metadata.TARGETS].meta) {
		r.Release[dr.Name] = in[dr.Name].meta.Signed.Version
	}
	return r, nil
}

func topLast(a, b string) int {
	switch {
	case a == b:
		return 0
	case a == metadata.TARGETS:
		return 1
	case b == metadata.TARGETS:
		return -1
	case a < b:
		return -1
	}
	return 1
}

// putVersioned writes metadata under its version. The file may be there: of a
// run that died after it, with other signatures on the same content; then it
// stays as it is.
func (d disk) putVersioned(role string, version int64, m any) ([]byte, error) {
	var b []byte
	var err error
	switch m := m.(type) {
	case *rootMeta:
		b, err = encode(m)
	case *listMeta:
		b, err = encode(m)
	case *snapshotMeta:
		b, err = encode(m)
	}
	if err != nil {
		return nil, err
	}
	name := d.metadata(fmt.Sprintf("%d.%s.json", version, role))
	old, err := durable.ReadFile(name, maxMetadata)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return b, d.write(name, b, 0o644)
	case err != nil:
		return nil, err
	case sameSigned(old, b):
		return old, nil
	}
	return nil, fault.New(fault.Conflict, "draft_stale", "%s %d is there already with other content", role, version).
		WithHint("prepare it again; signatures on the old file count no more")
}

// sameSigned compares what was signed, not who has signed.
func sameSigned(a, b []byte) bool {
	var x, y struct {
		Signed json.RawMessage `json:"signed"`
	}
	if json.Unmarshal(a, &x) != nil || json.Unmarshal(b, &y) != nil {
		return false
	}
	var cx, cy bytes.Buffer
	return json.Compact(&cx, x.Signed) == nil && json.Compact(&cy, y.Signed) == nil && bytes.Equal(cx.Bytes(), cy.Bytes())
}

// snapshot makes and writes a new snapshot where the old one does not do:
// lists changed, half of its life is over, or the root in force has other keys
// for it. A role that was dropped keeps its line for ever: a client refuses a
// snapshot that forgets one.
func (d disk) snapshot(h have, p proposal, in map[string]list, roots []*rootMeta, keys bag, now time.Time) (*snapshotMeta, []byte, error) {
	life := online(in[metadata.TARGETS].meta, SnapshotLife)
	if len(p.lists) == 0 && h.snapshot != nil && !halfGone(h.snapshot.Signed.Expires, life, now) &&
		roots[0].VerifyDelegate(metadata.SNAPSHOT, h.snapshot) == nil {
		return h.snapshot, h.snapshotBytes, nil
	}
	m := metadata.Snapshot(expiry(now, life))
	m.Signed.Meta = map[string]*metadata.MetaFiles{}
	if h.snapshot != nil {
		maps.Copy(m.Signed.Meta, h.snapshot.Signed.Meta)
	}
	for role, l := range in {
		m.Signed.Meta[role+".json"] = describe(l.bytes, l.meta.Signed.Version)
	}
	var err error
	if m.Signed.Version, err = d.nextVersion(metadata.SNAPSHOT, h.snapshotVersion()); err != nil {
		return nil, nil, err
	}
	if err := signOnline(m, metadata.SNAPSHOT, roots, keys); err != nil {
		return nil, nil, err
	}
	b, err := d.putVersioned(metadata.SNAPSHOT, m.Signed.Version, m)
	return m, b, err
}

// signedAt is a member of our own in the timestamp: when it was signed. TUF
// says only until when it is good. A client takes it for a time that its clock
// may not be before (package tufclient).
const signedAt = "klatch_signed_at"

func (d disk) nextTimestamp(h have, snapshot *snapshotMeta, snapshotBytes []byte, life time.Duration, roots []*rootMeta, keys bag, now time.Time) (*timestampMeta, []byte, error) {
	if snapshot == h.snapshot && h.timestamp != nil && !halfGone(h.timestamp.Signed.Expires, life, now) &&
		roots[0].VerifyDelegate(metadata.TIMESTAMP, h.timestamp) == nil {
		return h.timestamp, nil, nil
	}
	m := metadata.Timestamp(expiry(now, life))
	m.Signed.Version = max(h.timestampVersion()+1, d.least(metadata.TIMESTAMP))
	m.Signed.Meta = map[string]*metadata.MetaFiles{"snapshot.json": describe(snapshotBytes, snapshot.Signed.Version)}
	m.Signed.UnrecognizedFields = map[string]any{signedAt: now.UTC().Format(time.RFC3339)}
	if err := signOnline(m, metadata.TIMESTAMP, roots, keys); err != nil {
		return nil, nil, err
	}
	b, err := encode(m)
	return m, b, err
}

// signOnline signs for the new root, and for the old one with what is at hand.
func signOnline[T metadata.Roles](m *metadata.Metadata[T], role string, roots []*rootMeta, keys bag) error {
	m.ClearSignatures()
	for _, r := range roots {
		if err := sign(m, keys, rootGroup(r, role)); err != nil {
			return err
		}
	}
	return enough(roots[0], role, m)
}
