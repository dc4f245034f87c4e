// SPDX-License-Identifier: Apache-2.0

package tufrepo

import (
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/fault"
)

// DraftFormat is the version word of a draft's file.
const DraftFormat = "klatch-draft/1"

// MaxDraft limits a draft's file, in bytes: a root and a few lists, each of
// which is limited by what clients read.
const MaxDraft = 32 << 20

// Draft is metadata that waits for the signatures of several people. Its file
// goes from one to the next, or each signs a copy; order does not matter. It
// holds the root and the top list in force, because their keys say who must
// sign. A holder of a key should believe nothing of it but what Words reads
// out of the parts themselves.
type Draft struct {
	Format   string          `json:"format"`
	Reason   string          `json:"reason"`
	Prepared time.Time       `json:"prepared"`
	Root     json.RawMessage `json:"root"`
	Targets  json.RawMessage `json:"targets,omitempty"`
	// Lists has what select and promotion say now, signed, so that Words can
	// tell what is new. An operator's drafts have it.
	Lists map[string]json.RawMessage `json:"lists,omitempty"`
	Parts []Part                     `json:"parts"`
}

// Part is one file of the draft, with the signatures so far.
type Part struct {
	Role     string          `json:"role"`
	Metadata json.RawMessage `json:"metadata"`
}

// Missing is one group of keys of which not enough have signed.
type Missing struct {
	Role       string   `json:"role"`
	By         string   `json:"by"` // who names the keys
	Have, Need int      `json:"-"`
	Open       []string `json:"open"`     // ids of the keys that have not signed
	Optional   bool     `json:"optional"` // without it clients may see a short moment at which they stay with what they have
}

func newDraft(h have, p proposal, reason string, now time.Time) (*Draft, error) {
	d := &Draft{Format: DraftFormat, Reason: reason, Prepared: now.UTC().Truncate(time.Second), Root: h.rootBytes}
	if h.top() != nil {
		d.Targets = h.lists[metadata.TARGETS].bytes
	}
	for role := range p.lists {
		if l := h.lists[role]; l.meta != nil && (role == RoleSelect || role == RolePromotion) {
			if d.Lists == nil {
				d.Lists = map[string]json.RawMessage{}
			}
			d.Lists[role] = l.bytes
		}
	}
	return d, d.setParts(p)
}

func (d *Draft) setParts(p proposal) error {
	d.Parts = nil
	if p.root != nil {
		b, err := p.root.ToBytes(false)
		if err != nil {
			return err
		}
		d.Parts = append(d.Parts, Part{metadata.ROOT, b})
	}
	for _, role := range slices.SortedFunc(maps.Keys(p.lists), topLast) {
		b, err := p.lists[role].ToBytes(false)
		if err != nil {
			return err
		}
		d.Parts = append(d.Parts, Part{role, b})
	}
	return nil
}

// ParseDraft reads a draft's file.
func ParseDraft(b []byte) (*Draft, error) {
	bad := func(format string, args ...any) (*Draft, error) {
		return nil, fault.New(fault.Invalid, "bad_draft", "draft: "+format, args...).
			WithHint("a draft is the file that klatch-forge publish or klatch-forge keys wrote")
	}
	if len(b) > MaxDraft {
		return bad("%d bytes, limit %d", len(b), MaxDraft)
	}
	var d Draft
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d); err != nil {
		return bad("%w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return bad("bytes after the end")
	}
	if d.Format != DraftFormat || len(d.Parts) == 0 || len(d.Parts) > 64 {
		return bad("format %.40q with %d parts, want %q", d.Format, len(d.Parts), DraftFormat)
	}
	if _, _, err := d.open(); err != nil {
		return bad("%w", err)
	}
	return &d, nil
}

// Encode writes a draft's file.
func (d *Draft) Encode() ([]byte, error) {
	b, err := json.MarshalIndent(d, "", " ")
	return append(b, '\n'), err
}

