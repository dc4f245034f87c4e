// SPDX-License-Identifier: Apache-2.0

// Package triage says what is done about a CVE on one kernel build: a policy
// proposes, from facts that feeds and the build give, and a person's reviewed
// decision goes before it. Everything that decides is a pure function; every
// answer lists the facts it used with their sources, the rule that fired, and
// what would change it.
//
// Start with Decide.
package triage

import (
	"bytes"
	"errors"
	"io/fs"
	"math"
	"path/filepath"
	"slices"

	"github.com/pelletier/go-toml/v2"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
)

// Policy says which flaws are worth a livepatch. A known exploited one always
// is, and one that nobody rates never is without a person: no policy can say
// otherwise.
type Policy struct {
	Name string `toml:"name"`
	// Priorities are the vendors' words that are in.
	Priorities []cve.Level `toml:"priorities"`
	// Vendors names whose priority counts: the first of them that has one.
	// Empty means the most urgent of all.
	Vendors []string `toml:"vendors,omitempty"`
	// MinCVSS is the lowest base score that is in, for those without a
	// vendor's priority.
	MinCVSS float64 `toml:"min_cvss"`
	// Everything takes every flaw that the kernel has. It is a stress test of
	// the builder; docs/reference/triage.md says why no fleet should run it.
	Everything bool `toml:"-"` // no file can say it: it is asked for by name
}

// Default is critical and high only.
func Default() Policy {
	return Policy{Name: "default", Priorities: []cve.Level{cve.Critical, cve.High}, MinCVSS: 7.0}
}

// Everything is the stress test.
func Everything() Policy { return Policy{Name: "everything", Everything: true} }

// PolicyFile is where a data folder may have a policy of its own.
const PolicyFile = "triage.toml"

const maxPolicy = 64 << 10

// Named finds a policy: "default" is that of the data folder, or ours where it
// has none; "everything" is the stress test.
func Named(dir, name string) (Policy, error) {
	switch name {
	case "everything":
		return Everything(), nil
	case "", "default":
	default:
		return Policy{}, fault.New(fault.Invalid, "bad_policy", "policy %.40q is unknown", name).
			WithHint("use default (%s in the data folder changes it) or everything", PolicyFile)
	}
	b, err := durable.ReadFile(filepath.Join(dir, PolicyFile), maxPolicy)
	if errors.Is(err, fs.ErrNotExist) {
		return Default(), nil
	}
	if err != nil {
		return Policy{}, err
	}
	p, err := ParsePolicy(b)
	if err != nil {
		return p, fault.New(fault.Invalid, "bad_policy", "read %s: %w", filepath.Join(dir, PolicyFile), err)
	}
	return p, nil
}

// ParsePolicy reads a policy in TOML. What it leaves out is as in Default.
func ParsePolicy(b []byte) (Policy, error) {
	p := Default()
	p.Priorities = nil
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&p); err != nil {
		return p, fault.New(fault.Invalid, "bad_policy", "%w", err).WithHint("the keys are name, priorities, vendors, min_cvss")
	}
	if p.Priorities == nil {
		p.Priorities = Default().Priorities
	}
	if len(p.Priorities) == 0 {
		return p, fault.New(fault.Invalid, "bad_policy", "no priority is in").WithHint("name at least critical")
	}
	for _, l := range p.Priorities {
		if l.Rank() == 0 {
			return p, fault.New(fault.Invalid, "bad_policy", "priority %.40q is unknown", string(l)).
				WithHint("use critical, high, medium, low, negligible")
		}
	}
	if p.MinCVSS <= 0 || p.MinCVSS > 10 || math.IsNaN(p.MinCVSS) {
		return p, fault.New(fault.Invalid, "bad_policy", "min_cvss is %v", p.MinCVSS).WithHint("use more than 0 and at most 10")
	}
	if p.Name == "everything" || p.Name == "" {
		return p, fault.New(fault.Invalid, "bad_policy", "policy has the name %q", p.Name).WithHint("give it a name of its own")
	}
	return p, nil
}

// priority is the vendor's word that the policy believes.
func (p Policy) priority(all []cve.Priority) (cve.Priority, bool) {
	if len(p.Vendors) == 0 {
		if len(all) == 0 {
			return cve.Priority{}, false
		}
		return slices.MaxFunc(all, func(a, b cve.Priority) int { return a.Level.Rank() - b.Level.Rank() }), true
	}
	for _, v := range p.Vendors {
		if i := slices.IndexFunc(all, func(x cve.Priority) bool { return x.Vendor == v }); i >= 0 {
			return all[i], true
		}
	}
	return cve.Priority{}, false
}

// score is the highest one. Sources differ by what they assume of the
// attacker; the policy goes by the one who fears most.
func (p Policy) score(all []cve.Score) (cve.Score, bool) {
	if len(all) == 0 {
		return cve.Score{}, false
	}
	return slices.MaxFunc(all, func(a, b cve.Score) int {
		if a.Value < b.Value {
			return -1
		}
		return 1
	}), true
}
