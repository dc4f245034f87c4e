// SPDX-License-Identifier: Apache-2.0

package feed

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"klatch/internal/cve"
	"klatch/internal/fault"
)

var vendorName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{0,40}$`)

// levels maps what vendors write to a level. The empty level is a vendor's way
// to say that nobody has looked yet, which is no priority.
var levels = map[string]cve.Level{
	"critical": cve.Critical, "high": cve.High, "medium": cve.Medium, "low": cve.Low, "negligible": cve.Negligible,
	"unimportant": cve.Negligible, // Debian's security tracker
	"untriaged":   "", "not yet assigned": "", "unknown": "",
}

// readCSV takes lines "CVE,priority" of one vendor, with or without a header.
func (s *Set) readCSV(r io.Reader, vendor string, from cve.Source) error {
	if !vendorName.MatchString(vendor) {
		return noVendor(vendor, from)
	}
	c := csv.NewReader(r)
	c.FieldsPerRecord, c.Comment, c.TrimLeadingSpace, c.ReuseRecord = -1, '#', true, true
	for first := true; ; first = false {
		f, err := c.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			if bad, ok := errors.AsType[*csv.ParseError](err); ok { // the reader goes on with the next line
				s.problem(Problem{File: from.File, Place: fmt.Sprintf("line %d", bad.Line), Text: bad.Err.Error()})
				continue
			}
			return fault.New(fault.Invalid, "bad_feed", "read feed %s: %w", from.File, err)
		}
		line, _ := c.FieldPos(0)
		place := fmt.Sprintf("line %d", line)
		if len(f) != 2 {
			s.problem(Problem{File: from.File, Place: place, Text: fmt.Sprintf("%d fields, want CVE and priority", len(f))})
			continue
		}
		if first && strings.EqualFold(strings.TrimSpace(f[0]), "cve") {
			continue
		}
		if err := s.prioritize(f[0], f[1], vendor, place, from); err != nil {
			return err
		}
	}
}

// priorityFile is the TOML form.
type priorityFile struct {
	Vendor   string            `toml:"vendor"`
	Date     string            `toml:"date"`
	Priority map[string]string `toml:"priority"`
}

// readTOML takes a table of priorities that names its vendor.
func (s *Set) readTOML(b []byte, from cve.Source) error {
	var p priorityFile
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&p); err != nil {
		return fault.New(fault.Invalid, "bad_feed", "read feed %s: %w", from.File, err).
			WithHint(`write vendor = "debian", date = "2026-08-21" and a table [priority] with lines "CVE-2026-1234" = "high"`)
	}
	if !vendorName.MatchString(p.Vendor) {
		return noVendor(p.Vendor, from)
	}
	date, err := day(p.Date)
	if err != nil {
		return fault.New(fault.Invalid, "bad_feed", "read feed %s: %w", from.File, err)
	}
	if date != "" {
		from.Date = date
	}
	for _, id := range slices.Sorted(maps.Keys(p.Priority)) {
		if err := s.prioritize(id, p.Priority[id], p.Vendor, "table priority", from); err != nil {
			return err
		}
	}
	return nil
}

func noVendor(vendor string, from cve.Source) error {
	return fault.New(fault.Invalid, "bad_feed", "read feed %s: %.60q does not name a vendor", from.File, vendor).
		WithHint("name the file for the vendor, such as debian.csv")
}

func (s *Set) prioritize(id, word, vendor, place string, from cve.Source) error {
	from.Feed = Priorities + "/" + vendor
	c, err := cve.Parse(strings.TrimSpace(id))
	if err != nil {
		s.problem(Problem{File: from.File, Place: place, Text: err.Error()})
		return nil //nolint:nilerr // kept aside
	}
	if err := s.full(c); err != nil {
		return err
	}
	level, ok := levels[strings.ToLower(strings.TrimSpace(word))]
	if !ok {
		s.problem(Problem{File: from.File, Place: place, CVE: c, Text: fmt.Sprintf("priority %.40q is unknown", word)})
		return nil
	}
	if level == "" {
		return nil
	}
	r := s.of(c)
	n := cve.Priority{Vendor: vendor, Level: level, From: from}
	for i, old := range r.Priorities {
		if old.Vendor == vendor {
			if old.From.Date <= from.Date {
				r.Priorities[i] = n
			}
			return nil
		}
	}
	r.Priorities = append(r.Priorities, n)
	slices.SortFunc(r.Priorities, func(a, b cve.Priority) int { return strings.Compare(a.Vendor, b.Vendor) })
	return nil
}

// kev is CISA's list of known exploited vulnerabilities, by its JSON schema.
type kev struct {
	Released string `json:"dateReleased"`
	Count    int    `json:"count"`
	List     []struct {
		ID    string `json:"cveID"`
		Added string `json:"dateAdded"`
	} `json:"vulnerabilities"`
}

// readKEV takes CISA's list. It names flaws of all products: those that no
// other feed knows get a record of their own, which harms nobody.
func (s *Set) readKEV(b []byte, from cve.Source) error {
	var k kev
	if err := json.Unmarshal(b, &k); err != nil {
		return fault.New(fault.Invalid, "bad_feed", "read feed %s: %w", from.File, err)
	}
	from.Feed = KEV
	if d, err := day(k.Released); err == nil && d != "" {
		from.Date = d
	}
	if k.Count != len(k.List) {
		s.problem(Problem{File: from.File, Place: "count", Kept: true, Text: fmt.Sprintf("it says %d, the list has %d", k.Count, len(k.List))})
	}
	for i, v := range k.List {
		place := fmt.Sprintf("entry %d", i+1)
		id, err := cve.Parse(v.ID)
		if err != nil {
			s.problem(Problem{File: from.File, Place: place, Text: err.Error()})
			continue
		}
		added, err := day(v.Added)
		if err != nil { // that it is exploited is known all the same
			s.problem(Problem{File: from.File, Place: place, CVE: id, Text: err.Error(), Kept: true})
		}
		if err := s.full(id); err != nil {
			return err
		}
		r := s.of(id)
		r.Exploited = slices.DeleteFunc(r.Exploited, func(e cve.Exploited) bool { return e.From.Feed == KEV })
		r.Exploited = append(r.Exploited, cve.Exploited{Added: added, From: from})
	}
	return nil
}
