// SPDX-License-Identifier: Apache-2.0

package triage_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/feed"
	"klatch/internal/forge/fixes"
	"klatch/internal/forge/triage"
	"klatch/internal/testkit"
)

var (
	cna    = cve.Source{Feed: "kernel-cna", File: "cna.jsonl", Date: "2026-08-21"}
	debian = cve.Source{Feed: "priorities/debian", File: "debian.csv", Date: "2026-08-22"}
	kev    = cve.Source{Feed: "cisa-kev", File: "kev.json", Date: "2026-08-23"}
	today  = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
)

func score(v float64, by string) cve.Score {
	return cve.Score{By: by, Vector: "CVSS:3.1/invented", Value: v, From: cna}
}

func priority(vendor string, l cve.Level) cve.Priority {
	return cve.Priority{Vendor: vendor, Level: l, From: debian}
}

func TestDecide(t *testing.T) {
	in := func(v ...cve.Score) cve.Record { return cve.Record{ID: "CVE-2026-0001", CNA: cna, Scores: v} }
	ranked := func(s float64, p ...cve.Priority) cve.Record {
		r := in(score(s, "kernel_cna"))
		r.Priorities = p
		return r
	}
	exploited := func(r cve.Record) cve.Record {
		r.Exploited = []cve.Exploited{{Added: "2026-08-20", From: kev}}
		return r
	}
	files := func(b ...triage.Built) triage.Facts {
		f := triage.Facts{Kernel: "6.1.0-50", Status: cve.Affected, Reason: "the flaw is in 6.1.176", From: cna}
		for _, x := range b {
			f.Files = append(f.Files, triage.File{Path: "net/" + string(x) + ".c", Built: x})
		}
		return f
	}
	built := files(triage.BuiltYes)
	with := func(f triage.Facts, change func(*triage.Facts)) triage.Facts { change(&f); return f }
	person := func(tr triage.Treatment, s cve.Status) triage.Facts {
		return with(built, func(f *triage.Facts) {
			f.Reviewed = &triage.Reviewed{CVE: "CVE-2026-0001", Status: s, Treatment: tr, Reason: "no path from user space", Author: "A <a@example.org>", Date: "2026-08-01"}
		})
	}
	narrow := triage.Policy{Name: "ubuntu first", Priorities: []cve.Level{cve.Critical}, Vendors: []string{"ubuntu", "debian"}, MinCVSS: 9}

	for _, c := range []struct {
		name      string
		record    cve.Record
		policy    triage.Policy
		facts     triage.Facts
		treatment triage.Treatment
		status    cve.Status
		rule      triage.Rule
		review    bool
	}{
		{"a score of the limit is in", in(score(7.0, "kernel_cna")), triage.Default(), built, triage.Livepatch, cve.Affected, triage.RuleCVSS, false},
		{"a score under it is not", in(score(6.9, "kernel_cna")), triage.Default(), built, triage.BelowPolicy, cve.Affected, triage.RuleCVSS, false},
		{"the highest of two scores counts", in(score(5.5, "kernel_cna"), score(7.8, "cisa_adp")), triage.Default(), built, triage.Livepatch, cve.Affected, triage.RuleCVSS, false},
		{"a vendor's word goes before a high score", ranked(9.8, priority("debian", cve.Low)), triage.Default(), built, triage.BelowPolicy, cve.Affected, triage.RulePriority, false},
		{"a vendor's word goes before a low score", ranked(3.3, priority("debian", cve.High)), triage.Default(), built, triage.Livepatch, cve.Affected, triage.RulePriority, false},
		{"of two vendors the more urgent counts", ranked(3.3, priority("debian", cve.Low), priority("ubuntu", cve.Critical)), triage.Default(), built, triage.Livepatch, cve.Affected, triage.RulePriority, false},
		{"unless the policy names one", ranked(9.9, priority("debian", cve.Critical), priority("ubuntu", cve.High)), narrow, built, triage.BelowPolicy, cve.Affected, triage.RulePriority, false},
		{"a vendor that the policy does not name is not heard", ranked(9.9, priority("suse", cve.Low)), narrow, built, triage.Livepatch, cve.Affected, triage.RuleCVSS, false},
		{"known exploited goes before everything that rates", exploited(ranked(1.0, priority("debian", cve.Negligible))), triage.Default(), built, triage.Livepatch, cve.Affected, triage.RuleKnownExploited, false},
		{"nobody rates it", in(), triage.Default(), built, triage.Unrated, cve.UnderInvestigation, triage.RuleNoRating, true},
		{"everything takes it", in(), triage.Everything(), built, triage.Livepatch, cve.Affected, triage.RuleEverything, false},
		{"everything takes no file that is not built", in(), triage.Everything(), files(triage.BuiltNo), triage.NotAffected, cve.NotAffected, triage.RuleNotBuilt, false},
		{"no file is built", exploited(in()), triage.Default(), files(triage.BuiltNo, triage.BuiltNo), triage.NotAffected, cve.NotAffected, triage.RuleNotBuilt, false},
		{"one of two is built", in(score(8, "x")), triage.Default(), files(triage.BuiltNo, triage.BuiltYes), triage.Livepatch, cve.Affected, triage.RuleCVSS, false},
		{"one may be built", in(score(8, "x")), triage.Default(), files(triage.BuiltNo, triage.BuiltUnknown), triage.Livepatch, cve.Affected, triage.RuleCVSS, false},
		{"no file is known, high", in(score(8, "x")), triage.Default(), files(), triage.NoData, cve.UnderInvestigation, triage.RuleCVSS, true},
		{"no file is known, low", in(score(2, "x")), triage.Default(), files(), triage.BelowPolicy, cve.Affected, triage.RuleCVSS, false},
		{"nothing is known", cve.Record{ID: "CVE-2026-0001"}, triage.Default(), triage.Facts{}, triage.NoData, cve.UnderInvestigation, triage.RuleNoRating, true},
		{"the fix is in", exploited(in()), triage.Everything(), with(built, func(f *triage.Facts) { f.Status = cve.Fixed }), triage.NotAffected, cve.Fixed, triage.RuleFixed, false},
		{"the flaw is not in", exploited(in()), triage.Everything(), with(built, func(f *triage.Facts) { f.Status = cve.NotAffected }), triage.NotAffected, cve.NotAffected, triage.RuleNotPresent, false},
		{"nobody knows whether it is in", in(score(8, "x")), triage.Default(), with(built, func(f *triage.Facts) { f.Status = "" }), triage.Livepatch, cve.UnderInvestigation, triage.RuleCVSS, false},
		{"a person says no to a high score", in(score(9.8, "x")), triage.Default(), person(triage.Defer, cve.Affected), triage.Defer, cve.Affected, triage.RulePerson, false},
		{"a person says yes to what nobody rates", in(), triage.Default(), person(triage.Livepatch, cve.Affected), triage.Livepatch, cve.Affected, triage.RulePerson, false},
		{"a person is heard under everything too", in(), triage.Everything(), person(triage.Reboot, cve.Affected), triage.Reboot, cve.Affected, triage.RulePerson, false},
		{"exploited since a person said no: ask again", exploited(in()), triage.Default(), person(triage.Defer, cve.Affected), triage.Defer, cve.Affected, triage.RulePerson, true},
		{"exploited since a person said yes: nothing to ask", exploited(in()), triage.Default(), person(triage.Livepatch, cve.Affected), triage.Livepatch, cve.Affected, triage.RulePerson, false},
	} {
		d := triage.Decide(c.record, c.policy, c.facts)
		if d.Treatment != c.treatment || d.Status != c.status || d.Rule != c.rule || d.Review != c.review {
			t.Errorf("%s: %s, %s by %s, review %t (%s)\nwant %s, %s by %s, review %t", c.name, d.Treatment, d.Status, d.Rule, d.Review, d.Reason,
				c.treatment, c.status, c.rule, c.review)
		}
		if len(d.WouldChange) == 0 || d.Reason == "" && c.rule != triage.RuleFixed {
			t.Errorf("%s: it does not explain itself: %+v", c.name, d)
		}
		if (d.Status == cve.NotAffected) != (d.Justification != "") {
			t.Errorf("%s: status %s with justification %q", c.name, d.Status, d.Justification)
		}
		for _, f := range d.Facts {
			if f.Source.Feed == "" && c.facts.Status != "" {
				t.Errorf("%s: fact %s has no source", c.name, f.Name)
			}
		}
	}
}

