// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"encoding/json"
	"regexp"

	"klatch/internal/fault"
)

// AnchorFormat is the version word of the operator's anchor file.
const AnchorFormat = "klatch-rollout-anchor/1"

// MaxAnchor limits the anchor file, in bytes: one TUF root.
const MaxAnchor = 1 << 20

// Profile says how strictly the operator's keys are handled.
type Profile string

// The profiles. Lab keys lie together on the server, so that whoever owns it
// can promote; machines refuse them unless their owner allowed it.
const (
	Lab   Profile = "lab"
	Small Profile = "small"
	Full  Profile = "full"
)

// Approvers is the least number of people whose keys must sign a promotion,
// and the least threshold of the operator's top list.
func (p Profile) Approvers() int {
	if p == Lab {
		return 1
	}
	return 2
}

// Anchor is what a machine believes of the operator before it reads anything
// from a network. It lies beside the publisher's anchor, as rollout.json; only
// klatchd reads it.
type Anchor struct {
	Format   string  `json:"format"`
	Operator string  `json:"operator"`
	Profile  Profile `json:"profile"`
	Root     []byte  `json:"root"` // first root of the rollout repository
}

var operatorName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,62}$`)

// CheckOperator refuses what cannot name an operator.
func CheckOperator(name string) error {
	if !operatorName.MatchString(name) {
		return fault.New(fault.Invalid, "bad_operator", "operator %.80q is not a name of lower-case letters, digits, dots and dashes", name)
	}
	return nil
}

func (a Anchor) validate() error {
	if a.Format != AnchorFormat {
		return bad("format %.40q, want %q", a.Format, AnchorFormat)
	}
	if err := CheckOperator(a.Operator); err != nil {
		return err
	}
	if a.Profile != Lab && a.Profile != Small && a.Profile != Full {
		return bad("profile %.40q is unknown", a.Profile)
	}
	if !json.Valid(a.Root) {
		return bad("root is not the metadata of a root")
	}
	return nil
}

// Encode writes the one form.
func (a Anchor) Encode() ([]byte, error) { return encode("rollout_anchor", a) }

// ParseAnchor reads an anchor file. allowLab must have been said by the
// machine's owner.
func ParseAnchor(b []byte, allowLab bool) (*Anchor, error) {
	a, err := parse[Anchor]("rollout_anchor", b, MaxAnchor)
	if err != nil {
		return nil, err
	}
	if a.Profile == Lab && !allowLab {
		return nil, fault.New(fault.Untrusted, "lab_keys", "rollout anchor of %s uses lab keys: whoever owns the server can promote", a.Operator).
			WithHint("install an anchor of profile small, or allow lab keys on this machine: klatch trust allow-lab")
	}
	return &a, nil
}
