// SPDX-License-Identifier: Apache-2.0

package triage

import (
	"cmp"
	"fmt"
	"slices"

	"klatch/internal/cve"
	"klatch/internal/forge/fixes"
)

// Kernel is the kernel build that a report is about.
type Kernel struct {
	Release string
	Series  string
	Source  string // version of the source package, such as 6.1.176-1
	// Built says whether the build compiles a file or includes it in one that
	// it compiles.
	Built func(path string) Built
}

// Report is what is done about many CVEs on one kernel build.
type Report struct {
	Kernel  string            `json:"kernel"`
	Source  string            `json:"source_version"`
	To      string            `json:"to,omitempty"` // only what is fixed up to this version
	Policy  string            `json:"policy"`
	Total   int               `json:"total"`
	Counts  map[Treatment]int `json:"counts"`
	Waiting int               `json:"waiting"` // for a person
	Rows    []Row             `json:"cves"`
}

// Row is one CVE of a report.
type Row struct {
	Decision
	Title string `json:"title"`
	Files []File `json:"files"`
	Words string `json:"-"` // title and description of the record, to find names of code in
}

// Open reports on every CVE of the kernel CNA, by upstream's version of the
// kernel build. A fix that the distribution took before upstream's stable line
// is not seen; Between sees it.
func Open(k Kernel, p Policy, records fixes.Records, reviews Reviews) (Report, error) {
	rep := Report{Kernel: k.Release, Source: k.Source, Policy: p.Name}
	v, err := fixes.Upstream(k.Source)
	if err != nil {
		return rep, err
	}
	for _, id := range records.IDs() {
		r, _ := records.Record(id)
		if r.CNA.Feed == "" {
			continue // of another product, as far as anybody says
		}
		f := k.facts(r.Files, reviews.Of(id, k.Series))
		f.From = r.CNA
		state, dyad := cve.StateAt(r.Dyads, v)
		switch state {
		case cve.StateAffected:
			f.Status, f.Reason = cve.Affected, fmt.Sprintf("the flaw is in %s", v)
			if !dyad.Fixed.IsZero() {
				f.Reason += fmt.Sprintf(", fixed in %s", dyad.Fixed)
			}
		case cve.StateFixed:
			f.Status, f.Reason = cve.Fixed, fmt.Sprintf("fixed in %s", dyad.Fixed)
		case cve.StateNotPresent:
			f.Status, f.Reason = cve.NotAffected, fmt.Sprintf("the flaw is not in %s", v)
		case cve.StateUnknown:
		}
		rep.Rows = append(rep.Rows, Row{Decide(r, p, f), r.Title, f.Files, r.Title + " " + r.Description})
	}
	rep.sum()
	return rep, nil
}

// Between reports on the CVEs that are fixed between the kernel build's source
// and a newer one.
func Between(k Kernel, p Policy, d fixes.Delta, records fixes.Records, reviews Reviews) Report {
	rep := Report{Kernel: k.Release, Source: k.Source, To: d.To, Policy: p.Name}
	for _, x := range d.Fixes {
		r, _ := records.Record(x.CVE)
		rep.Rows = append(rep.Rows, Row{Decide(r, p, k.FactsOf(x, r, reviews)), x.Title, k.files(x.Files), x.Title + " " + r.Description})
	}
	rep.sum()
	return rep
}

// FactsOf is what is known of a fix on this kernel build.
func (k Kernel) FactsOf(x fixes.Fix, r cve.Record, reviews Reviews) Facts {
	f := k.facts(x.Files, reviews.Of(x.CVE, k.Series))
	f.Status, f.Reason, f.From = x.Status, x.Reason, r.CNA
	if x.KnownBy == fixes.ByChangelog {
		f.From = cve.Source{Feed: "changelog", File: "linux " + x.Upload}
	}
	return f
}

func (k Kernel) facts(files []string, v *Reviewed) Facts {
	return Facts{Kernel: k.Release, Series: k.Series, Files: k.files(files), Reviewed: v}
}

func (k Kernel) files(paths []string) []File {
	files := []File{}
	for _, p := range paths {
		files = append(files, File{p, k.Built(p)})
	}
	return files
}

var order = []Treatment{Livepatch, Unrated, NoData, Reboot, Defer, BelowPolicy, NotAffected}

func (rep *Report) sum() {
	rep.Counts = map[Treatment]int{}
	rep.Total = len(rep.Rows)
	for _, r := range rep.Rows {
		rep.Counts[r.Treatment]++
		if r.Review {
			rep.Waiting++
		}
	}
	slices.SortStableFunc(rep.Rows, func(a, b Row) int {
		return cmp.Or(cmp.Compare(slices.Index(order, a.Treatment), slices.Index(order, b.Treatment)), cve.Compare(a.CVE, b.CVE))
	})
}

// Treatments lists those that the report has, in its order.
func (rep Report) Treatments() []Treatment {
	var all []Treatment
	for _, t := range order {
		if rep.Counts[t] > 0 {
			all = append(all, t)
		}
	}
	return all
}
