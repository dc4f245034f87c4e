// SPDX-License-Identifier: Apache-2.0

package feed

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/cve"
	"klatch/internal/durable"
	"klatch/internal/fault"
)

// Feeds are named in sources by these words.
const (
	CNA        = "kernel-cna"
	KEV        = "cisa-kev"
	Priorities = "priorities" // followed by the vendor: priorities/debian
)

// line is a record of the kernel CNA in JSON Lines. Unknown fields are
// ignored: a feed may grow.
type line struct {
	CVE         string            `json:"cve"`
	Published   string            `json:"published,omitempty"`
	Title       string            `json:"title"`
	Description string            `json:"description"`
	Files       []string          `json:"files"`
	FixCommits  []string          `json:"fix_commits"`
	Dyads       []string          `json:"dyad"`
	Vectors     map[string]string `json:"cvss_vectors,omitempty"`
	Source      string            `json:"cvss_source,omitempty"`
	Vector      string            `json:"cvss_vector,omitempty"`
	Score       *float64          `json:"cvss_score,omitempty"`
}

// readLines takes records of the kernel CNA in JSON Lines, one record a line.
func (s *Set) readLines(r io.Reader, from cve.Source) error {
	from.Feed = CNA
	br := bufio.NewReaderSize(r, 64<<10)
	for n := 1; ; n++ {
		b, tooLong, err := oneRecord(br)
		place := fmt.Sprintf("line %d", n)
		switch {
		case tooLong:
			s.problem(Problem{File: from.File, Place: place, Text: fmt.Sprintf("over the limit of %d bytes", maxRecord)})
		case len(bytes.TrimSpace(b)) > 0:
			if err := s.takeLine(b, place, from); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fault.New(fault.Invalid, "bad_feed", "read feed %s: line %d: %w", from.File, n, err).
				WithHint("get the file again; what came before line %d was read", n)
		}
	}
}

// oneRecord reads a line; one over the limit is skipped to its end.
func oneRecord(r *bufio.Reader) (b []byte, tooLong bool, err error) {
	for {
		part, err := r.ReadSlice('\n')
		if tooLong = tooLong || len(b)+len(part) > maxRecord; tooLong {
			b = nil
		} else {
			b = append(b, part...)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return b, tooLong, err
		}
	}
}

func (s *Set) takeLine(b []byte, place string, from cve.Source) error {
	var l line
	if err := json.Unmarshal(b, &l); err != nil {
		s.problem(Problem{File: from.File, Place: place, Text: "not a record: " + err.Error()})
		return nil //nolint:nilerr // kept aside
	}
	return s.take(l, place, from)
}

// take checks a record and adds it. A record whose id, files, commits or dyads
// are bad is kept aside as a whole: half of what says which kernels are
// affected would be worse than nothing. A bad rating is left out of it.
func (s *Set) take(l line, place string, from cve.Source) error {
	r, err := l.record(from)
	if err != nil {
		id, _ := cve.Parse(l.CVE)
		s.problem(Problem{File: from.File, Place: place, CVE: id, Text: err.Error()})
		return nil //nolint:nilerr // kept aside
	}
	if err := s.full(r.ID); err != nil {
		return err
	}
	vectors := map[string]string{}
	if l.Source != "" && l.Vector != "" {
		vectors[l.Source] = l.Vector
	}
	maps.Copy(vectors, l.Vectors)
	for by, vector := range vectors {
		value, err := score(vector)
		if err == nil && (len(by) > 64 || oneLine(by) != by || by == "") {
			err = fmt.Errorf("source %.64q of a CVSS vector", by)
		}
		if err != nil {
			s.problem(Problem{File: from.File, Place: place, CVE: r.ID, Text: err.Error(), Kept: true})
			continue
		}
		if by == l.Source && l.Score != nil && math.Abs(*l.Score-value) > 0.05 {
			s.problem(Problem{File: from.File, Place: place, CVE: r.ID, Kept: true,
				Text: fmt.Sprintf("the feed says score %.1f, its vector %s gives %.1f", *l.Score, vector, value)})
		}
		r.Scores = append(r.Scores, cve.Score{By: by, Vector: vector, Value: value, From: from})
	}
	slices.SortFunc(r.Scores, byWeight)
	s.add(r)
	return nil
}