// open reads the metadata inside, and drops every signature that is not by a
// key that counts, or is wrong.
func (d *Draft) open() (have, proposal, error) {
	h, p := have{lists: map[string]list{}, rootBytes: d.Root}, proposal{lists: map[string]*listMeta{}}
	var err error
	if h.root, err = metadata.Root().FromBytes(d.Root); err != nil {
		return h, p, fmt.Errorf("root in force: %w", err)
	}
	if len(d.Targets) > 0 {
		top, err := metadata.Targets().FromBytes(d.Targets)
		if err != nil {
			return h, p, fmt.Errorf("targets in force: %w", err)
		}
		if err := h.root.VerifyDelegate(metadata.TARGETS, top); err != nil { // what a draft differs from must be somebody's
			return h, p, fmt.Errorf("targets in force are not signed by the keys of the root in force: %w", err)
		}
		h.lists[metadata.TARGETS] = list{top, d.Targets}
	}
	if err := d.openLists(h); err != nil {
		return h, p, err
	}
	for _, part := range d.Parts {
		switch {
		case part.Role == metadata.ROOT && p.root == nil:
			p.root, err = metadata.Root().FromBytes(part.Metadata)
		case part.Role != metadata.ROOT && p.lists[part.Role] == nil:
			p.lists[part.Role], err = metadata.Targets().FromBytes(part.Metadata)
		default:
			err = errors.New("role is there twice")
		}
		if err != nil {
			return h, p, fmt.Errorf("part %.80q: %w", part.Role, err)
		}
	}
	for _, r := range []*rootMeta{h.root, p.root} {
		if r != nil && (hasNil(r.Signed.Keys) || hasNil(r.Signed.Roles)) {
			return h, p, errors.New("root with a null in it")
		}
	}
	for role, was := range h.lists {
		if l := p.lists[role]; l != nil && l.Signed.Version <= was.meta.Signed.Version {
			return h, p, fmt.Errorf("%s %d would follow %d: the draft does not tell what it changes", role, l.Signed.Version, was.meta.Signed.Version)
		}
	}
	for _, l := range p.lists {
		for name := range l.Signed.Targets {
			if err := checkPath(name); err != nil {
				return h, p, err
			}
		}
	}
	for _, l := range append(slices.Collect(maps.Values(p.lists)), h.top()) {
		if l != nil && (hasNil(l.Signed.Targets) || l.Signed.Delegations != nil && hasNil(l.Signed.Delegations.Keys)) {
			return h, p, errors.New("list with a null in it")
		}
	}
	root, top := p.effective(h)
	keys := map[string]*metadata.Key{}
	maps.Copy(keys, h.root.Signed.Keys)
	maps.Copy(keys, root.Signed.Keys)
	if top != nil && top.Signed.Delegations != nil {
		maps.Copy(keys, top.Signed.Delegations.Keys)
	}
	if p.root != nil {
		keepGood(p.root, keys)
	}
	for _, l := range p.lists {
		keepGood(l, keys)
	}
	return h, p, nil
}

// hasNil finds what go-tuf takes for an absent member and then follows.
func hasNil[V any](m map[string]*V) bool {
	for _, v := range m {
		if v == nil {
			return true
		}
	}
	return false
}

// keepGood drops signatures that do not verify with the key they name.
func keepGood[T metadata.Roles](m *metadata.Metadata[T], keys map[string]*metadata.Key) {
	m.Signatures = slices.DeleteFunc(slices.Clone(m.Signatures), func(s metadata.Signature) bool {
		k := keys[s.KeyID]
		if k == nil {
			return true
		}
		const role = metadata.TARGETS
		judge := metadata.Root()
		if judge.Signed.AddKey(k, role) != nil {
			return true
		}
		judge.Signed.Roles[role].Threshold = 1
		one := *m
		one.Signatures = []metadata.Signature{s}
		return judge.VerifyDelegate(role, &one) != nil
	})
}

// Sign adds the signatures of these keys to every part that asks for one, and
// returns the roles that got one.
func (d *Draft) Sign(signers ...crypto.Signer) ([]string, error) {
	h, p, err := d.open()
	if err != nil {
		return nil, err
	}
	keys := bag{}
	if err := keys.add(signers...); err != nil {
		return nil, err
	}
	before := p.signatures()
	if err := p.sign(h, keys); err != nil {
		return nil, err
	}
	var signed []string
	for role, n := range p.signatures() {
		if n > before[role] {
			signed = append(signed, role)
		}
	}
	slices.Sort(signed)
	return signed, d.setParts(p)
}

func (p proposal) signatures() map[string]int {
	n := map[string]int{}
	if p.root != nil {
		n[metadata.ROOT] = len(p.root.Signatures)
	}
	for role, l := range p.lists {
		n[role] = len(l.Signatures)
	}
	return n
}

