// SPDX-License-Identifier: Apache-2.0

package cve

import (
	"regexp"
	"slices"
	"strings"

	"klatch/internal/fault"
)

// Dyad pairs the commit that brought a flaw with a commit that removes it, as
// the kernel CNA publishes them: one for each stable line that has the fix and
// one for mainline.
type Dyad struct {
	Vulnerable       Version // zero: since ever
	VulnerableCommit string
	Fixed            Version // zero: not fixed
	FixedCommit      string
}

var commit = regexp.MustCompile(`^(0|[0-9a-f]{7,40})$`)

// ParseDyad reads "vulnerable version:commit:fixed version:commit".
func ParseDyad(s string) (Dyad, error) {
	var d Dyad
	p := strings.Split(s, ":")
	if len(p) != 4 || !commit.MatchString(p[1]) || !commit.MatchString(p[3]) {
		return d, fault.New(fault.Invalid, "bad_dyad", "%.120q is not vulnerable version:commit:fixed version:commit", s)
	}
	d.VulnerableCommit, d.FixedCommit = p[1], p[3]
	for i, v := range []*Version{0: &d.Vulnerable, 1: &d.Fixed} {
		text := p[2*i]
		if text == "0" {
			continue
		}
		var err error
		if *v, err = ParseVersion(text); err != nil {
			return d, err
		}
	}
	return d, nil
}

// String is the form that ParseDyad reads.
func (d Dyad) String() string {
	return d.Vulnerable.String() + ":" + d.VulnerableCommit + ":" + d.Fixed.String() + ":" + d.FixedCommit
}

// State is what dyads say of one upstream version.
type State string

// The states. Their spelling is stored: never rename one.
const (
	StateUnknown    State = "unknown"     // no dyad
	StateNotPresent State = "not_present" // the flaw is not in this version yet, or not on this line
	StateAffected   State = "affected"
	StateFixed      State = "fixed"
)

// StateAt says what the dyads of a CVE say of an upstream version, and the
// dyad that decides.
//
// A flaw that came with a mainline release is in every later version until a
// fix; one that came with a point release is on that stable line only. A fix
// on a stable line speaks for this line only; the fix in mainline speaks for
// all lines that began later, and for those that have no fix of their own.
// The answer is for upstream's own releases: a distribution may have taken
// the fix before.
func StateAt(dyads []Dyad, v Version) (State, Dyad) {
	if len(dyads) == 0 {
		return StateUnknown, Dyad{}
	}
	// One CVE may have several origins; every one that is in v must be fixed.
	type answer struct {
		state State
		own   bool // of a dyad of this very line
		dyad  Dyad
	}
	answers := map[string]answer{}
	for _, d := range dyads {
		if !d.reaches(v) {
			continue
		}
		own := !d.Fixed.IsZero() && d.Fixed.SameSeries(v)
		if !own && d.Fixed.point > 0 {
			continue // speaks of another line
		}
		a := answer{StateAffected, own, d}
		if !d.Fixed.IsZero() && d.Fixed.Compare(v) <= 0 {
			a.state = StateFixed
		}
		old, ok := answers[d.origin()]
		if !ok || own && !old.own || own == old.own && a.state == StateFixed {
			answers[d.origin()] = a
		}
	}
	best := answer{state: StateNotPresent}
	for _, d := range dyads { // in the order of the feed, so that the answer does not depend on the map's
		a, ok := answers[d.origin()]
		if ok && (best.state == StateNotPresent || a.state == StateAffected && best.state == StateFixed) {
			best = a
		}
	}
	if best.state == StateNotPresent && slices.ContainsFunc(dyads, func(d Dyad) bool { return d.reaches(v) }) {
		return StateUnknown, Dyad{} // every fix is one of another line, and mainline says nothing
	}
	return best.state, best.dyad
}

// reaches says whether the flaw's origin is in v.
func (d Dyad) reaches(v Version) bool {
	if d.Vulnerable.IsZero() {
		return true
	}
	if d.Vulnerable.point > 0 && !d.Vulnerable.SameSeries(v) {
		return false
	}
	return d.Vulnerable.Compare(v) <= 0
}

func (d Dyad) origin() string { return d.Vulnerable.String() + ":" + d.VulnerableCommit }