// What would change a decision does change it.
func TestWhatWouldChangeIt(t *testing.T) {
	f := triage.Facts{Kernel: "k", Status: cve.Affected, From: cna, Files: []triage.File{{Path: "net/a.c", Built: triage.BuiltYes}}}
	low := cve.Record{ID: "CVE-2026-0001", CNA: cna, Priorities: []cve.Priority{priority("debian", cve.Medium)}}
	d := triage.Decide(low, triage.Default(), f)
	if !slices.Equal(d.WouldChange, []string{"a vendor's priority of critical or high", "it is listed as known exploited"}) || d.Treatment != triage.BelowPolicy {
		t.Fatalf("%+v", d)
	}
	low.Priorities[0].Level = cve.High
	if d := triage.Decide(low, triage.Default(), f); d.Treatment != triage.Livepatch {
		t.Errorf("with priority high: %+v", d)
	}
	low.Priorities[0].Level = cve.Medium
	low.Exploited = []cve.Exploited{{From: kev}}
	if d := triage.Decide(low, triage.Default(), f); d.Treatment != triage.Livepatch {
		t.Errorf("listed as exploited: %+v", d)
	}
}

func TestHarmIsShownAndDecidesNothing(t *testing.T) {
	r := cve.Record{ID: "CVE-2026-0001", CNA: cna, Title: "net: fix use-after-free in a thing", Description: "An out-of-bounds write, and a race.", Scores: []cve.Score{score(2, "x")}}
	f := triage.Facts{Status: cve.Affected, Files: []triage.File{{Path: "net/a.c", Built: triage.BuiltYes}}}
	d := triage.Decide(r, triage.Default(), f)
	if !slices.Equal(d.Harm, []string{"use after free", "out of bounds", "race"}) || d.Treatment != triage.BelowPolicy {
		t.Errorf("%s, harm %q", d.Treatment, d.Harm)
	}
	if h := triage.Harm("net: thing: rename a trace point of the brace"); len(h) != 0 {
		t.Errorf("harm %q", h)
	}
}

