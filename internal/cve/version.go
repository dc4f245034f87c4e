// SPDX-License-Identifier: Apache-2.0

package cve

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"

	"klatch/internal/fault"
)

// Version is a version of the upstream kernel: a series and its point
// release. 2.6.N was a series, not a point release; from 3.0 on a series has
// two numbers. Distributions add their own suffix, which is not part of it.
type Version struct {
	series [3]int // {6, 1, 0} or {2, 6, 32}
	point  int
	rc     int // 0 means released
}

// ParseVersion reads "6.1", "6.1.78", "6.8-rc4", "2.6.32" and "2.6.32.5".
func ParseVersion(s string) (Version, error) {
	bad := func() (Version, error) {
		return Version{}, fault.New(fault.Invalid, "bad_version", "%.40q is not an upstream kernel version", s).
			WithHint("write it as 6.1.78")
	}
	var v Version
	numbers, rc, isRC := strings.Cut(s, "-rc")
	if isRC {
		n, ok := number(rc)
		if !ok || n == 0 {
			return bad()
		}
		v.rc = n
	}
	parts := strings.Split(numbers, ".")
	var n [4]int
	if len(parts) < 2 || len(parts) > len(n) {
		return bad()
	}
	for i, p := range parts {
		var ok bool
		if n[i], ok = number(p); !ok {
			return bad()
		}
	}
	switch {
	case n[0] == 2: // linux 2.6.0 to 2.6.39, and what came before
		v.series, v.point = [3]int{n[0], n[1], n[2]}, n[3]
	case len(parts) == 4 || n[0] == 0 && n[1] == 0:
		return bad()
	default:
		v.series, v.point = [3]int{n[0], n[1]}, n[2]
	}
	if isRC && v.point != 0 {
		return bad()
	}
	return v, nil
}

func number(s string) (int, bool) {
	if len(s) == 0 || len(s) > 5 || len(s) > 1 && s[0] == '0' {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 31)
	return int(n), err == nil && s[0] != '+'
}

// String is the form that ParseVersion reads; the zero Version is "0".
func (v Version) String() string {
	if v.IsZero() {
		return "0"
	}
	s := v.Series()
	if v.point > 0 {
		s += fmt.Sprintf(".%d", v.point)
	}
	if v.rc > 0 {
		s += fmt.Sprintf("-rc%d", v.rc)
	}
	return s
}

// MarshalText writes the form of String.
func (v Version) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// IsZero says that there is no version: of an origin "since ever", of a fix
// "not yet".
func (v Version) IsZero() bool { return v == Version{} }

// Series is "6.1", or "2.6.32".
func (v Version) Series() string {
	if v.series[0] == 2 {
		return fmt.Sprintf("%d.%d.%d", v.series[0], v.series[1], v.series[2])
	}
	return fmt.Sprintf("%d.%d", v.series[0], v.series[1])
}

// SameSeries says whether both are on one stable line.
func (v Version) SameSeries(w Version) bool { return v.series == w.series }

// Compare orders versions as numbers, release candidates before the release.
// Versions of different stable lines are ordered too, but the later number
// does not contain the earlier one's fixes: see State.
func (v Version) Compare(w Version) int {
	candidate := func(n int) int {
		if n == 0 {
			return 1 << 30
		}
		return n
	}
	return cmp.Or(
		cmp.Compare(v.series[0], w.series[0]), cmp.Compare(v.series[1], w.series[1]), cmp.Compare(v.series[2], w.series[2]),
		cmp.Compare(v.point, w.point), cmp.Compare(candidate(v.rc), candidate(w.rc)))
}
