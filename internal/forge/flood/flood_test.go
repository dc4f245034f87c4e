// SPDX-License-Identifier: Apache-2.0

package flood

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/forge/build"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
)

// The two sources of a kernel in small. a.c and b.c belong to one CVE, b.c
// uses what h.h brings in; c.c is refused; d.c calls a function whose
// declaration in h.h changes with its definition in e.c.
var before = map[string]string{
	"h.h":          "#ifndef H\n#define H\nint plain(int a);\nint shared(int a);\n#endif\n",
	"a.c":          "#include <h.h>\nint a(int x)\n{\n\treturn x;\n}\n",
	"b.c":          "#include <h.h>\nint b(int x)\n{\n\treturn x;\n}\n",
	"c.c":          "#include <h.h>\nint c(int x)\n{\n\treturn x;\n}\n",
	"d.c":          "#include <h.h>\nint d(int x)\n{\n\treturn shared(x);\n}\n",
	"e.c":          "#include <h.h>\nint shared(int a)\n{\n\treturn a;\n}\n",
	"comment.c":    "#include <h.h>\nint n(void)\n{\n\treturn 0;\n}\n",
	"off.c":        "int off;\n",
	"arch/arm/x.c": "int arm;\n",
}

var after = map[string]string{
	"h.h":          "#ifndef H\n#define H\nint plain(int a);\nint shared(int a, int b);\nstatic inline int fresh(int a)\n{\n\treturn a + 1;\n}\n#endif\n",
	"a.c":          "#include <h.h>\nint a(int x)\n{\n\tif (x < 0)\n\t\treturn 0;\n\treturn x;\n}\n",
	"b.c":          "#include <h.h>\nint b(int x)\n{\n\treturn fresh(x);\n}\n",
	"c.c":          "#include <h.h>\nint c(int x)\n{\n\treturn x + 1; /* BAD */\n}\n",
	"d.c":          "#include <h.h>\nint d(int x)\n{\n\treturn shared(x, 1);\n}\n",
	"e.c":          "#include <h.h>\nint shared(int a, int b)\n{\n\treturn a + b;\n}\n",
	"comment.c":    "#include <h.h>\nint n(void)\n{\n\treturn 0; /* INERT */\n}\n",
	"off.c":        "int off = 1;\n",
	"arch/arm/x.c": "int arm = 1;\n",
	"new.c":        "int added;\n",
}

