// SPDX-License-Identifier: Apache-2.0

package rolloutrepo

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/keyfile"
	"klatch/internal/rollout"
	"klatch/internal/server/audit"
	"klatch/internal/tufrepo"
)

// rules says how many keys a role gets and how many must sign.
type rule struct{ keys, need int }

var rules = map[rollout.Profile]map[string]rule{
	rollout.Lab:   {"root": {1, 1}, "targets": {1, 1}, "promotion": {1, 1}},
	rollout.Small: {"root": {3, 2}, "targets": {2, 2}, "promotion": {3, 2}},
	rollout.Full:  {"root": {3, 2}, "targets": {3, 2}, "promotion": {3, 2}},
}

// online are the roles whose keys the server keeps.
var online = []string{"select", "snapshot", "timestamp"}

// Setup says what Init makes.
type Setup struct {
	Operator string
	Profile  rollout.Profile
	Tiers    rollout.Tiers
	// Offline is where the keys of people are made. In profile lab it may be
	// empty: they lie on the server.
	Offline string
}

// Init makes the keys, the first metadata and the anchor for machines, which
// is written last. It may be repeated after a crash: what is there stays.
func Init(ctx context.Context, data string, s Setup, now time.Time) (*rollout.Anchor, error) {
	p := paths(data)
	if _, err := os.Stat(p.anchor); err == nil {
		return nil, fault.New(fault.Conflict, "rollout_exists", "%s has an operator's repository already", data).
			WithHint("look at it: klatch-server rollout status")
	}
	if err := s.check(p); err != nil {
		return nil, err
	}
	for _, dir := range []string{p.keys, s.Offline} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	keys, roles, err := s.makeKeys(p)
	if err != nil {
		return nil, err
	}
	root, err := tufrepo.Init(ctx, p.dir, keys, now)
	if fault.CodeOf(err) == "repository_exists" { // an earlier run got this far
		root, err = durable.ReadFile(filepath.Join(p.dir, "metadata", "1.root.json"), rollout.MaxAnchor)
	}
	if err != nil {
		return nil, err
	}
	tiers, err := s.Tiers.Encode()
	if err != nil {
		return nil, err
	}
	a := rollout.Anchor{Format: rollout.AnchorFormat, Operator: s.Operator, Profile: s.Profile, Root: root}
	anchor, err := a.Encode()
	if err != nil {
		return nil, err
	}
	if err := audit.Open(p.audit).Append(audit.Entry{At: now.UTC(), Who: "klatch-server", What: "init", After: tiers, Reason: "profile " + string(s.Profile)}); err != nil {
		return nil, err
	}
	first := tufrepo.Publication{Operator: roles, Targets: []tufrepo.Target{{Path: rollout.TiersPath, Content: tiers, Replace: true}}}
	repo := tufrepo.Repository{Dir: p.dir, Least: func(string) int64 { return clock(now) }}
	if _, err := repo.Publish(ctx, first, keys, now); err != nil {
		return nil, err
	}
	return &a, durable.WriteFile(p.anchor, anchor, 0o644)
}

func (s *Setup) check(p files) error {
	if err := rollout.CheckOperator(s.Operator); err != nil {
		return err
	}
	if _, ok := rules[s.Profile]; !ok {
		return fault.New(fault.Invalid, "bad_profile", "profile %.40q is none of lab, small and full", s.Profile)
	}
	if s.Offline == "" && s.Profile == rollout.Lab {
		s.Offline = p.keys
	}
	if s.Offline == "" || s.Profile != rollout.Lab && inside(s.Offline, filepath.Dir(p.keys)) {
		return fault.New(fault.Invalid, "offline_keys", "in profile %s the keys of people may not lie with the server", s.Profile).
			WithHint("name a folder of a stick, to hand out and to erase here: --offline-keys DIR")
	}
	_, err := s.Tiers.Encode()
	return err
}

// inside says whether a folder is below another one.
func inside(dir, of string) bool {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return true
	}
	if of, err = filepath.Abs(of); err != nil {
		return true
	}
	rel, err := filepath.Rel(of, abs)
	return err != nil || filepath.IsLocal(rel)
}

func (s *Setup) makeKeys(p files) (tufrepo.Keys, []tufrepo.OperatorRole, error) {
	var k tufrepo.Keys
	byRole := map[string][]crypto.Signer{}
	add := func(dir, role string, n int, make func() ([]byte, error)) error {
		for i := range n {
			path := filepath.Join(dir, fmt.Sprintf("%s-%d.key", role, i+1))
			if err := makeKey(path, make); err != nil {
				return err
			}
			signer, err := keyfile.Open(path)
			if err != nil {
				return err
			}
			byRole[role] = append(byRole[role], signer)
		}
		return nil
	}
	for _, role := range online {
		if err := add(p.keys, role, 1, keyfile.NewEd25519); err != nil {
			return k, nil, err
		}
	}
	for _, role := range []string{"root", "targets", "promotion"} {
		if err := add(s.Offline, role, rules[s.Profile][role].keys, keyfile.NewECDSA); err != nil {
			return k, nil, err
		}
	}
	var approvers []crypto.PublicKey
	for _, signer := range byRole["promotion"] {
		approvers = append(approvers, signer.Public())
	}
	k.Root = tufrepo.Role{Signers: byRole["root"], Threshold: rules[s.Profile]["root"].need}
	k.Targets = tufrepo.Role{Signers: byRole["targets"], Threshold: rules[s.Profile]["targets"].need}
	k.Snapshot = tufrepo.Role{Signers: byRole["snapshot"], Threshold: 1}
	k.Timestamp = tufrepo.Role{Signers: byRole["timestamp"], Threshold: 1}
	k.Release.Signers = append(slices.Clone(byRole["select"]), byRole["promotion"]...)
	roles := []tufrepo.OperatorRole{
		{Name: rollout.RoleSelect, Keys: []crypto.PublicKey{byRole["select"][0].Public()}, Threshold: 1},
		{Name: rollout.RolePromotion, Keys: approvers, Threshold: rules[s.Profile]["promotion"].need},
	}
	return k, roles, nil
}

func makeKey(path string, content func() ([]byte, error)) error {
	if _, err := durable.ReadFile(path, 64<<10); !errors.Is(err, fs.ErrNotExist) {
		return err // there already, or unreadable
	}
	b, err := content()
	if err != nil {
		return err
	}
	return durable.WriteFile(path, b, 0o600)
}

// signers reads the private keys that are on the server: those that it signs
// with by itself, and those of people that lie here, in profile lab.
func (p files) signers() (own tufrepo.Keys, people []crypto.Signer, err error) {
	names, err := filepath.Glob(filepath.Join(p.keys, "*-*.key"))
	if err != nil {
		return own, nil, err
	}
	for _, n := range names {
		s, err := keyfile.Open(n)
		if err != nil {
			return own, nil, err
		}
		var role string
		for _, r := range []string{"select", "snapshot", "timestamp", "root", "targets", "promotion"} {
			if ok, err := filepath.Match(r+"-[0-9]*.key", filepath.Base(n)); err == nil && ok {
				role = r
			}
		}
		switch role {
		case "select":
			own.Release.Signers = append(own.Release.Signers, s)
		case "snapshot":
			own.Snapshot.Signers = append(own.Snapshot.Signers, s)
		case "timestamp":
			own.Timestamp.Signers = append(own.Timestamp.Signers, s)
		case "":
		default:
			people = append(people, s)
		}
	}
	return own, people, nil
}
