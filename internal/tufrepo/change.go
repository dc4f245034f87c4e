// SPDX-License-Identifier: Apache-2.0

package tufrepo

import (
	"context"
	"crypto"
	"errors"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/fault"
)

// ReleaseRole is a role that may list targets below distro/arch/ and nothing
// else: one distribution release on one architecture.
type ReleaseRole struct {
	Distro, Arch string
	Keys         []crypto.PublicKey
	Threshold    int
}

// Name is the role's name in the metadata.
func (r ReleaseRole) Name() string { return r.Distro + "-" + r.Arch }

// pattern has as many parts as the path of a livepatch: a star does not go
// over a slash.
func (r ReleaseRole) pattern() string { return r.Distro + "/" + r.Arch + "/*/*" }

// maxRoles is how many release roles clients follow.
const maxRoles = 32

var rolePart = regexp.MustCompile(`^[a-z][a-z0-9.]*(-[0-9][a-z0-9.]*)?$`)

// delegate adds a release role to the top list and moves its targets into the
// new list that it returns.
func delegate(top *listMeta, r ReleaseRole) (*listMeta, error) {
	if isOperator(top) {
		return nil, badRole("%s: an operator's repository has select and promotion, and nothing else", r.Name())
	}
	if !rolePart.MatchString(r.Distro) || !rolePart.MatchString(r.Arch) || strings.Contains(r.Arch, "-") || len(r.Name()) > 64 {
		return nil, badRole("%.40q/%.40q is not distribution and architecture", r.Distro, r.Arch)
	}
	return addRole(top, r.Name(), r.pattern(), r.Keys, r.Threshold)
}

func badRole(format string, args ...any) error {
	return fault.New(fault.Invalid, "bad_role", "role "+format, args...).
		WithHint("a release role is named like debian-12/amd64 and has a threshold that its keys can reach")
}

// addRole adds a terminating role with one pattern.
func addRole(top *listMeta, name, pattern string, keys []crypto.PublicKey, threshold int) (*listMeta, error) {
	if len(delegations(top)) >= maxRoles {
		return nil, badRole("%s would be number %d; clients follow %d", name, len(delegations(top))+1, maxRoles)
	}
	if top.Signed.Delegations == nil {
		top.Signed.Delegations = &metadata.Delegations{Keys: map[string]*metadata.Key{}}
	}
	if threshold < 1 || threshold > len(keys) {
		return nil, badRole("%s: threshold %d of %d keys", name, threshold, len(keys))
	}
	top.Signed.Delegations.Roles = append(top.Signed.Delegations.Roles, metadata.DelegatedRole{
		Name: name, Threshold: threshold, Terminating: true, Paths: []string{pattern}, KeyIDs: []string{}})
	for _, pub := range keys {
		if err := addKey(top, name, pub); err != nil {
			return nil, err
		}
	}
	moved := metadata.Targets()
	for path, t := range top.Signed.Targets {
		if owner(top, path) == name {
			moved.Signed.Targets[path] = t
			delete(top.Signed.Targets, path)
		}
	}
	return moved, nil
}

func addKey(top *listMeta, role string, pub crypto.PublicKey) error {
	k, err := metadata.KeyFromPublicKey(pub)
	if err != nil {
		return err
	}
	id, err := k.ID()
	if err != nil {
		return err
	}
	for _, r := range delegations(top) {
		if r.Name == role && slices.Contains(r.KeyIDs, id) {
			return fault.New(fault.Invalid, "bad_threshold", "role %s: one key is listed twice", role)
		}
	}
	return top.Signed.AddKey(k, role)
}

// Change is what a ceremony does to keys and roles. Roles are root, targets,
// snapshot, timestamp, or the name of a release role.
type Change struct {
	Reason    string
	Add       map[string][]crypto.PublicKey
	Remove    map[string][]string // key ids
	Threshold map[string]int
	Roles     []ReleaseRole // to delegate
	Drop      []string      // release roles to end
	Renew     []string      // to sign again with a whole life
	// AtLeast is the least threshold of root, targets, release roles and
	// promotion: 2 wherever one stolen key must not be enough.
	AtLeast int
}

// Prepare makes a draft of a change from what is in force. Nothing is written.
func Prepare(ctx context.Context, dir string, c Change, now time.Time) (*Draft, error) {
	return Repository{Dir: dir}.Prepare(ctx, c, now)
}

// Prepare is as the function of that name.
func (r Repository) Prepare(ctx context.Context, c Change, now time.Time) (*Draft, error) {
	d := newDisk(r.Dir, r.Least)
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	draft, err := d.prepare(ctx, c, now)
	return draft, errors.Join(err, unlock())
}