func write(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func includers(f string) []string {
	switch {
	case f == "h.h":
		return []string{"a.c", "b.c", "c.c", "comment.c", "d.c", "e.c"}
	case f == "off.c", strings.HasPrefix(f, "arch/arm/"):
		return nil
	}
	return []string{f}
}

func delta(t *testing.T) *Delta {
	t.Helper()
	files := sortedKeys(after)
	d, err := Compare(t.Context(), Trees{Old: write(t, before), New: write(t, after)}, files, includers)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// fake refuses what is marked in the diff, as a driver would: with the file.
type fake struct {
	checks int
	fail   int // the check that ends in an error; 0 for none
}

func (f *fake) Reach(_ context.Context, p compose.Plan) ([]string, []build.Refusal, error) {
	var out []string
	for _, file := range p.Files() {
		if strings.HasSuffix(file, ".c") {
			out = append(out, file)
		}
	}
	return out, nil, nil
}

func (f *fake) Check(_ context.Context, p compose.Plan, _ *build.Clock) (build.Result, error) {
	f.checks++
	if f.checks == f.fail {
		return build.Result{}, errors.New("killed")
	}
	res := build.Result{Result: build.Built}
	file := ""
	for line := range strings.Lines(string(p.Patches[len(p.Patches)-1].Diff)) {
		if name, ok := strings.CutPrefix(line, "+++ b/"); ok {
			file = strings.TrimSpace(name)
		}
		if strings.HasPrefix(line, "+") && strings.Contains(line, "BAD") {
			res.Result = build.Refused
			res.Refusals = append(res.Refusals, build.Refuse("init_code", file))
		}
		if strings.HasPrefix(line, "+") && strings.Contains(line, "INERT") {
			res.Unchanged = append(res.Unchanged, file)
		}
	}
	return res, nil
}

var candidatesOf = []Candidate{
	{ID: "CVE-2026-0001", Files: []string{"a.c", "b.c"}, Wanted: true},
	{ID: "CVE-2026-0002", Files: []string{"c.c"}, Wanted: true},
	{ID: "CVE-2026-0003", Files: []string{"old/place/d.c"}, Wanted: true},
	{ID: "CVE-2026-0004", Files: []string{"comment.c"}, Wanted: true},
	{ID: "CVE-2026-0005", Files: []string{"off.c"}, Wanted: true},
	{ID: "CVE-2026-0006", Files: []string{"arch/arm/x.c"}, Wanted: true},
	{ID: "CVE-2026-0007", Files: []string{"new.c"}, Wanted: true},
	{ID: "CVE-2026-0008", Wanted: true},
	{ID: "CVE-2026-0009", Files: []string{"a.c"}, Status: BelowPolicy, Reason: "CVSS 5.5"},
	{ID: "CVE-2026-0010", Files: []string{"a.c", "b.c"}, Wanted: true},
	{ID: "CVE-2026-0011", Files: []string{"same.c"}, Wanted: true},
}

func TestEveryCVEStandsOnceInTheLedger(t *testing.T) {
	d := delta(t)
	d.byBase["d.c"] = []string{"d.c"}
	all := slices.Clone(candidatesOf)
	all[2].Files = []string{"d.c"}
	out, err := Run(t.Context(), &fake{}, d, all, Options{Kernel: catalog.Entry{Release: "6.1.0-1-cloud-amd64"}, State: StateIn(t.TempDir())})
	if err != nil {
		t.Fatal(err)
	}
	want := map[cve.ID]struct {
		status Status
		code   string
	}{
		"CVE-2026-0001": {Livepatched, ""},
		"CVE-2026-0002": {Refused, "init_code"},
		"CVE-2026-0003": {Livepatched, ""},
		"CVE-2026-0004": {NotAffected, "compiled_out"},
		"CVE-2026-0005": {NotAffected, "config"},
		"CVE-2026-0006": {NotAffected, "arch"},
		"CVE-2026-0007": {Refused, "file_added"},
		"CVE-2026-0008": {NoData, ""},
		"CVE-2026-0009": {BelowPolicy, ""},
		"CVE-2026-0010": {Livepatched, ""},
		"CVE-2026-0011": {NoData, ""},
	}
	if len(out.Ledger.Entries) != len(want) || out.Ledger.Total != len(want) {
		t.Fatalf("%d entries, total %d, want %d", len(out.Ledger.Entries), out.Ledger.Total, len(want))
	}
	for _, e := range out.Ledger.Entries {
		if w := want[e.CVE]; e.Status != w.status || string(e.Code) != w.code || e.Reason == "" {
			t.Errorf("%s: %s %q (%s), want %s %q", e.CVE, e.Status, e.Code, e.Reason, w.status, w.code)
		}
	}
	g := out.Ledger
	if g.Counts[Livepatched] != 3 || g.Counts[Refused] != 2 || g.Applies != 5 || g.Share != 0.6 || g.Refusals["init_code"] != 1 {
		t.Errorf("counts %v, applies %d, share %v, refusals %v", g.Counts, g.Applies, g.Share, g.Refusals)
	}
	// The source patches hold what was accounted for, and nothing of what was refused.
	var fixes []cve.ID
	files := map[string]bool{}
	for _, p := range out.Patches {
		fixes = append(fixes, p.Fixes...)
		for _, f := range p.Files {
			if files[f] {
				t.Errorf("%s is in two source patches", f)
			}
			files[f] = true
		}
		if strings.Contains(string(p.Diff), "BAD") {
			t.Errorf("source patch %s holds what was refused", p.Name)
		}
	}
	slices.Sort(fixes)
	if !slices.Equal(fixes, []cve.ID{"CVE-2026-0001", "CVE-2026-0003", "CVE-2026-0010"}) {
		t.Errorf("fixes %v", fixes)
	}
}

// TestWhatIsRefusedIsTriedInParts: two fixes in one file, and one of them is
// refused. Only a CVE whose words name the other one counts.
func TestWhatIsRefusedIsTriedInParts(t *testing.T) {
	two := "int good_one(int x)\n{\n\treturn x;\n}\n\nint between;\n\nint bad_one(int x)\n{\n\treturn x;\n}\n"
	now := strings.Replace(strings.Replace(two, "return x;", "return more_of(x);", 1), "int bad_one(int x)\n{\n\treturn x;", "int bad_one(int x)\n{\n\treturn x + 1; /* BAD */", 1)
	now = strings.Replace(now, "int good_one", "static int more_of(int x)\n{\n\treturn x;\n}\n\nint good_one", 1)
	d, err := Compare(t.Context(), Trees{Old: write(t, map[string]string{"two.c": two}), New: write(t, map[string]string{"two.c": now})}, []string{"two.c"}, includers)
	if err != nil {
		t.Fatal(err)
	}
	all := []Candidate{
		{ID: "CVE-2026-0001", Files: []string{"two.c"}, Wanted: true, Words: "two: fix an overflow in good_one(). It was seen by one."},
		{ID: "CVE-2026-0002", Files: []string{"two.c"}, Wanted: true, Words: "two: bad_one() was wrong"},
		{ID: "CVE-2026-0003", Files: []string{"two.c"}, Wanted: true, Words: "two: something else was wrong"},
		{ID: "CVE-2026-0004", Files: []string{"two.c"}, Wanted: true, Words: "two: good_one() raced with bad_one()"},
	}
	out, err := Run(t.Context(), &fake{}, d, all, Options{State: StateIn(t.TempDir())})
	if err != nil || out.Ledger.Counts[Refused] != len(all) || len(out.Patches) != 0 {
		t.Fatalf("without parts: %v, %v, %d source patches", err, out.Ledger.Counts, len(out.Patches))
	}
	out, err = Run(t.Context(), &fake{}, d, all, Options{Parts: true, State: StateIn(t.TempDir())})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []Status{Livepatched, Refused, Refused, Refused} {
		if e := out.Ledger.Entries[i]; e.Status != want {
			t.Errorf("%s: %s (%s), want %s", e.CVE, e.Status, e.Reason, want)
		}
	}
	if e := out.Ledger.Entries[0]; e.By != "words" || !slices.Equal(e.Names, []string{"good_one"}) || !slices.Equal(e.LeftOut, []string{"bad_one"}) || out.Ledger.ByWords != 1 {
		t.Errorf("entry %+v, %d by words", e, out.Ledger.ByWords)
	}
	if len(out.Patches) != 1 {
		t.Fatalf("%d source patches", len(out.Patches))
	}
	p := out.Patches[0]
	if diff := string(p.Diff); !strings.Contains(diff, "static int more_of") || !strings.Contains(diff, "return more_of(x)") || strings.Contains(diff, "BAD") {
		t.Errorf("source patch:\n%s", diff)
	}
	if !slices.Equal(p.Fixes, []cve.ID{"CVE-2026-0001"}) || p.Origin != "without bad_one" {
		t.Errorf("fixes %v, origin %q", p.Fixes, p.Origin)
	}
}

// TestPartsOfOneCVEAreOneSourcePatch: also where they share no file.
func TestPartsOfOneCVEAreOneSourcePatch(t *testing.T) {
	text := "int NAME_good(int x)\n{\n\treturn x;\n}\n\nint between;\n\nint NAME_bad(int x)\n{\n\treturn x;\n}\n"
	was, is := map[string]string{}, map[string]string{}
	for _, n := range []string{"p", "q"} {
		was[n+".c"] = strings.ReplaceAll(text, "NAME", n)
		is[n+".c"] = strings.Replace(strings.Replace(was[n+".c"], "return x;", "return x + 2;", 1), "return x;", "return x + 1; /* BAD */", 1)
	}
	d, err := Compare(t.Context(), Trees{Old: write(t, was), New: write(t, is)}, []string{"p.c", "q.c"}, includers)
	if err != nil {
		t.Fatal(err)
	}
	all := []Candidate{{ID: "CVE-2026-0001", Files: []string{"p.c", "q.c"}, Wanted: true, Words: "p_good() and q_good() were wrong"}}
	out, err := Run(t.Context(), &fake{}, d, all, Options{Parts: true, State: StateIn(t.TempDir())})
	if err != nil {
		t.Fatal(err)
	}
	if len(out.Patches) != 1 || !slices.Equal(out.Patches[0].Files, []string{"p.c", "q.c"}) || out.Ledger.ByWords != 1 {
		t.Errorf("source patches %+v, ledger %+v", out.Patches, out.Ledger.Counts)
	}
}

func TestAClosureHoldsWhatItNeedsAndNoMore(t *testing.T) {
	d := delta(t)
	has := func(set nodes, file, text string) bool {
		for n := range set {
			if n.file == file && strings.Contains(strings.Join(d.changes[file].hunks[n.hunk].lines, ""), text) {
				return true
			}
		}
		return false
	}
	b := d.closure([]string{"b.c"})
	if !has(b, "h.h", "fresh") || !has(b, "b.c", "fresh(x)") {
		t.Errorf("b.c without the function that the header brings in: %v", b.key())
	}
	if a := d.closure([]string{"a.c"}); len(a.files()) != 1 {
		t.Errorf("a.c needs nothing else: %v", a.key())
	}
	for _, start := range []string{"d.c", "e.c"} {
		if set := d.closure([]string{start}); !slices.Equal(set.files(), []string{"d.c", "e.c", "h.h"}) {
			t.Errorf("from %s: %v, want declaration, definition and call together", start, set.files())
		}
	}
}

func TestTextWithAllHunksIsTheNewText(t *testing.T) {
	d := delta(t)
	for f, c := range d.changes {
		if len(c.hunks) == 0 {
			continue
		}
		if got := string(c.text(func(int) bool { return true })); got != after[f] {
			t.Errorf("%s: %q, want %q", f, got, after[f])
		}
		if got := string(c.text(func(int) bool { return false })); got != before[f] {
			t.Errorf("%s without hunks: %q, want %q", f, got, before[f])
		}
	}
}

// TestAnInterruptedRunGoesOn: what was found out before the end is not found
// out again, and the outcome is the same.
func TestAnInterruptedRunGoesOn(t *testing.T) {
	d := delta(t)
	whole := &fake{}
	want, err := Run(t.Context(), whole, d, candidatesOf, Options{State: StateIn(t.TempDir())})
	if err != nil {
		t.Fatal(err)
	}
	state := StateIn(t.TempDir())
	total := 0
	for at := 1; ; at++ {
		f := &fake{fail: 2} // each run finds out one thing more
		got, err := Run(t.Context(), f, d, candidatesOf, Options{State: state})
		total += f.checks
		if err != nil {
			if at > 20 {
				t.Fatal("it does not come to an end")
			}
			continue
		}
		if len(got.Ledger.Entries) != len(want.Ledger.Entries) || got.Ledger.Share != want.Ledger.Share {
			t.Errorf("ledger %+v, want %+v", got.Ledger.Counts, want.Ledger.Counts)
		}
		if total > 2*whole.checks {
			t.Errorf("%d checks in all, %d without interruption", total, whole.checks)
		}
		return
	}
}

func TestWhatIsQueuedIsNotTakenAgain(t *testing.T) {
	d := delta(t)
	base := []queue.Patch{{Name: "x", Fixes: []cve.ID{"CVE-2026-0001"}, Diff: []byte("--- a/z\n+++ b/z\n@@ -1 +1 @@\n-a\n+b\n"), Files: []string{"z"}}}
	out, err := Run(t.Context(), &fake{}, d, candidatesOf[:1], Options{Base: base, State: StateIn(t.TempDir())})
	if err != nil {
		t.Fatal(err)
	}
	if len(out.Patches) != 0 || out.Ledger.Counts[Livepatched] != 1 {
		t.Errorf("patches %v, ledger %v", out.Patches, out.Ledger.Counts)
	}
}

// TestAWideQueueCountsForNoLot: what the queue so far reaches is not what a
// change reaches, and what changes nothing is seen beside it.
func TestAWideQueueCountsForNoLot(t *testing.T) {
	d := delta(t)
	base := []queue.Patch{{Name: "wide", Fixes: []cve.ID{"CVE-2025-0001"}, Diff: []byte("--- a/w.c\n+++ b/w.c\n@@ -1 +1 @@\n-a\n+b\n--- a/x.c\n+++ b/x.c\n@@ -1 +1 @@\n-a\n+b\n"), Files: []string{"w.c", "x.c"}}}
	all := []Candidate{{ID: "CVE-2026-0001", Files: []string{"a.c"}, Wanted: true}, {ID: "CVE-2026-0004", Files: []string{"comment.c"}, Wanted: true}}
	out, err := Run(t.Context(), &fake{}, d, all, Options{Base: base, Fanout: 1, State: StateIn(t.TempDir())})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []Status{Livepatched, NotAffected} {
		if e := out.Ledger.Entries[i]; e.Status != want {
			t.Errorf("%s: %s %s, want %s", e.CVE, e.Status, e.Code, want)
		}
	}
}

func TestAWideChangeIsRefusedByItsReach(t *testing.T) {
	d := delta(t)
	out, err := Run(t.Context(), &fake{}, d, candidatesOf[:1], Options{Fanout: 1, State: StateIn(t.TempDir())})
	if err != nil {
		t.Fatal(err)
	}
	if e := out.Ledger.Entries[0]; e.Status != Refused || e.Code != "header_fanout" {
		t.Errorf("entry %+v", e)
	}
}

func TestAFailedTestTakesEverythingBack(t *testing.T) {
	g := Ledger{Entries: []Entry{{CVE: "CVE-2026-0001", Status: Livepatched}, {CVE: "CVE-2026-0002", Status: Refused, Code: "init_code"}}}
	g.Fail("it oopsed")
	if g.Counts[FailedTest] != 1 || g.Counts[Livepatched] != 0 || g.Share != 0 || g.Applies != 2 {
		t.Errorf("%+v", g)
	}
}
