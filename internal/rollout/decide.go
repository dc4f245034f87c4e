// SPDX-License-Identifier: Apache-2.0

package rollout

import (
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

// Class says what a machine does after a decision. What runs is never taken
// out because of one.
type Class string

// The classes.
const (
	Take       Class = "take"       // both repositories want it, now
	Stay       Class = "stay"       // keep what is loaded, look again later
	Quarantine Class = "quarantine" // stay, remember Choice.SHA256 as bad, and report
	Halt       Class = "halt"       // stay, load nothing more until a person or a newer top list clears it
)

// Codes of a stay that is no fault of anybody.
const (
	CodeNotSelected fault.Code = "not_selected" // nothing for this kernel build in this tier
	CodeHeld        fault.Code = "held"
	CodeNotPromoted fault.Code = "not_promoted" // chosen, but the approvers did not open the tier
	CodeSoaking     fault.Code = "soaking"
)

// Machine is what a machine knows by itself. Neither may come from a reply.
type Machine struct {
	Tier   string       // of the machine's own configuration
	Kernel kernel.Build // that runs
}

// Target is one line of the publisher's verified list.
type Target struct {
	Path   string
	Bytes  int64
	SHA256 string // lower-case hexadecimal
}

// File is one target of the operator's repository, verified, and the role
// whose list named it.
type File struct {
	Role    string
	Content []byte
}

// View is what the two repositories hold. Both functions answer with an error
// of kind not_found where the signed lists do not name the path; any other
// error ends the decision and is given back. Refresh the operator's repository
// before the publisher's: the server copies a livepatch before it selects it.
type View struct {
	Patches func(path string) (Target, error)
	Rollout func(path string, limit int64) (File, error)
}

// Choice is the outcome. Class is set also where there is an error.
type Choice struct {
	Class  Class
	Code   fault.Code // of a stay without an error
	Reason string     // the same, for people

	Target   string // set from the time on that the selection is believed
	Sequence livepatch.Sequence
	Bytes    int64
	SHA256   string
	Opens    time.Time // of a soak
}

// Decide says what a machine is to do now. An error is a refusal that somebody
// should hear of; a stay without one is ordinary waiting. Whether the sequence
// is higher than the loaded one, recalled or blocked, the caller decides.
//
// The order: the list of tiers, the selection for this tier and kernel build,
// a hold, the agreement of both repositories, then the rule of the tiers: the first
// tier, or a promotion of exactly this bundle to exactly this tier whose soak
// is over.
func Decide(now time.Time, m Machine, v View) (Choice, error) {
	c := Choice{Class: Stay}
	tiers, err := readTiers(v)
	if fault.CodeOf(err) == "tiers_malformed" {
		c.Class = Halt // the operator's people signed it; no server can have made it
	}
	if err != nil {
		return c, err
	}
	place := tiers.Index(m.Tier)
	if place < 0 {
		return c, fault.New(fault.Conflict, "tier_unknown", "this machine is in tier %.60q, which the operator does not have", m.Tier).
			WithHint("set the machine's tier to one of the operator's, or add it: klatch-fleet tier list")
	}
	s, err := readSelection(v, m)
	if fault.KindOf(err) == fault.NotFound {
		c.Code, c.Reason = CodeNotSelected, "the operator wants nothing for this kernel build in tier "+m.Tier
		return c, nil
	}
	if err != nil {
		return c, err
	}
	c.Target, c.Sequence, c.Bytes, c.SHA256 = s.Target, s.Sequence, s.Bytes, s.SHA256
	if s.Hold {
		c.Code, c.Reason = CodeHeld, "the operator holds tier "+m.Tier+": "+s.Reason
		return c, nil
	}
	if err := agree(s, v); err != nil {
		if fault.CodeOf(err) == "repositories_disagree" {
			c.Class = Quarantine
		}
		return c, err
	}
	if place == 0 {
		c.Class = Take
		return c, nil
	}
	return promoted(now, c, tiers.Tiers[place], v)
}

func readTiers(v View) (Tiers, error) {
	f, err := read(v, RoleTargets, TiersPath, MaxTiersFile)
	if fault.KindOf(err) == fault.NotFound {
		return Tiers{}, fault.New(fault.Untrusted, "tiers_missing", "the operator's repository has no list of tiers").
			WithHint("sign one: klatch-fleet tier add")
	}
	if err != nil {
		return Tiers{}, err
	}
	return ParseTiers(f)
}

func readSelection(v View, m Machine) (Selection, error) {
	b, err := read(v, RoleSelect, SelectPath(m.Tier, m.Kernel.ID), MaxSelectionFile)
	if err != nil {
		return Selection{}, err
	}
	s, err := ParseSelection(b)
	if err != nil {
		return s, err
	}
	if s.Tier != m.Tier {
		return s, fault.New(fault.Untrusted, "selection_mismatch", "the selection for tier %s is one of tier %s", m.Tier, s.Tier)
	}
	return s, kernel.Fits(s.Kernel, m.Kernel)
}

// agree asks the publisher's list for the same path, length and digest.
func agree(s Selection, v View) error {
	t, err := v.Patches(s.Target)
	if fault.KindOf(err) == fault.NotFound {
		// Withdrawn a moment ago, or never released. The digest is not known
		// to be bad, so it is not remembered.
		return fault.New(fault.Untrusted, "target_not_released", "the operator selects %s, which the publisher does not offer", s.Target).
			WithHint("tell whoever runs the server if this stays")
	}
	if err != nil {
		return err
	}
	if t.Path != s.Target || t.Bytes != s.Bytes || t.SHA256 != s.SHA256 {
		return fault.New(fault.Untrusted, "repositories_disagree", "%s has %d bytes with SHA-256 %.64q for the operator, %d bytes with %.64q for the publisher", s.Target, s.Bytes, s.SHA256, t.Bytes, t.SHA256).
			WithHint("tell whoever runs the server: it selected a file that its publisher did not release")
	}
	return nil
}

func promoted(now time.Time, c Choice, tier Tier, v View) (Choice, error) {
	b, err := read(v, RolePromotion, PromotionPath(tier.Name, c.SHA256), MaxPromotionFile)
	if fault.KindOf(err) == fault.NotFound {
		c.Code, c.Reason = CodeNotPromoted, c.Target+" is not promoted to tier "+tier.Name
		return c, nil
	}
	if err != nil {
		return c, err
	}
	p, err := ParsePromotion(b)
	if err != nil {
		return c, err
	}
	if p.Tier != tier.Name || p.SHA256 != c.SHA256 || p.Target != c.Target {
		return c, fault.New(fault.Untrusted, "promotion_mismatch", "the promotion of %s to tier %s is one of %.160q to tier %s", c.Target, tier.Name, p.Target, p.Tier)
	}
	if c.Opens = p.Opens(tier); now.Before(c.Opens) {
		c.Code, c.Reason = CodeSoaking, "tier "+tier.Name+" opens for "+c.Target+" at "+c.Opens.UTC().Format(time.RFC3339)
		return c, nil
	}
	c.Class = Take
	return c, nil
}

// read gets one file and refuses it from a role that may not say this.
func read(v View, role, path string, limit int64) ([]byte, error) {
	f, err := v.Rollout(path, limit)
	if err != nil {
		return nil, err
	}
	if f.Role != role {
		return nil, fault.New(fault.Untrusted, "rollout_role", "%s is signed by role %.80q, which may not say this", path, f.Role)
	}
	return f.Content, nil
}