func TestPolicyIsReadStrictly(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"all keys", "name = \"own\"\npriorities = [\"critical\"]\nvendors = [\"debian\"]\nmin_cvss = 9.0\n", ""},
		{"nothing", "", ""},
		{"a key nobody knows", "min_cvs = 9.0\n", "strict mode"},
		{"a priority nobody knows", "priorities = [\"urgent\"]\n", "unknown"},
		{"no priority", "priorities = []\n", "no priority is in"},
		{"a score that everything has", "min_cvss = 0.0\n", "min_cvss"},
		{"not a number", "min_cvss = nan\n", "min_cvss"},
		{"a score beyond the scale", "min_cvss = 11.0\n", "min_cvss"},
		{"a lie about its name", "name = \"everything\"\n", "name of its own"},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, triage.PolicyFile), []byte(c.text), 0o644); err != nil {
			t.Fatal(err)
		}
		p, err := triage.Named(dir, "default")
		if text := message(err); (err == nil) != (c.want == "") || !strings.Contains(text, c.want) {
			t.Errorf("%s: %v (%s)", c.name, err, text)
		}
		if c.name == "all keys" && (p.Name != "own" || p.MinCVSS != 9 || len(p.Priorities) != 1) {
			t.Errorf("policy %+v", p)
		}
		if p, err := triage.Named(dir, "everything"); err != nil || !p.Everything {
			t.Errorf("everything beside a file: %+v, %v", p, err)
		}
	}
	if _, err := triage.Named(t.TempDir(), "evrything"); fault.CodeOf(err) != "bad_policy" {
		t.Errorf("a misspelled name: %v", err)
	}
	if p, err := triage.Named(t.TempDir(), ""); err != nil || p.MinCVSS != 7 || p.Everything {
		t.Errorf("no file: %+v, %v", p, err)
	}
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error() + " " + fault.HintOf(err)
}

