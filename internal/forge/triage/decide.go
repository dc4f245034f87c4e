// SPDX-License-Identifier: Apache-2.0

package triage

import (
	"fmt"
	"slices"
	"strings"

	"klatch/internal/cve"
)

// Treatment is what is done about a CVE on a kernel build.
type Treatment string

// The treatments. Their spelling is stored in reviewed files and ledgers.
const (
	Livepatch   Treatment = "livepatch"
	BelowPolicy Treatment = "below_policy" // rated, and not urgent enough
	Unrated     Treatment = "unrated"      // nobody rates it: a person must
	NotAffected Treatment = "not_affected" // not in this kernel build, or fixed in it
	NoData      Treatment = "no_data"      // it would be looked at, and no source knows a file
	Reboot      Treatment = "reboot"       // a person: wait for the next kernel
	Defer       Treatment = "defer"        // a person: not now
)

// Rule names why.
type Rule string

// The rules, in the order in which they are tried.
const (
	RulePerson         Rule = "person"          // a reviewed decision
	RuleFixed          Rule = "already_fixed"   // the kernel build has the fix
	RuleNotPresent     Rule = "not_in_kernel"   // the flaw came later, or on another line
	RuleNotBuilt       Rule = "not_built"       // this config compiles none of the files
	RuleEverything     Rule = "everything"      // the stress test
	RuleKnownExploited Rule = "known_exploited" // always in
	RulePriority       Rule = "vendor_priority" // a vendor's word
	RuleCVSS           Rule = "cvss"            // no vendor's word, a score
	RuleNoRating       Rule = "no_rating"       // neither
)

// Built says whether a kernel build compiles a file.
type Built string

// The answers.
const (
	BuiltYes     Built = "yes"
	BuiltNo      Built = "no"
	BuiltUnknown Built = "unknown" // the kernel's source has no such path: mainline may have moved it
)

// File is a file that a fix touches.
type File struct {
	Path  string `json:"path"`
	Built Built  `json:"built"`
}

// Facts is what is known of a CVE on one kernel build, besides the record.
type Facts struct {
	Kernel string // names it in texts: a release, or a version
	Series string // such as debian-6.1
	// Status is affected, not_affected or fixed, or empty where nobody knows,
	// with the reason and where it is from.
	Status cve.Status
	Reason string
	From   cve.Source
	// Files are those of the fix; none means that nobody knows.
	Files []File
	// Reviewed is a person's decision for this CVE and series.
	Reviewed *Reviewed
}

// Fact is one value that a decision used.
type Fact struct {
	Name   string     `json:"name"`
	Value  string     `json:"value"`
	Source cve.Source `json:"source"`
}

// Decision is the answer for one CVE on one kernel build.
type Decision struct {
	CVE           cve.ID            `json:"cve"`
	Treatment     Treatment         `json:"treatment"`
	Status        cve.Status        `json:"status"`
	Justification cve.Justification `json:"justification,omitempty"`
	Rule          Rule              `json:"rule"`
	Reason        string            `json:"reason"`
	Facts         []Fact            `json:"facts"`
	WouldChange   []string          `json:"would_change"`
	// Harm lists kinds of harm that the text speaks of. It is shown, and
	// decides nothing.
	Harm []string `json:"harm"`
	// Review says that it waits for a person.
	Review bool `json:"review"`
}

// Decide says what is done about a CVE on a kernel build.
func Decide(r cve.Record, p Policy, f Facts) Decision {
	d := Decision{CVE: r.ID, Facts: factsOf(r, f), Harm: Harm(r.Title + " " + r.Description), WouldChange: []string{}}
	if f.Reviewed != nil {
		return d.byPerson(r, *f.Reviewed)
	}
	switch {
	case f.Status == cve.Fixed:
		return d.end(NotAffected, cve.Fixed, "", RuleFixed, f.Reason, "a kernel build without that fix")
	case f.Status == cve.NotAffected:
		return d.end(NotAffected, cve.NotAffected, cve.CodeNotPresent, RuleNotPresent, f.Reason, "a backport of the flaw to this line")
	case len(f.Files) > 0 && !slices.ContainsFunc(f.Files, func(x File) bool { return x.Built != BuiltNo }):
		return d.end(NotAffected, cve.NotAffected, cve.ComponentNotPresent, RuleNotBuilt,
			fmt.Sprintf("%s compiles none of %s", f.Kernel, names(f.Files)), "a config that builds one of these files")
	}
	d = d.rate(r, p)
	if d.Treatment != BelowPolicy && len(f.Files) == 0 {
		d.Reason = "no source knows a file of the fix; apart from that: " + d.Reason
		d.WouldChange = append(d.WouldChange, "a record of the kernel CNA, which names the files")
		d.Treatment, d.Review = NoData, true
	}
	d.Status = cve.Affected
	if f.Status == "" || d.Treatment == Unrated || d.Treatment == NoData {
		d.Status = cve.UnderInvestigation
	}
	return d
}

func (d Decision) end(t Treatment, s cve.Status, j cve.Justification, rule Rule, reason string, change ...string) Decision {
	d.Treatment, d.Status, d.Justification, d.Rule, d.Reason, d.WouldChange = t, s, j, rule, reason, change
	return d
}

