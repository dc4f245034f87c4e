// SPDX-License-Identifier: Apache-2.0

// Package attest is the publisher's side of evidence: it keeps the keys that
// sign statements, makes statements of what was built, tested and reviewed,
// gathers those of others beside each build, and is the gate that signing goes
// through. What a statement may say and whether it suffices is package
// evidence's to decide. Start with Gate.
package attest

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"klatch/internal/durable"
	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/forge/datadir"
	"klatch/internal/trust"
)

const policyFile = "evidence.toml"

// MakeKeys makes what is missing of the keys for statements and the policy
// that lists them. In profile lab one key has every role. Elsewhere the host
// gets keys of a builder, a tester and an analyst; reviewers are people, and
// make their own.
func MakeKeys(d datadir.Dir) error {
	if _, err := os.Lstat(filepath.Join(d.Path, policyFile)); !errors.Is(err, fs.ErrNotExist) {
		return err // there already, or unreadable
	}
	p := evidence.DefaultPolicy(d.Policy.Profile, evidence.BaseScenarios)
	keys := map[string][]evidence.Role{"builder-1": {evidence.Builder}, "tester-1": {evidence.Tester}, "analyst-1": {evidence.Analyst}}
	if d.Policy.Profile == trust.Lab {
		keys = map[string][]evidence.Role{"lab": evidence.Roles}
	}
	for _, name := range slices.Sorted(keyNames(keys)) {
		k, err := MakeKey(d, name, keys[name]...)
		if err != nil {
			return err
		}
		p.Signers = append(p.Signers, k.Signer())
	}
	return WritePolicy(d, p)
}

func keyNames(m map[string][]evidence.Role) func(func(string) bool) {
	return func(yield func(string) bool) {
		for name := range m {
			if !yield(name) {
				return
			}
		}
	}
}

func keyFile(d datadir.Dir, name string) string {
	return filepath.Join(d.Keys(), "evidence-"+name+".key")
}

// MakeKey makes a key, or finds the one that an earlier run made.
func MakeKey(d datadir.Dir, name string, roles ...evidence.Role) (evidence.PrivateKey, error) {
	k, err := evidence.NewKey(name, roles...)
	if err != nil {
		return k, err
	}
	b, err := durable.ReadFile(keyFile(d, name), 64<<10)
	if err == nil {
		old, err := evidence.ParsePrivateKey(b)
		if err == nil && !slices.Equal(old.Roles, roles) {
			err = fault.New(fault.Conflict, "key_exists", "key %s is there, with roles %v", name, old.Roles).WithHint("take another name")
		}
		return old, err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	if b, err = k.Encode(); err != nil {
		return k, err
	}
	return k, durable.WriteFile(keyFile(d, name), b, 0o600)
}

// Keys reads the private keys in the folder that have a role.
func Keys(d datadir.Dir, r evidence.Role) ([]evidence.PrivateKey, error) {
	files, err := filepath.Glob(filepath.Join(d.Keys(), "evidence-*.key"))
	if err != nil {
		return nil, err
	}
	var all []evidence.PrivateKey
	for _, f := range files {
		b, err := durable.ReadFile(f, 64<<10)
		if err != nil {
			return nil, err
		}
		k, err := evidence.ParsePrivateKey(b)
		if err != nil {
			return nil, err
		}
		if k.Signer().May(r) {
			all = append(all, k)
		}
	}
	return all, nil
}

// Key chooses the private key of a role: the one of that name, or the only
// one. Without any it is the code no_key.
func Key(d datadir.Dir, r evidence.Role, name string) (evidence.PrivateKey, error) {
	var none evidence.PrivateKey
	all, err := Keys(d, r)
	if err != nil {
		return none, err
	}
	var names []string
	for _, k := range all {
		if k.Name == name {
			return k, nil
		}
		names = append(names, k.Name)
	}
	switch {
	case name == "" && len(all) == 1:
		return all[0], nil
	case len(all) == 0 || name != "":
		return none, fault.New(fault.NotFound, "no_key", "no key %q with role %s lies in %s", name, r, d.Keys()).
			WithHint("make one: klatch-forge evidence key --role %s --name NAME", r)
	}
	return none, fault.New(fault.Invalid, "which_key", "there are %d keys with role %s", len(all), r).
		WithHint("say which: --as %s", strings.Join(names, ", --as "))
}

// ReadPolicy reads the policy of the data folder.
func ReadPolicy(d datadir.Dir) (evidence.Policy, error) {
	var p evidence.Policy
	b, err := durable.ReadFile(filepath.Join(d.Path, policyFile), evidence.MaxPolicy)
	if errors.Is(err, fs.ErrNotExist) {
		return p, fault.New(fault.NotFound, "no_policy", "the data folder has no evidence policy: %w", err).
			WithHint("complete the folder: klatch-forge init %s --profile %s --publisher %s", d.Path, d.Policy.Profile, d.Policy.Publisher)
	}
	if err != nil {
		return p, err
	}
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&p); err != nil {
		return p, fault.New(fault.Invalid, "bad_evidence_policy", "read %s: %w", filepath.Join(d.Path, policyFile), err)
	}
	p.Format, p.Profile = evidence.PolicyFormat, d.Policy.Profile
	return p, p.Check()
}

// WritePolicy replaces the policy of the data folder.
func WritePolicy(d datadir.Dir, p evidence.Policy) error {
	if err := p.Check(); err != nil {
		return err
	}
	b, err := toml.Marshal(p)
	if err != nil {
		return err
	}
	const head = "# Who may sign what about a livepatch, how many must, how old it may be.\n# Reviewed text; it is published. Raise version with every change that follows a publication.\n"
	return durable.WriteFile(filepath.Join(d.Path, policyFile), append([]byte(head), b...), 0o644)
}

// Allow adds a signer to the policy, whose version it raises. A signer that is
// there already, with the same key, gets the new roles and names.
func Allow(d datadir.Dir, s evidence.Signer) (evidence.Policy, error) {
	p, err := ReadPolicy(d)
	if err != nil {
		return p, err
	}
	i := slices.IndexFunc(p.Signers, func(o evidence.Signer) bool { return o.Name == s.Name && o.Key == s.Key })
	if i >= 0 {
		p.Signers[i] = s
	} else {
		p.Signers = append(p.Signers, s)
	}
	p.Version++
	return p, WritePolicy(d, p)
}
