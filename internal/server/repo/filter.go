// SPDX-License-Identifier: Apache-2.0

package repo

import (
	"cmp"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
)

// Filter says for which kernels a mirror copies livepatches. An empty list
// lets all through; lists are joined by "and". Metadata, logs, policies,
// recalls and notices are always copied.
type Filter struct {
	Distros    []string `json:"distros,omitempty"`     // such as debian-12; a pattern of path.Match
	Arches     []string `json:"arches,omitempty"`      // such as amd64; a pattern
	Series     []string `json:"series,omitempty"`      // such as 6.1
	MinKernels []string `json:"min_kernels,omitempty"` // such as 6.1.0-40: this one and newer
	Kernels    []string `json:"kernels,omitempty"`     // releases, such as *-cloud-amd64; patterns
}

// Rules are what a mirror's owner decided.
type Rules struct {
	Filter Filter
	// MinAge is how long ago a livepatch must have been released, by the
	// signed list, before it is copied. Recalls and metadata never wait.
	MinAge time.Duration
}

// MaxMinAge limits Rules.MinAge: whoever waits longer than metadata lives
// would never be current.
const MaxMinAge = 90 * 24 * time.Hour

// maxPatterns limits each list of a filter.
const maxPatterns = 100

var (
	seriesPattern = regexp.MustCompile(`^[0-9]{1,3}\.[0-9]{1,4}$`)
	numberPattern = regexp.MustCompile(`^[0-9]{1,9}([.-][0-9]{1,9})*`)
)

// Validate checks what a person wrote.
func (r Rules) Validate() error {
	bad := func(what, v, want string) error {
		return fault.New(fault.Invalid, "bad_filter", "%s %.80q is not %s", what, v, want)
	}
	f := r.Filter
	for what, list := range map[string][]string{"distribution": f.Distros, "architecture": f.Arches, "kernel": f.Kernels, "series": f.Series, "minimum kernel": f.MinKernels} {
		if len(list) > maxPatterns {
			return fault.New(fault.Invalid, "bad_filter", "%d values for %s, at most %d", len(list), what, maxPatterns)
		}
		for _, v := range list {
			if _, err := path.Match(v, ""); v == "" || err != nil || len(v) > 64 || strings.Contains(v, "/") {
				return bad(what, v, "a name or a pattern such as debian-* or *-cloud-amd64")
			}
		}
	}
	for _, s := range f.Series {
		if !seriesPattern.MatchString(s) {
			return bad("series", s, "such as 6.1")
		}
	}
	for _, m := range f.MinKernels {
		if n := numbers(m); len(n) < 2 {
			return bad("minimum kernel", m, "a release such as 6.1.0-40")
		}
	}
	if r.MinAge < 0 || r.MinAge > MaxMinAge {
		return fault.New(fault.Invalid, "bad_age", "minimum age %s: want 0 to %s", r.MinAge, MaxMinAge)
	}
	return nil
}

// Empty says that everything is let through.
func (f Filter) Empty() bool {
	return len(f.Distros)+len(f.Arches)+len(f.Series)+len(f.MinKernels)+len(f.Kernels) == 0
}

// Match says whether livepatches of a place are copied.
func (f Filter) Match(p livepatch.Place) bool {
	return anyOf(f.Distros, p.Distro) && anyOf(f.Arches, p.Arch) && anyOf(f.Kernels, p.Release) &&
		(len(f.Series) == 0 || slices.Contains(f.Series, series(numbers(p.Release)))) && f.newEnough(numbers(p.Release))
}

func anyOf(patterns []string, s string) bool {
	return len(patterns) == 0 || slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, s)
		return err == nil && ok
	})
}

// newEnough compares with the minimum of the kernel's own series; a kernel of
// a series without one must be newer than the lowest.
func (f Filter) newEnough(release []int) bool {
	if len(f.MinKernels) == 0 {
		return true
	}
	lowest := numbers(f.MinKernels[0])
	for _, m := range f.MinKernels {
		n := numbers(m)
		if series(n) == series(release) {
			return slices.Compare(release, n) >= 0
		}
		if slices.Compare(n, lowest) < 0 {
			lowest = n
		}
	}
	return slices.Compare(release, lowest) >= 0
}

// numbers are what a release begins with: 6.1.0-50-cloud-amd64 is 6, 1, 0, 50.
func numbers(release string) []int {
	var n []int
	for _, part := range strings.FieldsFunc(numberPattern.FindString(release), func(r rune) bool { return r == '.' || r == '-' }) {
		v, err := strconv.Atoi(part)
		if err != nil {
			return nil
		}
		n = append(n, v)
	}
	return n
}

func series(n []int) string {
	if len(n) < 2 {
		return ""
	}
	return strconv.Itoa(n[0]) + "." + strconv.Itoa(n[1])
}

// String says it to a person.
func (f Filter) String() string {
	var parts []string
	for _, l := range []struct {
		name   string
		values []string
	}{{"distribution", f.Distros}, {"architecture", f.Arches}, {"series", f.Series}, {"at least", f.MinKernels}, {"kernel", f.Kernels}} {
		if len(l.values) > 0 {
			parts = append(parts, l.name+" "+strings.Join(l.values, " or "))
		}
	}
	return cmp.Or(strings.Join(parts, ", "), "everything")
}
