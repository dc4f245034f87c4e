// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"bytes"
	"slices"
	"strings"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/livepatch"
)

// slack is how far clocks of two honest parties may be apart.
const slack = 10 * time.Minute

// Facts is what is known without believing any statement.
type Facts struct {
	About
	// Signed is when the livepatch passed the signing gate, by the publisher's
	// word; statements age until then, not after.
	Signed time.Time
	Now    time.Time
	// Earlier are the sequences that machines of this kernel build may have
	// loaded when this one replaces them.
	Earlier []livepatch.Sequence
	// Manifest is what the publisher signed for the machines; nil at the gate,
	// which makes it of what it finds here.
	Manifest *livepatch.Manifest
}

// Report is what the evidence of one livepatch says, once it is accepted.
type Report struct {
	Builders  []string        `json:"builders"`
	Testers   []string        `json:"testers"`
	Reviewers []string        `json:"reviewers"`
	Analysts  []string        `json:"analysts"`
	Sources   []Source        `json:"sources"`
	Scenarios []Scenario      `json:"scenarios"`
	Hardware  bool            `json:"hardware"` // some of them on a real machine
	Fixes     []livepatch.Fix `json:"fixes"`
	VEX       []VEXStatement  `json:"vex"`
	// Notes are what a careful reader would want to know although all is well.
	Notes []string `json:"notes"`
}

// said is one acceptable statement.
type said[P Predicate] struct {
	by Signer
	P  P
}

type checker struct {
	policy Policy
	facts  Facts
	report Report

	builds   []said[*Provenance]
	trials   []said[*TestResult]
	approval []said[*Review]
	analyses []said[*VEX]
}

// Check decides whether the envelopes are enough evidence for a livepatch.
// Every envelope must be acceptable: one that is not refuses the whole, so
// that nothing which nobody looked at travels along. The refusal has a code of
// the catalog and a next step.
func Check(p Policy, f Facts, envelopes []Envelope) (Report, error) {
	c := checker{policy: p, facts: f, report: Report{Notes: []string{}}}
	if f.Signed.After(f.Now.Add(slack)) {
		return c.report, refuse("from_the_future", "the livepatch says it was signed at %s", f.Signed.Format(time.RFC3339))
	}
	var seen []Statement
	for _, e := range envelopes {
		s, err := Open(e, p)
		if err != nil {
			return c.report, err
		}
		if err := c.about(s); err != nil {
			return c.report, err
		}
		if slices.ContainsFunc(seen, func(o Statement) bool { return o.Role == s.Role && o.Signer.Key == s.Signer.Key }) {
			return c.report, refuse("signed_twice", "%s signed two statements of role %s", s.Signer.Name, s.Role)
		}
		seen = append(seen, s)
		switch p := s.predicate.(type) {
		case *Provenance:
			c.builds = append(c.builds, said[*Provenance]{s.Signer, p})
		case *TestResult:
			c.trials = append(c.trials, said[*TestResult]{s.Signer, p})
		case *Review:
			c.approval = append(c.approval, said[*Review]{s.Signer, p})
		case *VEX:
			c.analyses = append(c.analyses, said[*VEX]{s.Signer, p})
		}
	}
	for _, step := range []func() error{c.builders, c.tests, c.reviews, c.vex} {
		if err := step(); err != nil {
			return c.report, err
		}
	}
	for i, s := range seen {
		if slices.ContainsFunc(seen[:i], func(o Statement) bool { return o.Signer.Key == s.Signer.Key }) {
			c.note("one key speaks in several roles: " + s.Signer.Name)
		}
	}
	return c.report, nil
}

