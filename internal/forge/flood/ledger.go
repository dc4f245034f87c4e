// SPDX-License-Identifier: Apache-2.0

package flood

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/catalog"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

// Status is where a CVE stands in the ledger; each stands once.
type Status string

// The statuses.
const (
	Livepatched Status = "livepatched"
	BelowPolicy Status = "below_policy" // policy does not ask for a livepatch
	Unrated     Status = "unrated"      // no source rates it: a person decides
	NotAffected Status = "not_affected" // this kernel build does not have the code
	Refused     Status = "refused"      // the builder says no
	FailedTest  Status = "failed_test"  // built, and stopped by a test
	NoData      Status = "no_data"      // nobody says what its fix touches
)

// Statuses in the order in which they are shown.
var Statuses = []Status{Livepatched, Refused, FailedTest, NotAffected, BelowPolicy, Unrated, NoData}

// Entry is one CVE of the ledger.
type Entry struct {
	CVE    cve.ID     `json:"cve"`
	Status Status     `json:"status"`
	Code   fault.Code `json:"code,omitempty"` // of the refusal, or of not_affected: config, arch, compiled_out
	Reason string     `json:"reason"`
	File   string     `json:"file,omitempty"`  // where it was refused
	Place  string     `json:"place,omitempty"` // function, type or section
	Files  []string   `json:"files,omitempty"` // of the source patch
	With   []cve.ID   `json:"with,omitempty"`  // CVEs of the same files, which nobody can tell apart
	// By is "files" where all that changed in its files is in the livepatch, and
	// "words" where a part was left out and its record names only parts that are
	// in: evidence that a reviewer must confirm.
	By      string   `json:"by,omitempty"`
	Names   []string `json:"names,omitempty"`    // by words: what the record names
	LeftOut []string `json:"left_out,omitempty"` // by words: functions whose changes were refused
}

// Ledger accounts for every CVE between two uploads; its JSON is a promise,
// version 1.
type Ledger struct {
	Version  int                `json:"version"`
	Kernel   kernel.Release     `json:"kernel"`
	BuildID  kernel.BuildID     `json:"build_id"`
	From     string             `json:"from"` // version of the source
	To       string             `json:"to"`
	Policy   string             `json:"policy"`
	Total    int                `json:"total"`
	Counts   map[Status]int     `json:"counts"`
	Refusals map[fault.Code]int `json:"refusals"` // by code, of the refused
	// Applies counts the CVEs that policy asks for and that this kernel build
	// has: livepatched, refused and failed_test.
	Applies int     `json:"applies"`
	Share   float64 `json:"share"`    // livepatched of those that apply, 0 to 1
	ByWords int     `json:"by_words"` // of the livepatched, those that stand by the words of their records
	// Livepatch is the one that was built; null where none was.
	Livepatch *Livepatch `json:"livepatch"`
	Trouble   string     `json:"trouble,omitempty"` // why it was not
	Entries   []Entry    `json:"entries"`
}

// Livepatch is the cumulative one that a run ends with.
type Livepatch struct {
	Sequence  livepatch.Sequence `json:"sequence"`
	SHA256    string             `json:"sha256"`
	Bytes     int64              `json:"bytes"`
	Functions int                `json:"functions"`
}

// NotHere says that the changes of some CVEs make no object code.
func (g *Ledger) NotHere(ids []cve.ID) {
	for i := range g.Entries {
		if e := &g.Entries[i]; slices.Contains(ids, e.CVE) {
			e.Status, e.Code, e.Reason = NotAffected, "compiled_out", "in this configuration the change makes no object code"
		}
	}
	g.Count()
}

// Fail says that the livepatch did not pass its test: nothing in it counts.
func (g *Ledger) Fail(why string) {
	for i := range g.Entries {
		if g.Entries[i].Status == Livepatched {
			g.Entries[i].Status, g.Entries[i].Reason = FailedTest, why
		}
	}
	g.Count()
}

func newLedger(e catalog.Entry) Ledger {
	return Ledger{Version: 1, Kernel: e.Release, BuildID: e.BuildID, From: e.SourceV, Counts: map[Status]int{},
		Refusals: map[fault.Code]int{}, Entries: []Entry{}}
}

func (g *Ledger) add(e Entry) { g.Entries = append(g.Entries, e) }

// enter adds the CVEs of a lot that was tried.
func (g *Ledger) enter(l *lot) {
	for _, id := range l.cves {
		e := Entry{CVE: id, Files: l.nodes.files()}
		for _, other := range l.cves {
			if other != id {
				e.With = append(e.With, other)
			}
		}
		w, stands := l.stands[id]
		switch {
		case stands && w.hold():
			e.Status, e.By, e.Names, e.LeftOut = Livepatched, "words", w.names, w.left
			e.Reason = "its record names " + strings.Join(w.names, ", ") + ", which is in the livepatch; a reviewer must confirm that what was left out of its files belongs to others"
		case len(l.refused) > 0:
			f := l.refused[0]
			e.Status, e.Code, e.Reason, e.File = Refused, f.Code, f.Rule, f.File
			e.Place = cmp.Or(f.Function, f.Type, f.Section)
			if f.Code == "nothing_changed" || f.Code == "not_built" {
				e.Status, e.Code = NotAffected, "compiled_out"
				e.Reason = "in this configuration the change makes no object code"
			}
		case l.inert:
			e.Status, e.Code = NotAffected, "compiled_out"
			e.Reason = "in this configuration the change makes no object code"
		default:
			e.Status, e.By = Livepatched, "files"
			e.Reason = fmt.Sprintf("all that changed in its files is in the livepatch: %d hunks of %s", len(l.nodes), strings.Join(e.Files, ", "))
		}
		g.add(e)
	}
}

// finish sorts and counts, and makes sure that each candidate stands once.
func (g *Ledger) finish(all []Candidate) {
	have := map[cve.ID]bool{}
	g.Entries = slices.DeleteFunc(g.Entries, func(e Entry) bool {
		twice := have[e.CVE]
		have[e.CVE] = true
		return twice
	})
	for _, c := range all {
		if !have[c.ID] {
			g.add(Entry{CVE: c.ID, Status: NoData, Reason: "the run lost it; please report this"})
		}
	}
	slices.SortFunc(g.Entries, func(a, b Entry) int { return cmp.Compare(a.CVE, b.CVE) })
	g.Count()
}

// Count brings the figures up to date with the entries.
func (g *Ledger) Count() {
	g.Total, g.Counts, g.Refusals = len(g.Entries), map[Status]int{}, map[fault.Code]int{}
	for _, s := range Statuses {
		g.Counts[s] = 0
	}
	for _, e := range g.Entries {
		g.Counts[e.Status]++
		if e.Status == Refused {
			g.Refusals[e.Code]++
		}
	}
	g.Applies = g.Counts[Livepatched] + g.Counts[Refused] + g.Counts[FailedTest]
	g.Share, g.ByWords = 0, 0
	for _, e := range g.Entries {
		if e.Status == Livepatched && e.By == "words" {
			g.ByWords++
		}
	}
	if g.Applies > 0 {
		g.Share = float64(g.Counts[Livepatched]) / float64(g.Applies)
	}
}