const decision = `cve: CVE-2026-1000
series: [debian-6.1]
status: not_affected
justification: vulnerable_code_not_in_execute_path
treatment: not_affected
reason: the only caller is behind a boot parameter that our kernels refuse
author: A Person <a@example.org>
date: 2026-11-20
`

func TestReviewedDecisionsAreLinted(t *testing.T) {
	edit := func(pairs ...string) string { return strings.NewReplacer(pairs...).Replace(decision) }
	for _, c := range []struct{ name, file, text, want string }{
		{"a good one", "cve/2026/CVE-2026-1000.yaml", decision, ""},
		{"in the folder of another year", "cve/2025/CVE-2026-1000.yaml", decision, "whose file is cve/2026/CVE-2026-1000.yaml"},
		{"a field nobody knows", "cve/2026/CVE-2026-1000.yaml", decision + "score: 9\n", "field score not found"},
		{"two documents", "cve/2026/CVE-2026-1000.yaml", decision + "---\n" + decision, "more than one document"},
		{"a malformed id", "cve/2026/CVE-2026-1000.yaml", edit("CVE-2026-1000", "CVE-2026-1"), "not a CVE identifier"},
		{"a status that VEX does not have", "cve/2026/CVE-2026-1000.yaml", edit("status: not_affected", "status: harmless"), "none of VEX"},
		{"a treatment nobody knows", "cve/2026/CVE-2026-1000.yaml", edit("treatment: not_affected", "treatment: ignore"), "use livepatch, reboot"},
		{"a treatment that is no decision", "cve/2026/CVE-2026-1000.yaml", edit("treatment: not_affected", "treatment: unrated"), "not one that a person decides"},
		{"not affected and live patched", "cve/2026/CVE-2026-1000.yaml", edit("treatment: not_affected", "treatment: livepatch"), "does not go with"},
		{"not affected without a why", "cve/2026/CVE-2026-1000.yaml", edit("justification: vulnerable_code_not_in_execute_path\n", ""), "justification belongs"},
		{"a why that VEX does not have", "cve/2026/CVE-2026-1000.yaml", edit("vulnerable_code_not_in_execute_path", "we_are_lucky"), "none of VEX"},
		{"no reason", "cve/2026/CVE-2026-1000.yaml", edit("the only caller is behind a boot parameter that our kernels refuse", "\"\""), "no reason"},
		{"no author", "cve/2026/CVE-2026-1000.yaml", edit("A Person <a@example.org>", "\" \""), "no author"},
		{"a date in the future", "cve/2026/CVE-2026-1000.yaml", edit("2026-11-20", "2026-11-27"), "in the future"},
		{"no date", "cve/2026/CVE-2026-1000.yaml", edit("2026-11-20", "soon"), "is not like"},
		{"another ending", "cve/2026/CVE-2026-1000.yml", decision, "they are named"},
		{"a bomb", "cve/2026/CVE-2026-1000.yaml", strings.Repeat("# x\n", 40_000), "limit"},
	} {
		dir := t.TempDir()
		p := filepath.Join(dir, c.file)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(c.text), 0o644); err != nil {
			t.Fatal(err)
		}
		all, findings, err := triage.Lint(dir, today)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		_, loadErr := triage.Load(dir, today)
		if c.want == "" {
			if len(findings) != 0 || loadErr != nil || all.Of("CVE-2026-1000", "debian-6.1") == nil || all.Of("CVE-2026-1000", "debian-6.12") != nil {
				t.Errorf("%s: %v, %v, %v", c.name, all, findings, loadErr)
			}
			continue
		}
		if len(findings) != 1 || !strings.Contains(findings[0].Text, c.want) || findings[0].File != c.file {
			t.Errorf("%s: findings %+v, want %q", c.name, findings, c.want)
		}
		if fault.CodeOf(loadErr) != "bad_review" || len(all) != 0 {
			t.Errorf("%s: load: %v", c.name, loadErr)
		}
	}
	if all, findings, err := triage.Lint(t.TempDir(), today); err != nil || len(all)+len(findings) != 0 {
		t.Errorf("a data folder without decisions: %v, %v, %v", all, findings, err)
	}
}

