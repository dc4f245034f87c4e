// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"time"

	"klatch/internal/fault"
	"klatch/internal/trust"
)

// PolicyFormat is the version word of the published policy.
const PolicyFormat = "klatch-evidence-policy/1"

// MaxPolicy limits a policy, in bytes.
const MaxPolicy = 256 << 10

// Policy says who may sign what, how many must, and how old it may be. The
// publisher keeps it as reviewed text; it is published as a target, so the
// targets keys sign it, and a stranger gets it from the trust anchor on. Of
// several published ones the highest version counts, for all livepatches.
type Policy struct {
	Format  string        `json:"format" toml:"-"`
	Version int           `json:"version" toml:"version"`
	Profile trust.Profile `json:"profile" toml:"-"` // of the publisher; it sets the least that a policy may ask
	// How many different signers of a role each livepatch needs.
	Builders  int `json:"builders" toml:"builders"`
	Testers   int `json:"testers" toml:"testers"`
	Reviewers int `json:"reviewers" toml:"reviewers"`
	// SelfReview lets the author of a source patch review it; in profile lab only.
	SelfReview bool `json:"self_review" toml:"self_review"`
	// How old a statement may be when the livepatch is signed, in days.
	BuildDays  int `json:"build_days" toml:"build_days"`
	TestDays   int `json:"test_days" toml:"test_days"`
	ReviewDays int `json:"review_days" toml:"review_days"`
	VEXDays    int `json:"vex_days" toml:"vex_days"`
	// Required are the scenarios that every livepatch must pass, besides those
	// that follow from the livepatch itself.
	Required []string `json:"required" toml:"required"`
	Signers  []Signer `json:"signers" toml:"signer"`
}

// least is what a profile asks of a policy.
var least = map[trust.Profile]struct {
	builders   int
	selfReview bool
}{
	trust.Full:  {2, false},
	trust.Small: {1, false},
	trust.Lab:   {1, true},
}

// DefaultPolicy is the least that a profile allows, without signers.
func DefaultPolicy(p trust.Profile, required []string) Policy {
	return Policy{Format: PolicyFormat, Version: 1, Profile: p, Builders: least[p].builders, Testers: 1, Reviewers: 1, SelfReview: least[p].selfReview,
		BuildDays: 90, TestDays: 30, ReviewDays: 90, VEXDays: 90, Required: required}
}

// Encode writes the published form.
func (p Policy) Encode() ([]byte, error) {
	p.Format = PolicyFormat
	if err := p.Check(); err != nil {
		return nil, err
	}
	return encode(p)
}

// ParsePolicy reads a published policy of a publisher of this profile.
func ParsePolicy(b []byte, profile trust.Profile) (Policy, error) {
	var p Policy
	if len(b) > MaxPolicy {
		return p, refuse("policy_malformed", "evidence policy has %d bytes, limit %d", len(b), MaxPolicy)
	}
	if err := decode(b, &p); err != nil {
		return p, refuse("policy_malformed", "evidence policy: %w", err)
	}
	if p.Format != PolicyFormat || p.Profile != profile {
		return p, refuse("policy_malformed", "evidence policy has format %.40q and profile %.40q, want %q and %q", p.Format, p.Profile, PolicyFormat, profile)
	}
	if err := p.Check(); err != nil {
		return p, refuse("policy_malformed", "%w", err)
	}
	return p, nil
}

// maxSigners limits a policy's list.
const maxSigners = 256

// Check says what is wrong with a policy: less than its profile asks, more
// than its signers can give, or one key under two names, which would count
// for two.
func (p Policy) Check() error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "bad_evidence_policy", "evidence policy: "+format, args...)
	}
	l, ok := least[p.Profile]
	switch {
	case !ok:
		return bad("profile %.40q is unknown", p.Profile)
	case p.Version < 1:
		return bad("version %d", p.Version)
	case p.Builders < l.builders || p.Testers < 1 || p.Reviewers < 1:
		return bad("profile %s needs at least %d builders, 1 tester and 1 reviewer", p.Profile, l.builders)
	case p.SelfReview && !l.selfReview:
		return bad("profile %s lets nobody review their own work", p.Profile)
	case p.BuildDays < 1 || p.TestDays < 1 || p.ReviewDays < 1 || p.VEXDays < 1:
		return bad("a limit of age is below one day")
	case len(p.Required) == 0:
		return bad("no scenario is required")
	case len(p.Signers) > maxSigners:
		return bad("%d signers, limit %d", len(p.Signers), maxSigners)
	}
	for i, s := range p.Signers {
		if err := s.check(); err != nil {
			return err
		}
		for _, o := range p.Signers[:i] {
			if o.Key == s.Key {
				return bad("one key is listed as %s and as %s", o.Name, s.Name)
			}
			if o.Name == s.Name {
				return bad("signer %s is listed twice", s.Name)
			}
		}
	}
	return nil
}

func (p Policy) signer(keyID string) (Signer, bool) {
	i := slices.IndexFunc(p.Signers, func(s Signer) bool { return s.Key.ID() == keyID })
	if i < 0 {
		return Signer{}, false
	}
	return p.Signers[i], true
}

func (p Policy) maxAge(r Role) time.Duration {
	days := map[Role]int{Builder: p.BuildDays, Tester: p.TestDays, Reviewer: p.ReviewDays, Analyst: p.VEXDays}[r]
	return time.Duration(days) * 24 * time.Hour
}

var policyPath = regexp.MustCompile(`^policy/evidence\.([1-9][0-9]{0,8})\.json$`)

// TargetPath is the policy's name in the TUF repository.
func (p Policy) TargetPath() string { return fmt.Sprintf("policy/evidence.%d.json", p.Version) }

// PolicyVersion reads the version out of a target's path; 0 means that the
// target is no policy.
func PolicyVersion(path string) int {
	m := policyPath.FindStringSubmatch(path)
	if m == nil {
		return 0
	}
	n, err := strconv.Atoi(m[1])
	if err != nil {
		return 0
	}
	return n
}