// record checks everything that says which kernels and files are concerned.
func (l line) record(from cve.Source) (cve.Record, error) {
	r := cve.Record{CNA: from, Title: oneLine(l.Title), Description: oneLine(l.Description)}
	var err error
	if r.ID, err = cve.Parse(l.CVE); err != nil {
		return r, err
	}
	if r.Published, err = day(l.Published); err != nil {
		return r, fmt.Errorf("published: %w", err)
	}
	if n := max(len(l.Files), len(l.FixCommits), len(l.Dyads), len(l.Vectors)); n > maxList {
		return r, fmt.Errorf("a list of %d, limit %d", n, maxList)
	}
	for _, f := range l.Files {
		if err := treePath(f); err != nil {
			return r, err
		}
	}
	for _, c := range l.FixCommits {
		if strings.Trim(c, "0123456789abcdef") != "" || len(c) < 7 || len(c) > 40 {
			return r, fmt.Errorf("fix commit %.60q", c)
		}
	}
	r.Files, r.FixCommits = l.Files, l.FixCommits
	for _, text := range l.Dyads {
		d, err := cve.ParseDyad(text)
		if err != nil {
			return r, err
		}
		r.Dyads = append(r.Dyads, d)
	}
	return r, nil
}

// cve5 is what is used of a CVE record (CVE Record Format 5) as the kernel CNA
// writes it.
type cve5 struct {
	Metadata struct {
		ID        string `json:"cveId"` // older records: cveID
		State     string `json:"state"`
		Published string `json:"datePublished"`
	} `json:"cveMetadata"`
	Containers struct {
		CNA struct {
			Title        string
			Descriptions []struct{ Lang, Value string }
			Affected     []struct {
				DefaultStatus string
				Files         []string `json:"programFiles"`
				Versions      []cve5Version
			}
			Metrics []map[string]json.RawMessage
		}
	}
}

type cve5Version struct {
	Version, LessThan, LessThanOrEqual, Status, VersionType string
}

// readFolder takes the CVE-*.json of a folder and those below it, as the
// kernel CNA's repository security/vulns has them, with the files .dyad,
// .sha1 and .cvss beside each.
func (s *Set) readFolder(dir string, from cve.Source) error {
	return s.readFolderLines(dir, from, nil)
}

// readFolderLines gives each record to keep as well, in the form of a line.
func (s *Set) readFolderLines(dir string, from cve.Source, keep func(line) error) error {
	from.Feed = CNA
	n := 0
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasPrefix(d.Name(), "CVE-") || filepath.Ext(p) != ".json" {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		n++
		l, err := readRecord(p)
		if err != nil {
			s.problem(Problem{File: from.File, Place: name, Text: err.Error()})
			return nil //nolint:nilerr // kept aside
		}
		if keep != nil {
			if err := keep(l); err != nil {
				return err
			}
		}
		return s.take(l, name, from)
	})
	if err == nil && n == 0 {
		err = fault.New(fault.Invalid, "bad_feed", "folder %s has no CVE-*.json", dir).
			WithHint("name the folder cve/published of the kernel CNA's repository")
	}
	return err
}

// errRejected marks a record that the CNA took back: it says nothing.
var errRejected = errors.New("the CNA rejected this CVE")