// Every CVE of the kernel CNA gets one treatment, none of those that upstream
// has fixed is open, and no one without a rating is called low.
func TestReportOnAllRecordsOfTheKernelCNA(t *testing.T) {
	s := feed.NewSet()
	if err := s.Read(testkit.Shared(t, "cve", "cna-all.jsonl.gz"), ""); err != nil {
		t.Fatal(err)
	}
	k := triage.Kernel{Release: "6.1.0-50-cloud-amd64", Series: "debian-6.1", Source: "6.1.176-1", Built: func(p string) triage.Built {
		if strings.HasPrefix(p, "arch/arm") {
			return triage.BuiltNo
		}
		return triage.BuiltYes
	}}
	rep, err := triage.Open(k, triage.Default(), s, nil)
	if err != nil {
		t.Fatal(err)
	}
	sum := 0
	for _, n := range rep.Counts {
		sum += n
	}
	if rep.Total != s.Len() || sum != rep.Total || len(rep.Rows) != rep.Total {
		t.Errorf("%d records, %d rows, %d counted", s.Len(), rep.Total, sum)
	}
	v, err := fixes.Upstream(k.Source)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rep.Rows {
		rec, _ := s.Record(r.CVE)
		if state, _ := cve.StateAt(rec.Dyads, v); (state == cve.StateFixed || state == cve.StateNotPresent) != (r.Rule == triage.RuleFixed || r.Rule == triage.RuleNotPresent) {
			t.Errorf("%s: %s by %s, and by its dyads it is %s", r.CVE, r.Treatment, r.Rule, state)
		}
		if r.Treatment == triage.BelowPolicy && len(rec.Scores) == 0 {
			t.Errorf("%s has no rating and is called low", r.CVE)
		}
	}
	for _, want := range []triage.Treatment{triage.Livepatch, triage.Unrated, triage.NotAffected, triage.BelowPolicy} {
		if rep.Counts[want] == 0 {
			t.Errorf("no CVE is %s: %v", want, rep.Counts)
		}
	}
	t.Logf("%s: %v, %d wait for a person", k.Source, rep.Counts, rep.Waiting)
}

func FuzzReviewed(f *testing.F) {
	f.Add([]byte(decision))
	f.Add([]byte("a: &a [*a]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := triage.ParseReviewed("cve/2026/CVE-2026-1000.yaml", b, today)
		if err == nil && (v.CVE != "CVE-2026-1000" || v.Reason == "" || v.Author == "" || !v.Status.Known()) {
			t.Errorf("%+v", v)
		}
	})
}

func FuzzPolicy(f *testing.F) {
	f.Add([]byte("priorities = [\"critical\"]\nmin_cvss = 9.0\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := triage.ParsePolicy(b)
		if err != nil {
			return
		}
		facts := triage.Facts{Status: cve.Affected, Files: []triage.File{{Path: "a.c", Built: triage.BuiltYes}}}
		r := cve.Record{ID: "CVE-2026-0001", Exploited: []cve.Exploited{{From: kev}}}
		if d := triage.Decide(r, p, facts); d.Treatment != triage.Livepatch {
			t.Errorf("a policy leaves out what is exploited: %+v", p)
		}
		if d := triage.Decide(cve.Record{ID: "CVE-2026-0001"}, p, facts); !p.Everything && d.Treatment != triage.Unrated {
			t.Errorf("a policy decides what nobody rates: %+v", d)
		}
	})
}