// about checks who speaks, of what, and when.
func (c *checker) about(s Statement) error {
	f, says := c.facts, s.predicate.claim()
	if says.who != s.Signer.Name {
		return refuse("signer_name", "%s signed what %.60q is said to say", s.Signer.Name, says.who)
	}
	if s.Role == Analyst {
		says.kernel, says.sequence = f.Kernel, f.Sequence // its product says it, see vex
	}
	what := kindOf(s.Role).what()
	if says.kernel != f.Kernel {
		return refuse("other_kernel", "%s by %s is for %s (%s, %s), not for %s", what, says.who, says.kernel, says.kernel.Distro, says.kernel.Arch, f.Kernel)
	}
	if says.sequence != f.Sequence {
		return refuse("other_module", "%s by %s is for sequence %d, not for %d", what, says.who, says.sequence, f.Sequence)
	}
	if s.Subject != f.Module {
		code := fault.Code("other_module")
		if s.Role == Builder && s.Subject.Name == f.Module.Name {
			code = "builders_differ"
		}
		return refuse(code, "%s by %s is for %s with SHA-256 %.16s…, not for %s with %.16s…", what, says.who, s.Subject.Name, s.Subject.SHA256, f.Module.Name, f.Module.SHA256)
	}
	if says.finished.After(f.Signed.Add(slack)) {
		return refuse("from_the_future", "%s by %s says it was finished at %s, after the livepatch was signed", what, says.who, says.finished.Format(time.RFC3339))
	}
	if age, limit := f.Signed.Sub(says.finished), c.policy.maxAge(s.Role); age > limit {
		return refuse("too_old", "%s by %s was %d days old when the livepatch was signed, limit %d", what, says.who, age/(24*time.Hour), limit/(24*time.Hour))
	}
	return nil
}

func (c *checker) builders() error {
	if len(c.builds) == 0 {
		return refuse("no_provenance", "no builder says what sequence %d was built from", c.facts.Sequence)
	}
	first := c.builds[0]
	for _, b := range c.builds {
		same, err := sameForm([]any{first.P.Definition, first.P.proof()}, []any{b.P.Definition, b.P.proof()})
		if err != nil {
			return err
		}
		if !same {
			return refuse("builders_differ", "%s and %s say that they built it from different things", first.by.Name, b.by.Name)
		}
		c.report.Builders = append(c.report.Builders, b.by.Name)
	}
	if len(c.builds) < c.policy.Builders {
		return refuse("too_few_builders", "%d of %d builders made these bytes: %s", len(c.builds), c.policy.Builders, strings.Join(c.report.Builders, ", "))
	}
	if m := c.facts.Manifest; m != nil && !slices.Equal(m.Functions, first.P.proof().Functions) {
		return refuse("functions_differ", "the manifest names other functions than the builders")
	}
	c.report.Sources = first.P.Definition.External.Sources
	if len(c.builds) == 1 {
		c.note("one builder only: nobody else has made the same bytes from these sources")
	}
	return nil
}

func sameForm(a, b any) (bool, error) {
	x, err := encode(a)
	if err != nil {
		return false, err
	}
	y, err := encode(b)
	return bytes.Equal(x, y), err
}

func (c *checker) tests() error {
	if len(c.trials) < c.policy.Testers {
		return refuse("not_tested", "%d of %d testers tried sequence %d on %s", len(c.trials), c.policy.Testers, c.facts.Sequence, c.facts.Kernel)
	}
	for _, t := range c.trials {
		tried := t.P.tried()
		if bad := t.P.trouble(); len(bad) > 0 {
			return refuse("test_failed", "by %s these scenarios did not pass: %s", t.by.Name, strings.Join(bad, ", "))
		}
		for _, name := range c.policy.required(c.facts.Earlier, tried) {
			if !t.P.passes(name) {
				return refuse("scenario_missing", "by %s the required scenario %s was not passed", t.by.Name, name)
			}
		}
		c.report.Testers = append(c.report.Testers, t.by.Name)
		c.report.Scenarios = append(c.report.Scenarios, tried.Scenarios...)
		c.report.Hardware = c.report.Hardware || slices.ContainsFunc(tried.Scenarios, func(s Scenario) bool { return s.Hardware })
		c.shown(tried.Fixes)
	}
	if m := c.facts.Manifest; m != nil && !slices.Equal(m.Fixes, c.report.Fixes) {
		return refuse("fixes_differ", "the manifest says %v of its fixes, the testers %v", m.Fixes, c.report.Fixes)
	}
	for _, f := range c.report.Fixes {
		if f.Check != livepatch.Passed {
			c.note("unchecked: nobody showed that " + string(f.CVE) + " is fixed")
		}
	}
	if !c.report.Hardware {
		c.note("no scenario ran on a real machine")
	}
	return nil
}