func (d disk) prepare(ctx context.Context, c Change, now time.Time) (*Draft, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	h, err := d.load()
	if err != nil {
		return nil, err
	}
	p := proposal{lists: map[string]*listMeta{}}
	root, err := metadata.Root().FromBytes(h.rootBytes)
	if err != nil {
		return nil, err
	}
	top := copyList(h.top())
	changed := map[string]bool{}
	for _, role := range c.roles() {
		what, err := c.apply(h, root, top, role)
		if err != nil {
			return nil, err
		}
		for _, r := range what {
			changed[r] = true
		}
	}
	for _, r := range c.Roles {
		if _, there := h.lists[r.Name()]; there {
			return nil, fault.New(fault.Conflict, "role_exists", "role %s is there already", r.Name()).WithHint("klatch-forge keys list")
		}
		if p.lists[r.Name()], err = delegate(top, r); err != nil {
			return nil, err
		}
		changed[metadata.TARGETS], changed[r.Name()] = true, true
	}
	for _, role := range c.Drop {
		if isOperator(top) || !dropRole(top, role) {
			return nil, noRole(role)
		}
		changed[metadata.TARGETS] = true
		delete(changed, role)
	}
	if len(changed) == 0 {
		return nil, fault.New(fault.Invalid, "nothing_to_do", "the change changes nothing")
	}
	if changed[metadata.ROOT] {
		root.ClearSignatures()
		root.Signed.Version++
		root.Signed.Expires = expiry(now, RootLife)
		p.root = root
		delete(changed, metadata.ROOT)
	}
	for role := range changed {
		l := p.lists[role]
		if role == metadata.TARGETS {
			l = top
		} else if l == nil {
			l = copyList(h.lists[role].meta)
		}
		if err := d.renew(h, role, l, now); err != nil {
			return nil, err
		}
		p.lists[role] = l
	}
	if err := checkThresholds(root, top, max(c.AtLeast, 1)); err != nil {
		return nil, err
	}
	return newDraft(h, p, c.Reason, now)
}

// roles lists every role that the change names, each once.
func (c Change) roles() []string {
	set := map[string]bool{}
	for r := range c.Add {
		set[r] = true
	}
	for r := range c.Remove {
		set[r] = true
	}
	for r := range c.Threshold {
		set[r] = true
	}
	for _, r := range c.Renew {
		set[r] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// apply changes one role and returns whose metadata must be signed again.
func (c Change) apply(h have, root *rootMeta, top *listMeta, role string) ([]string, error) {
	keys := len(c.Add[role])+len(c.Remove[role]) > 0 || c.Threshold[role] > 0
	_, isTop := root.Signed.Roles[role]
	if !isTop {
		i := slices.IndexFunc(delegations(top), func(r metadata.DelegatedRole) bool { return r.Name == role })
		if i < 0 {
			return nil, noRole(role)
		}
		for _, pub := range c.Add[role] {
			if err := addKey(top, role, pub); err != nil {
				return nil, err
			}
		}
		for _, id := range c.Remove[role] {
			if err := top.Signed.RevokeKey(id, role); err != nil {
				return nil, noKey(role, id)
			}
		}
		if n := c.Threshold[role]; n > 0 {
			top.Signed.Delegations.Roles[i].Threshold = n
		}
		if keys {
			return []string{metadata.TARGETS, role}, nil
		}
		return []string{role}, nil
	}
	for _, pub := range c.Add[role] {
		k, err := metadata.KeyFromPublicKey(pub)
		if err != nil {
			return nil, err
		}
		if id, err := k.ID(); err != nil || slices.Contains(root.Signed.Roles[role].KeyIDs, id) {
			return nil, errors.Join(err, fault.New(fault.Invalid, "bad_threshold", "role %s: one key is listed twice", role))
		}
		if err := root.Signed.AddKey(k, role); err != nil {
			return nil, err
		}
	}
	for _, id := range c.Remove[role] {
		if err := root.Signed.RevokeKey(id, role); err != nil {
			return nil, noKey(role, id)
		}
	}
	if n := c.Threshold[role]; n > 0 {
		root.Signed.Roles[role].Threshold = n
	}
	switch {
	case role == metadata.TARGETS && keys && h.top() != nil:
		return []string{metadata.ROOT, metadata.TARGETS}, nil
	case role == metadata.TARGETS && !keys:
		return []string{metadata.TARGETS}, nil
	}
	return []string{metadata.ROOT}, nil
}

// dropRole ends a role: its keys and its line go, its targets are not moved.
func dropRole(top *listMeta, role string) bool {
	i := slices.IndexFunc(delegations(top), func(r metadata.DelegatedRole) bool { return r.Name == role })
	if i < 0 {
		return false
	}
	d := top.Signed.Delegations
	d.Roles = slices.Delete(d.Roles, i, i+1)
	maps.DeleteFunc(d.Keys, func(id string, _ *metadata.Key) bool {
		return !slices.ContainsFunc(d.Roles, func(r metadata.DelegatedRole) bool { return slices.Contains(r.KeyIDs, id) })
	})
	if len(d.Roles) == 0 {
		top.Signed.Delegations = nil
	}
	return true
}

func checkThresholds(root *rootMeta, top *listMeta, atLeast int) error {
	check := func(role string, n, keys, least int) error {
		if n < 1 || n > keys || n < least {
			return fault.New(fault.Invalid, "bad_threshold", "role %s: threshold %d of %d keys, at least %d", role, n, keys, least).
				WithHint("add keys before keys are removed; outside profile lab one stolen key must not be enough")
		}
		return nil
	}
	for role, r := range root.Signed.Roles {
		least := 1
		if role == metadata.ROOT || role == metadata.TARGETS {
			least = atLeast
		}
		if err := check(role, r.Threshold, len(r.KeyIDs), least); err != nil {
			return err
		}
	}
	for _, r := range delegations(top) {
		least := atLeast
		if r.Name == RoleSelect { // one online key
			least = 1
		}
		if err := check(r.Name, r.Threshold, len(r.KeyIDs), least); err != nil {
			return err
		}
	}
	return nil
}

func noRole(role string) error {
	return fault.New(fault.NotFound, "no_role", "role %.80q is not in the repository", role).WithHint("klatch-forge keys list")
}

func noKey(role, id string) error {
	return fault.New(fault.NotFound, "no_such_key", "key %.16s is not one of role %s", id, role).WithHint("klatch-forge keys list")
}
