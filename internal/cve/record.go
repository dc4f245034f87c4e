// SPDX-License-Identifier: Apache-2.0

package cve

// Source says where a value came from: which feed, which file of it, and the
// day of that file (YYYY-MM-DD).
type Source struct {
	Feed string `json:"feed"`
	File string `json:"file"`
	Date string `json:"date"`
}

// Record is what feeds say of one vulnerability. Parts that no feed has
// spoken of are empty, and empty means unknown: a record without a rating is
// not a harmless one.
type Record struct {
	ID ID

	// CNA is the source of the kernel CNA's part, which comes as a whole:
	// Title to Dyads. It is empty when only other feeds know the CVE.
	CNA         Source
	Published   string // YYYY-MM-DD; may be empty
	Title       string
	Description string
	Files       []string // paths in the kernel tree that the fix touches
	FixCommits  []string
	Dyads       []Dyad

	Scores     []Score
	Priorities []Priority
	Exploited  []Exploited
}

// Score is a CVSS vector that somebody published, and the base score that
// follows from it by the standard.
type Score struct {
	By     string // who judged, such as "kernel_cna" or "cisa_adp"
	Vector string
	Value  float64
	From   Source
}

// Priority is a vendor's own word on urgency, which is not a CVSS rating.
type Priority struct {
	Vendor string
	Level  Level
	From   Source
}

// Exploited says that somebody knows of use in the wild.
type Exploited struct {
	Added string // the day it was listed
	From  Source
}

// Level is a vendor's priority, in the words that Ubuntu and Debian use.
type Level string

// The levels, from most to least urgent. Their spelling is stored.
const (
	Critical   Level = "critical"
	High       Level = "high"
	Medium     Level = "medium"
	Low        Level = "low"
	Negligible Level = "negligible" // Debian says unimportant
)

var levels = []Level{Negligible, Low, Medium, High, Critical}

// Rank orders levels: more urgent is greater, and 0 is no level.
func (l Level) Rank() int {
	for i, x := range levels {
		if x == l {
			return i + 1
		}
	}
	return 0
}

// Status is a word of VEX (OpenVEX specification 0.2.0) on one product, here
// a kernel build or a series.
type Status string

// The statuses.
const (
	NotAffected        Status = "not_affected" // needs a justification
	Affected           Status = "affected"
	Fixed              Status = "fixed"
	UnderInvestigation Status = "under_investigation"
)

// Known says whether the word is one of VEX.
func (s Status) Known() bool {
	return s == NotAffected || s == Affected || s == Fixed || s == UnderInvestigation
}

// Justification says why something is not affected, in the words of OpenVEX.
type Justification string

// The justifications.
const (
	ComponentNotPresent  Justification = "component_not_present"
	CodeNotPresent       Justification = "vulnerable_code_not_present"
	CodeNotInExecutePath Justification = "vulnerable_code_not_in_execute_path"
	CodeNotControlled    Justification = "vulnerable_code_cannot_be_controlled_by_adversary"
	MitigationsExist     Justification = "inline_mitigations_already_exist"
)

// Known says whether the word is one of VEX.
func (j Justification) Known() bool {
	switch j {
	case ComponentNotPresent, CodeNotPresent, CodeNotInExecutePath, CodeNotControlled, MitigationsExist:
		return true
	}
	return false
}
