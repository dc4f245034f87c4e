// SPDX-License-Identifier: Apache-2.0

// Package feed reads what others publish about vulnerabilities into
// cve.Record: the kernel CNA's records, priorities of vendors, and CISA's list
// of known exploited vulnerabilities. Every value remembers its feed, file and
// date. A bad record is kept aside and listed; it is neither fatal nor
// silently dropped. Nothing here decides anything, and nothing uses a network:
// somebody puts the files there (Sync keeps them with their digest).
//
// Start with Set, then Read.
package feed

import (
	"cmp"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"

	gocvss20 "github.com/pandatix/go-cvss/20"
	gocvss30 "github.com/pandatix/go-cvss/30"
	gocvss31 "github.com/pandatix/go-cvss/31"
	gocvss40 "github.com/pandatix/go-cvss/40"

	"klatch/internal/cve"
	"klatch/internal/fault"
)

// Set is what several feeds say together.
type Set struct {
	records  map[cve.ID]*cve.Record
	problems []Problem
	more     int // problems beyond maxProblems
}

// Problem is a record, or a part of one, that was kept aside.
type Problem struct {
	File  string `json:"file"`
	Place string `json:"place"` // such as "line 12"
	CVE   cve.ID `json:"cve,omitempty"`
	Text  string `json:"text"`
	// Kept says that the record is in the set without what the problem is about.
	Kept bool `json:"kept"`
}

func (p Problem) String() string {
	what := "kept aside"
	if p.Kept {
		what = "taken without it"
	}
	id := ""
	if p.CVE != "" {
		id = string(p.CVE) + ": "
	}
	return fmt.Sprintf("%s, %s: %s%s (%s)", p.File, p.Place, id, p.Text, what)
}

// Limits of what is read. The kernel CNA has 14,600 records in mid-2026, of
// which the longest has 36 files and 12 dyads in the JSON Lines form.
const (
	maxBytes    = 256 << 20 // uncompressed, of one file
	maxRecord   = 2 << 20   // one line, or one file of a folder
	maxRecords  = 1_000_000
	maxList     = 4096 // files, commits or dyads of one record
	maxText     = 256 << 10
	maxPath     = 512
	maxProblems = 1000 // listed one by one; the rest is counted
)

// NewSet makes an empty set.
func NewSet() *Set { return &Set{records: map[cve.ID]*cve.Record{}} }

// Record finds what the feeds say of a CVE. A false means that no feed knows it.
func (s *Set) Record(id cve.ID) (cve.Record, bool) {
	r, ok := s.records[id]
	if !ok {
		return cve.Record{ID: id}, false
	}
	return *r, true
}

// Len counts the CVEs that a feed knows.
func (s *Set) Len() int { return len(s.records) }

// IDs lists the CVEs in the order of their numbers.
func (s *Set) IDs() []cve.ID {
	return slices.SortedFunc(maps.Keys(s.records), cve.Compare)
}

// Problems lists what was kept aside, and how many more there are.
func (s *Set) Problems() (listed []Problem, more int) { return s.problems, s.more }

func (s *Set) problem(p Problem) {
	if len(s.problems) >= maxProblems {
		s.more++
		return
	}
	p.Text = clip(p.Text, 300)
	s.problems = append(s.problems, p)
}

func (s *Set) of(id cve.ID) *cve.Record {
	r, ok := s.records[id]
	if !ok {
		r = &cve.Record{ID: id}
		s.records[id] = r
	}
	return r
}

// add takes the kernel CNA's part of a record. Of two the one from the file
// with the later date stays; from one date, the one read last.
func (s *Set) add(n cve.Record) {
	r := s.of(n.ID)
	if r.CNA.Date > n.CNA.Date {
		return
	}
	scores := slices.DeleteFunc(slices.Clone(r.Scores), func(x cve.Score) bool {
		return slices.ContainsFunc(n.Scores, func(y cve.Score) bool { return x.By == y.By && x.From.Date <= y.From.Date })
	})
	n.Scores = append(scores, n.Scores...)
	n.Priorities, n.Exploited = r.Priorities, r.Exploited
	*r = n
}

// full says that a feed is larger than any real one.
func (s *Set) full(id cve.ID) error {
	if _, ok := s.records[id]; !ok && len(s.records) >= maxRecords {
		return fault.New(fault.Invalid, "bad_feed", "over %d records", maxRecords)
	}
	return nil
}

// score reads a CVSS vector of any version and computes its base score, by
// the standard and not by what the feed says.
func score(vector string) (float64, error) {
	if len(vector) > 512 {
		return 0, fmt.Errorf("CVSS vector of %d bytes", len(vector))
	}
	var value float64
	var err error
	switch {
	case strings.HasPrefix(vector, "CVSS:4.0/"):
		var v *gocvss40.CVSS40
		if v, err = gocvss40.ParseVector(vector); err == nil {
			value = v.Score()
		}
	case strings.HasPrefix(vector, "CVSS:3.1/"):
		var v *gocvss31.CVSS31
		if v, err = gocvss31.ParseVector(vector); err == nil {
			value = v.BaseScore()
		}
	case strings.HasPrefix(vector, "CVSS:3.0/"):
		var v *gocvss30.CVSS30
		if v, err = gocvss30.ParseVector(vector); err == nil {
			value = v.BaseScore()
		}
	case strings.HasPrefix(vector, "AV:"):
		var v *gocvss20.CVSS20
		if v, err = gocvss20.ParseVector(vector); err == nil {
			value = v.BaseScore()
		}
	default:
		return 0, fmt.Errorf("CVSS vector %.80q is of no known version", vector)
	}
	if err != nil {
		return 0, fmt.Errorf("CVSS vector %.120q: %w", vector, err)
	}
	return value, nil
}

// treePath checks a path that a feed says is in the kernel tree.
func treePath(p string) error {
	if p == "" || len(p) > maxPath || path.IsAbs(p) || path.Clean(p) != p || p == "." || p == ".." || strings.HasPrefix(p, "../") ||
		strings.ContainsFunc(p, func(r rune) bool { return !unicode.IsPrint(r) }) || strings.Contains(p, `\`) {
		return fmt.Errorf("path %.100q is not one of a kernel tree", p)
	}
	return nil
}

// oneLine makes prose safe to print: no control characters, single spaces.
func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(strings.ToValidUTF8(clip(s, maxText), "?"), func(r rune) bool {
		return unicode.IsSpace(r) || !unicode.IsPrint(r)
	}), " ")
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}

// day reads the day out of a date or a time; an empty one stays empty.
func day(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	d := s[:min(len(s), len(time.DateOnly))]
	if _, err := time.Parse(time.DateOnly, d); err != nil {
		return "", fmt.Errorf("%.40q is not a date such as 2026-08-21", s)
	}
	return d, nil
}

// byWeight orders scores: the highest first.
func byWeight(a, b cve.Score) int {
	return cmp.Or(-cmp.Compare(a.Value, b.Value), strings.Compare(a.By, b.By))
}