// rate goes by urgency alone.
func (d Decision) rate(r cve.Record, p Policy) Decision {
	exploited := len(r.Exploited) > 0
	priority, prioritized := p.priority(r.Priorities)
	score, scored := p.score(r.Scores)
	var in []string
	for _, l := range p.Priorities {
		in = append(in, string(l))
	}
	const listed = "it is listed as known exploited"
	raised := "a vendor's priority of " + strings.Join(in, " or ")
	switch {
	case p.Everything:
		return d.end(Livepatch, "", "", RuleEverything, "the policy takes everything", "the default policy")
	case exploited:
		return d.end(Livepatch, "", "", RuleKnownExploited, "known exploited: "+r.Exploited[0].From.Feed, "nothing but a person's decision")
	case prioritized:
		reason := fmt.Sprintf("priority of %s is %s, the policy takes %s", priority.Vendor, priority.Level, strings.Join(in, ", "))
		if slices.Contains(p.Priorities, priority.Level) {
			return d.end(Livepatch, "", "", RulePriority, reason, "a lower priority")
		}
		return d.end(BelowPolicy, "", "", RulePriority, reason, raised, listed)
	case scored:
		reason := fmt.Sprintf("no vendor's priority; CVSS %.1f by %s, the policy takes %.1f", score.Value, score.By, p.MinCVSS)
		if score.Value >= p.MinCVSS {
			return d.end(Livepatch, "", "", RuleCVSS, reason, "a vendor's priority below "+in[len(in)-1])
		}
		return d.end(BelowPolicy, "", "", RuleCVSS, reason, raised, listed)
	}
	d = d.end(Unrated, "", "", RuleNoRating, "no vendor's priority and no CVSS vector: that is not the same as low",
		raised, fmt.Sprintf("a CVSS score of %.1f", p.MinCVSS), listed, "a person's decision")
	d.Review = true
	return d
}

// byPerson takes a reviewed decision, and says when the world changed since.
func (d Decision) byPerson(r cve.Record, v Reviewed) Decision {
	d = d.end(v.Treatment, v.Status, v.Justification, RulePerson, fmt.Sprintf("%s (%s, %s)", v.Reason, v.Author, v.Date), "another decision in "+v.Path())
	for _, e := range r.Exploited {
		if e.Added > v.Date && v.Treatment != Livepatch {
			d.Review = true
			d.WouldChange = append(d.WouldChange, fmt.Sprintf("listed as known exploited on %s, after the decision: look at it again", e.Added))
		}
	}
	return d
}

// factsOf lists everything that could be used, not only what was: a reader
// sees what the rule did not look at.
func factsOf(r cve.Record, f Facts) []Fact {
	facts := []Fact{}
	add := func(name, value string, from cve.Source) { facts = append(facts, Fact{name, value, from}) }
	for _, e := range r.Exploited {
		add("known_exploited", e.Added, e.From)
	}
	for _, p := range r.Priorities {
		add("priority", p.Vendor+" "+string(p.Level), p.From)
	}
	for _, s := range r.Scores {
		add("cvss", fmt.Sprintf("%.1f %s %s", s.Value, s.By, s.Vector), s.From)
	}
	if f.Status != "" {
		add("status", string(f.Status)+": "+f.Reason, f.From)
	}
	for _, x := range f.Files {
		add("file", x.Path+" built: "+string(x.Built), r.CNA)
	}
	if f.Reviewed != nil {
		add("person", string(f.Reviewed.Treatment), cve.Source{Feed: "review", File: f.Reviewed.Path(), Date: f.Reviewed.Date})
	}
	return facts
}

func names(files []File) string {
	const few = 3
	var all []string
	for i, f := range files {
		if i == few && len(files) > few+1 {
			return strings.Join(all, ", ") + fmt.Sprintf(" and %d more", len(files)-few)
		}
		all = append(all, f.Path)
	}
	return strings.Join(all, ", ")
}

// harms are words of commit messages and what they speak of.
var harms = []struct {
	kind  string
	words []string
}{
	{"use after free", []string{"use after free", "uaf", "double free", "dangling pointer"}},
	{"out of bounds", []string{"out of bounds", "out of bound", "oob", "buffer overflow", "heap overflow", "stack overflow", "overrun"}},
	{"integer overflow", []string{"integer overflow", "integer underflow", "wraparound", "wrap around"}},
	{"information leak", []string{"info leak", "infoleak", "information leak", "uninitialized", "uninit value"}},
	{"null pointer", []string{"null pointer", "null ptr", "null deref", "null dereference"}},
	{"race", []string{"race", "races", "racy"}},
	{"deadlock or hang", []string{"deadlock", "deadlocks", "soft lockup", "hung task", "infinite loop", "hang", "hangs"}},
	{"memory leak", []string{"memory leak", "memory leaks", "refcount leak", "reference leak", "reference count leak"}},
}

// Harm lists the kinds of harm that a text speaks of. Words of a commit
// message say little about urgency, so it is a fact for a person and no gate.
func Harm(text string) []string {
	words := " " + strings.Join(strings.FieldsFunc(strings.ToLower(text), func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9')
	}), " ") + " "
	kinds := []string{}
	for _, h := range harms {
		if slices.ContainsFunc(h.words, func(w string) bool { return strings.Contains(words, " "+w+" ") }) {
			kinds = append(kinds, h.kind)
		}
	}
	return kinds
}
