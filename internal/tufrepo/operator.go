// SPDX-License-Identifier: Apache-2.0

package tufrepo

import (
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// The two roles of an operator's repository. The top list delegates to both
// and to nothing else; select is the server's, promotion is people's.
const (
	RoleSelect    = "select"
	RolePromotion = "promotion"
)

// How long their metadata lives. The snapshot and the timestamp of such a
// repository live as long as select: all three are the server's.
const (
	SelectLife    = 24 * time.Hour
	PromotionLife = 30 * 24 * time.Hour
)

// OperatorRole is who signs for select or promotion.
type OperatorRole struct {
	Name      string
	Keys      []crypto.PublicKey
	Threshold int
}

func isOperator(top *listMeta) bool {
	return slices.ContainsFunc(delegations(top), func(r metadata.DelegatedRole) bool { return r.Name == RoleSelect })
}

// online is the life of a role that a server signs: shorter with an operator.
func online(top *listMeta, life time.Duration) time.Duration {
	if isOperator(top) {
		return SelectLife
	}
	return life
}

// delegateOperator adds the two roles to a fresh top list, both or none, and
// never beside others.
func delegateOperator(top *listMeta, lists map[string]*listMeta, changed map[string]bool, roles []OperatorRole) error {
	if len(roles) == 0 || isOperator(top) {
		return nil
	}
	if len(delegations(top)) > 0 || len(roles) != 2 || roles[0].Name == roles[1].Name {
		return badRole("select and promotion are delegated together, in a repository of their own")
	}
	for _, r := range roles {
		if r.Name != RoleSelect && r.Name != RolePromotion {
			return badRole("%.40q is none of select and promotion", r.Name)
		}
		l, err := addRole(top, r.Name, r.Name+"/*/*", r.Keys, r.Threshold)
		if err != nil {
			return err
		}
		lists[r.Name] = l
		changed[metadata.TARGETS], changed[r.Name] = true, true
	}
	return nil
}

// PreparePublication makes a draft of a publication from what is in force, for
// people to sign. Nothing is written: Complete expects the targets' content to
// be there already (PutTargets).
func (r Repository) PreparePublication(ctx context.Context, p Publication, reason string, now time.Time) (*Draft, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	d := newDisk(r.Dir, r.Least)
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	draft, err := d.preparePublication(p, reason, now)
	return draft, errors.Join(err, unlock())
}

func (d disk) preparePublication(p Publication, reason string, now time.Time) (*Draft, error) {
	h, err := d.load()
	if err != nil {
		return nil, err
	}
	next, err := d.plan(h, p, bag{}, now)
	if err != nil {
		return nil, err
	}
	return newDraft(h, next, reason, now)
}

// PutTargets writes files that a draft names. Until metadata names them nobody
// asks for them.
func (r Repository) PutTargets(targets ...Target) error {
	d := newDisk(r.Dir, r.Least)
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	for _, t := range targets {
		if err = checkPath(t.Path); err == nil {
			err = d.putTarget(t)
		}
		if err != nil {
			break
		}
	}
	return errors.Join(err, unlock())
}

// openLists reads the lists in force of a draft. They are signed by whom the
// top list in force names, or the draft is refused: what it calls new is
// measured by them.
func (d *Draft) openLists(h have) error {
	for role, raw := range d.Lists {
		m, err := metadata.Targets().FromBytes(raw)
		if err != nil {
			return fmt.Errorf("%.80q in force: %w", role, err)
		}
		if role == metadata.TARGETS || h.top() == nil || h.top().VerifyDelegate(role, m) != nil {
			return fmt.Errorf("%.80q in force is not signed by the keys of the targets in force", role)
		}
		if hasNil(m.Signed.Targets) {
			return errors.New("list with a null in it")
		}
		h.lists[role] = list{m, raw}
	}
	return nil
}

// DraftFile is one file that a part of a draft names.
type DraftFile struct {
	Role, Path string
	Bytes      int64
	SHA256     string
	New        bool // not named so by the list in force, or that is not in the draft
}

// Files lists what the draft's parts name, computed from the parts.
func (d *Draft) Files() ([]DraftFile, error) {
	h, p, err := d.open()
	if err != nil {
		return nil, err
	}
	var out []DraftFile
	for _, role := range slices.SortedFunc(maps.Keys(p.lists), topLast) {
		var before map[string]*metadata.TargetFiles
		if was := h.lists[role].meta; was != nil {
			before = was.Signed.Targets
		}
		is := p.lists[role].Signed.Targets
		for _, path := range slices.Sorted(maps.Keys(is)) {
			f, old := is[path], before[path]
			sum := []byte(f.Hashes["sha256"])
			out = append(out, DraftFile{role, path, f.Length, fmt.Sprintf("%x", sum),
				old == nil || old.Length != f.Length || !bytes.Equal(old.Hashes["sha256"], sum)})
		}
	}
	return out, nil
}

// SignedBy lists the good signatures of a draft's parts, as "role key-id".
func (d *Draft) SignedBy() ([]string, error) {
	_, p, err := d.open()
	if err != nil {
		return nil, err
	}
	var out []string
	add := func(role string, sigs []metadata.Signature) {
		for _, s := range sigs {
			out = append(out, role+" "+s.KeyID)
		}
	}
	if p.root != nil {
		add(metadata.ROOT, p.root.Signatures)
	}
	for role, l := range p.lists {
		add(role, l.Signatures)
	}
	slices.Sort(out)
	return out, nil
}

// Roles lists the parts of a draft.
func (d *Draft) Roles() []string {
	var out []string
	for _, p := range d.Parts {
		out = append(out, p.Role)
	}
	return out
}

// Grew says whether the root that a draft is made on follows from an older
// root that a holder of a key believes, link by link. Roots are those in
// between and the draft's own, in order; one that the holder has is passed
// over. Without this, who made up the draft may have made up "in force" too.
func (d *Draft) Grew(anchor []byte, roots []json.RawMessage) error {
	no := func(format string, args ...any) error {
		return fault.New(fault.Untrusted, "draft_of_another", "draft: "+format, args...).
			WithHint("is this the anchor of the operator whose draft you were given?")
	}
	trusted, err := metadata.Root().FromBytes(anchor)
	if err != nil {
		return no("anchor's root: %w", err)
	}
	if len(roots) > maxRoots {
		return no("%d roots, limit %d", len(roots), maxRoots)
	}
	last := json.RawMessage(anchor)
	for _, raw := range roots {
		next, err := metadata.Root().FromBytes(raw)
		if err != nil || hasNil(next.Signed.Keys) || hasNil(next.Signed.Roles) {
			return no("a root that cannot be read: %w", err)
		}
		if next.Signed.Version <= trusted.Signed.Version {
			continue
		}
		if next.Signed.Version != trusted.Signed.Version+1 || trusted.VerifyDelegate(metadata.ROOT, next) != nil || next.VerifyDelegate(metadata.ROOT, next) != nil {
			return no("root %d does not follow from root %d", next.Signed.Version, trusted.Signed.Version)
		}
		trusted, last = next, raw
	}
	if !sameSigned(last, d.Root) {
		return no("it is not made on root %d, which follows from the anchor", trusted.Signed.Version)
	}
	return nil
}

// maxRoots limits the roots of a draft: more than a century of yearly ones.
const maxRoots = 256

// Roots reads every root of the folder, in order.
func Roots(dir string) ([]json.RawMessage, error) {
	d := newDisk(dir, nil)
	versions, err := d.versions(metadata.ROOT)
	slices.Sort(versions)
	var out []json.RawMessage
	for _, v := range versions {
		var b []byte
		if b, err = durable.ReadFile(d.metadata(fmt.Sprintf("%d.root.json", v)), maxMetadata); err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, err
}