// shown adds what a tester saw of each fix: shown by one is shown.
func (c *checker) shown(seen []livepatch.Fix) {
	for _, f := range seen {
		i := slices.IndexFunc(c.report.Fixes, func(o livepatch.Fix) bool { return o.CVE == f.CVE })
		switch {
		case i < 0:
			c.report.Fixes = append(c.report.Fixes, f)
		case f.Check == livepatch.Passed:
			c.report.Fixes[i].Check = f.Check
		}
	}
}

func (c *checker) reviews() error {
	for _, r := range c.approval {
		if r.P.Decision != Approved {
			return refuse("review_rejected", "%s rejects the source patches: %s", r.by.Name, r.P.Comment)
		}
		same, err := sameForm(r.P.Sources, c.report.Sources)
		if err != nil {
			return err
		}
		if !same {
			return refuse("review_of_other_sources", "%s reviewed other source patches than were built", r.by.Name)
		}
		if err := c.somebodyElse(r.by); err != nil {
			return err
		}
		c.report.Reviewers = append(c.report.Reviewers, r.by.Name)
	}
	if len(c.approval) < c.policy.Reviewers {
		return refuse("no_review", "%d of %d reviewers approved the source patches of sequence %d", len(c.approval), c.policy.Reviewers, c.facts.Sequence)
	}
	return nil
}

// somebodyElse refuses a reviewer who wrote one of the source patches, and a
// source patch of which nobody knows who wrote it.
func (c *checker) somebodyElse(reviewer Signer) error {
	if c.policy.SelfReview {
		c.note("LAB: authors may review themselves here; nobody else need have looked at the source patches")
		return nil
	}
	if !reviewer.hasAddress() {
		return refuse("self_review", "the policy gives no address of reviewer %s, so nobody can say that it is no author: klatch-forge evidence allow --also ADDRESS", reviewer.Name)
	}
	for _, src := range c.report.Sources {
		if !oneAuthor(src.Author) {
			return refuse("no_author", "source patch %s does not name one author with an address (%q), so nobody can say whether %s is somebody else", src.Name, src.Author, reviewer.Name)
		}
		if reviewer.Is(src.Author) {
			return refuse("self_review", "%s reviewed source patch %s, whose author is %s", reviewer.Name, src.Name, src.Author)
		}
	}
	return nil
}

func (c *checker) vex() error {
	if len(c.analyses) == 0 {
		return refuse("no_vex", "nobody says which CVEs sequence %d fixes", c.facts.Sequence)
	}
	product := Product(c.facts.Kernel, c.facts.Sequence)
	var fixes []cve.ID
	for _, f := range c.report.Fixes {
		fixes = append(fixes, f.CVE)
	}
	for _, a := range c.analyses {
		var says []cve.ID
		for _, st := range a.P.Statements {
			if st.Products[0].ID != product {
				return refuse("other_kernel", "VEX document by %s is about %.160q, not %s", a.by.Name, st.Products[0].ID, product)
			}
			if st.Status == cve.Fixed {
				says = append(says, st.Vulnerability.Name)
			}
		}
		if !sameIDs(says, fixes) {
			return refuse("vex_differs", "VEX document by %s says that %v are fixed, the livepatch is for %v", a.by.Name, says, fixes)
		}
		c.report.Analysts = append(c.report.Analysts, a.by.Name)
		c.report.VEX = append(c.report.VEX, a.P.Statements...)
	}
	return nil
}

func sameIDs(a, b []cve.ID) bool {
	sorted := func(ids []cve.ID) []cve.ID { return slices.Compact(slices.Sorted(slices.Values(ids))) }
	return slices.Equal(sorted(a), sorted(b))
}

func (c *checker) note(text string) {
	if !slices.Contains(c.report.Notes, text) {
		c.report.Notes = append(c.report.Notes, text)
	}
}
