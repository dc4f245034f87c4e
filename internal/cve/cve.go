// SPDX-License-Identifier: Apache-2.0

// Package cve holds the identifier of a vulnerability and what is said of it:
// Record, with the source of every value. It reads nothing; feeds do.
//
// Start with Record and StateAt.
package cve

import (
	"cmp"
	"regexp"
	"strings"

	"klatch/internal/fault"
)

// ID is a CVE identifier: "CVE-", a year and four to nineteen digits
// (CVE Record Format 5.1, schema cveId).
type ID string

var pattern = regexp.MustCompile(`^CVE-[0-9]{4}-[0-9]{4,19}$`)

// Parse checks the form of an identifier.
func Parse(s string) (ID, error) {
	if !pattern.MatchString(s) {
		return "", fault.New(fault.Invalid, "bad_cve", "%q is not a CVE identifier", s).
			WithHint("write it as CVE-2026-12345")
	}
	return ID(s), nil
}

// UnmarshalText parses, so that no JSON or TOML brings in a malformed one.
func (id *ID) UnmarshalText(b []byte) error {
	p, err := Parse(string(b))
	if err != nil {
		return err
	}
	*id = p
	return nil
}

// Compare orders identifiers by year, then by number.
func Compare(a, b ID) int {
	part := func(id ID) (string, string) {
		year, number, _ := strings.Cut(strings.TrimPrefix(string(id), "CVE-"), "-")
		return year, number
	}
	yearA, nA := part(a)
	yearB, nB := part(b)
	return cmp.Or(strings.Compare(yearA, yearB), cmp.Compare(len(nA), len(nB)), strings.Compare(nA, nB))
}