// Missing lists what the draft still waits for, and what would be good to
// have. A draft is complete when all that is left is optional.
func (d *Draft) Missing() ([]Missing, error) {
	h, p, err := d.open()
	if err != nil {
		return nil, err
	}
	var out []Missing
	for _, part := range d.Parts {
		var sigs []metadata.Signature
		if part.Role == metadata.ROOT {
			sigs = p.root.Signatures
		} else {
			sigs = p.lists[part.Role].Signatures
		}
		must, should := p.needs(h, part.Role)
		for i, g := range append(must, should...) {
			if n := g.have(sigs); n < g.threshold || g.threshold < 1 {
				open := slices.DeleteFunc(slices.Clone(g.ids), func(id string) bool {
					return slices.ContainsFunc(sigs, func(s metadata.Signature) bool { return s.KeyID == id })
				})
				out = append(out, Missing{part.Role, g.by, n, g.threshold, open, i >= len(must)})
			}
		}
	}
	return out, nil
}

// Merge takes the signatures of copies of a draft over into d.
func (d *Draft) Merge(copies ...*Draft) error {
	_, p, err := d.open()
	for _, c := range copies {
		if err != nil {
			return err
		}
		var other proposal
		if _, other, err = c.open(); err != nil {
			return err
		}
		if len(c.Parts) != len(d.Parts) {
			return notCopies()
		}
		for i, part := range c.Parts {
			if part.Role != d.Parts[i].Role || !sameSigned(part.Metadata, d.Parts[i].Metadata) {
				return notCopies()
			}
		}
		if p.root != nil {
			p.root.Signatures = union(p.root.Signatures, other.root.Signatures)
		}
		for role, l := range p.lists {
			l.Signatures = union(l.Signatures, other.lists[role].Signatures)
		}
	}
	if err != nil {
		return err
	}
	return d.setParts(p)
}

func notCopies() error {
	return fault.New(fault.Invalid, "bad_draft", "the files are not copies of one draft").
		WithHint("give the copies that each person signed, of one preparation only")
}

func union(a, b []metadata.Signature) []metadata.Signature {
	for _, s := range b {
		if !slices.ContainsFunc(a, func(x metadata.Signature) bool { return x.KeyID == s.KeyID }) {
			a = append(a, s)
		}
	}
	return a
}

// Complete brings a draft into force. It must have been prepared from what is
// in force now, and have its signatures or get them from the keys at hand.
// After a crash at any point the same call completes the work.
func Complete(ctx context.Context, dir string, draft *Draft, keys Keys, now time.Time) (Result, error) {
	return Repository{Dir: dir}.Complete(ctx, draft, keys, now)
}

// Complete is as the function of that name.
func (r Repository) Complete(ctx context.Context, draft *Draft, keys Keys, now time.Time) (Result, error) {
	d := newDisk(r.Dir, r.Least)
	unlock, err := d.lock()
	if err != nil {
		return Result{}, err
	}
	res, err := d.complete(ctx, draft, keys, now)
	return res, errors.Join(err, unlock())
}

func (d disk) complete(ctx context.Context, draft *Draft, keys Keys, now time.Time) (Result, error) {
	_, p, err := draft.open()
	if err != nil {
		return Result{}, err
	}
	all, err := newBag(keys)
	if err != nil {
		return Result{}, err
	}
	h, err := d.begin(now)
	if fault.CodeOf(err) == "metadata_expired" && p.root != nil {
		err = nil // a new root is the way out of that
	}
	if err != nil {
		return Result{}, err
	}
	if p, err = h.open(p); err != nil {
		return Result{}, err
	}
	if err := p.sign(h, all); err != nil {
		return Result{}, err
	}
	if err := p.check(h); err != nil {
		return Result{}, err
	}
	return d.apply(ctx, h, p, all, now)
}

// open leaves out of a proposal what is in force already, by a run that died,
// and refuses one that was prepared from another state.
func (h have) open(p proposal) (proposal, error) {
	stale := func(role string, version, current int64) (proposal, error) {
		return p, fault.New(fault.Conflict, "draft_stale", "draft has %s %d, but %d is in force", role, version, current).
			WithHint("prepare it again; signatures on the old file count no more")
	}
	next := proposal{lists: maps.Clone(p.lists)}
	if p.root != nil {
		b, err := p.root.ToBytes(false)
		if err != nil {
			return p, err
		}
		switch v := p.root.Signed.Version; {
		case sameSigned(b, h.rootBytes):
		case v == h.root.Signed.Version+1:
			next.root = p.root
		default:
			return stale(metadata.ROOT, v, h.root.Signed.Version)
		}
	}
	for role, l := range p.lists {
		b, err := l.ToBytes(false)
		if err != nil {
			return p, err
		}
		switch v := l.Signed.Version; {
		case sameSigned(b, h.lists[role].bytes):
			delete(next.lists, role)
		case v <= h.listVersion(role):
			return stale(role, v, h.listVersion(role))
		}
	}
	return next, nil
}
