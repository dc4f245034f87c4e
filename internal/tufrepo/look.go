// SPDX-License-Identifier: Apache-2.0

package tufrepo

import (
	"crypto"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// State is what a repository has in force, role by role: root, targets, the
// release roles, snapshot, timestamp.
type State struct {
	Roles []RoleState
	// Unfinished: the root in force does not accept what timestamp.json leads
	// to, so a ceremony was broken off after its root.
	Unfinished bool
}

// RoleState is one role: who may sign, and until when its metadata is good.
type RoleState struct {
	Name      string
	Pattern   string // of a release role
	Version   int64  // 0: never signed
	Expires   time.Time
	Life      time.Duration // from signing to expiry
	Threshold int
	Keys      []KeyState
	Targets   []string // paths that its list names
}

// KeyState is one public key of a role.
type KeyState struct {
	ID     string
	Type   string // ecdsa, ed25519 …
	Public crypto.PublicKey
}

// Look reads what a repository has in force.
func Look(dir string) (State, error) {
	h, err := newDisk(dir, nil).load()
	if err != nil {
		return State{}, err
	}
	var s State
	add := func(name string, version int64, expires time.Time, life time.Duration, g group, keys map[string]*metadata.Key) error {
		r := RoleState{Name: name, Version: version, Expires: expires, Life: life, Threshold: g.threshold}
		for _, id := range g.ids {
			k := keys[id]
			if k == nil {
				return fmt.Errorf("role %s names key %.16s, which is not there", name, id)
			}
			pub, err := k.ToPublicKey()
			if err != nil {
				return err
			}
			r.Keys = append(r.Keys, KeyState{id, k.Type, pub})
		}
		if l := h.lists[name]; l.meta != nil {
			for t := range l.meta.Signed.Targets {
				r.Targets = append(r.Targets, t)
			}
			slices.Sort(r.Targets)
		}
		s.Roles = append(s.Roles, r)
		return nil
	}
	top := h.top()
	root := h.root.Signed
	if err := add(metadata.ROOT, root.Version, root.Expires, RootLife, rootGroup(h.root, metadata.ROOT), root.Keys); err != nil {
		return s, err
	}
	topLife, topExpires := ReleaseLife, time.Time{}
	if top != nil {
		topLife, topExpires = life(metadata.TARGETS, top), top.Signed.Expires
	}
	if err := add(metadata.TARGETS, h.listVersion(metadata.TARGETS), topExpires, topLife, rootGroup(h.root, metadata.TARGETS), root.Keys); err != nil {
		return s, err
	}
	for _, r := range delegations(top) {
		l := h.lists[r.Name].meta
		if err := add(r.Name, l.Signed.Version, l.Signed.Expires, life(r.Name, l), releaseGroup(top, r.Name), top.Signed.Delegations.Keys); err != nil {
			return s, err
		}
		s.Roles[len(s.Roles)-1].Pattern = strings.Join(r.Paths, " ")
	}
	var snapshot, timestamp time.Time
	if h.snapshot != nil {
		snapshot, timestamp = h.snapshot.Signed.Expires, h.timestamp.Signed.Expires
		s.Unfinished = h.root.VerifyDelegate(metadata.TARGETS, top) != nil || h.root.VerifyDelegate(metadata.SNAPSHOT, h.snapshot) != nil ||
			h.root.VerifyDelegate(metadata.TIMESTAMP, h.timestamp) != nil
	}
	if err := add(metadata.SNAPSHOT, h.snapshotVersion(), snapshot, online(top, SnapshotLife), rootGroup(h.root, metadata.SNAPSHOT), root.Keys); err != nil {
		return s, err
	}
	return s, add(metadata.TIMESTAMP, h.timestampVersion(), timestamp, online(top, TimestampLife), rootGroup(h.root, metadata.TIMESTAMP), root.Keys)
}

// Role finds a role by its name; nil where it is not there.
func (s State) Role(name string) *RoleState {
	for i := range s.Roles {
		if s.Roles[i].Name == name {
			return &s.Roles[i]
		}
	}
	return nil
}

// For finds the release role that a target's path belongs to; nil where the
// top list has it.
func (s State) For(target string) *RoleState {
	for i, r := range s.Roles {
		if r.Pattern == "" {
			continue
		}
		one := metadata.DelegatedRole{Paths: []string{r.Pattern}}
		if ok, err := one.IsDelegatedPath(target); err == nil && ok {
			return &s.Roles[i]
		}
	}
	return nil
}

// Custom gives what a role's list says of a target beside its digest.
func Custom(dir, role, target string) (json.RawMessage, error) {
	h, err := newDisk(dir, nil).load()
	if err != nil {
		return nil, err
	}
	l := h.lists[role].meta
	if l == nil || l.Signed.Targets[target] == nil || l.Signed.Targets[target].Custom == nil {
		return nil, nil
	}
	return *l.Signed.Targets[target].Custom, nil
}