// readRecord reads one record and what lies beside it.
func readRecord(p string) (line, error) {
	b, err := durable.ReadFile(p, maxRecord)
	if err != nil {
		return line{}, err
	}
	l, err := parseCVE5(b)
	if err != nil {
		return l, err
	}
	if want := strings.TrimSuffix(filepath.Base(p), ".json"); l.CVE != want {
		return l, fmt.Errorf("the record says %.40q", l.CVE)
	}
	beside := func(ext string) ([]string, error) {
		b, err := durable.ReadFile(strings.TrimSuffix(p, ".json")+ext, maxRecord)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		var lines []string
		for text := range strings.Lines(string(b)) {
			if text = strings.TrimSpace(text); text != "" && !strings.HasPrefix(text, "#") {
				lines = append(lines, text)
			}
		}
		return lines, err
	}
	dyads, err := beside(".dyad")
	if err != nil {
		return l, err
	}
	if len(dyads) > 0 {
		l.Dyads = dyads
	}
	commits, err := beside(".sha1")
	if err != nil {
		return l, err
	}
	if len(commits) > 0 {
		l.FixCommits = commits
	}
	vector, err := beside(".cvss")
	if err != nil {
		return l, err
	}
	if len(vector) > 0 && len(l.Vectors) == 0 { // "organization vector", then the reasons
		if words := strings.Fields(vector[0]); len(words) == 2 {
			l.Vectors = map[string]string{byKernelCNA: words[1]}
		}
	}
	return l, nil
}

const byKernelCNA = "kernel_cna"

func parseCVE5(b []byte) (line, error) {
	var c cve5
	if err := json.Unmarshal(b, &c); err != nil {
		return line{}, fmt.Errorf("not a CVE record: %w", err)
	}
	l := line{CVE: c.Metadata.ID, Published: c.Metadata.Published, Title: c.Containers.CNA.Title}
	if c.Metadata.State == "REJECTED" {
		return l, errRejected
	}
	if l.CVE == "" {
		return l, errors.New("not a CVE record: it has no cveMetadata.cveId")
	}
	for _, d := range c.Containers.CNA.Descriptions {
		if strings.HasPrefix(d.Lang, "en") && l.Description == "" {
			l.Description = strings.TrimPrefix(d.Value, "In the Linux kernel, the following vulnerability has been resolved:\n\n")
		}
	}
	for _, a := range c.Containers.CNA.Affected {
		for _, f := range a.Files {
			if !slices.Contains(l.Files, f) {
				l.Files = append(l.Files, f)
			}
		}
		for _, v := range a.Versions {
			if v.VersionType == "git" && v.Status == "affected" && v.LessThan != "" && !slices.Contains(l.FixCommits, v.LessThan) {
				l.FixCommits = append(l.FixCommits, v.LessThan)
			}
		}
		if a.DefaultStatus == "affected" {
			l.Dyads = append(l.Dyads, dyadsOf(a.Versions)...)
		}
	}
	for _, m := range c.Containers.CNA.Metrics {
		for _, key := range []string{"cvssV4_0", "cvssV3_1", "cvssV3_0"} {
			var v struct{ VectorString string }
			if m[key] == nil {
				continue
			}
			if err := json.Unmarshal(m[key], &v); err != nil {
				return l, fmt.Errorf("metrics: %s: %w", key, err)
			}
			if l.Vectors == nil {
				l.Vectors = map[string]string{byKernelCNA: v.VectorString}
			}
		}
	}
	return l, nil
}

// dyadsOf makes dyads without commits of the block with version numbers, for
// records without a .dyad beside them. With several origins the block does not
// say which fix belongs to which, and nothing is made of it.
func dyadsOf(versions []cve5Version) []string {
	var origin []string
	var fixed []string
	for _, v := range versions {
		switch {
		case v.Status == "affected" && v.LessThan == "" && v.LessThanOrEqual == "":
			origin = append(origin, v.Version)
		case v.Status == "unaffected" && v.LessThanOrEqual != "":
			fixed = append(fixed, v.Version)
		}
	}
	if len(origin) == 0 {
		origin = []string{"0"}
	}
	if len(fixed) == 0 {
		fixed = []string{"0"}
	}
	var dyads []string
	for _, f := range fixed {
		dyads = append(dyads, origin[0]+":0:"+f+":0")
	}
	if len(origin) > 1 {
		return nil
	}
	return dyads
}

// isFolder says whether a feed is a folder of records.
func isFolder(p string) (bool, error) {
	st, err := os.Stat(p)
	return err == nil && st.IsDir(), err
}
