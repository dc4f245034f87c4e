// SPDX-License-Identifier: Apache-2.0

package feed_test

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/feed"
	"klatch/internal/testkit"
)

func write(t testing.TB, name, content string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

func zipped(t testing.TB, s string) string {
	t.Helper()
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := z.Write([]byte(s)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

const good = `{"cve":"CVE-2026-1000","published":"2026-02-03","title":"net: fix a thing","description":"net: fix\n a \u001b[31mthing","files":["net/core/thing.c"],` +
	`"fix_commits":["5578de4834fe0f2a34fedc7374be691443396d1f"],"dyad":["5.10:aaaaaaa:6.1.20:bbbbbbb","5.10:aaaaaaa:6.3:ccccccc"],` +
	`"cvss_vectors":{"kernel_cna":"CVSS:3.1/AV:L/AC:L/PR:L/UI:N/S:U/C:H/I:H/A:H"},"cvss_source":"kernel_cna","cvss_vector":"CVSS:3.1/AV:L/AC:L/PR:L/UI:N/S:U/C:H/I:H/A:H","cvss_score":7.8}`

func texts(s *feed.Set) string {
	listed, more := s.Problems()
	var b strings.Builder
	for _, p := range listed {
		fmt.Fprintln(&b, p)
	}
	if more > 0 {
		fmt.Fprintf(&b, "%d more\n", more)
	}
	return b.String()
}

func TestEveryValueRemembersItsSource(t *testing.T) {
	s := feed.NewSet()
	for _, f := range []struct{ name, content, date string }{
		{"cna.jsonl.gz", zipped(t, good+"\n"), "2026-08-21"},
		{"debian.csv", "cve,priority\nCVE-2026-1000,unimportant\nCVE-2026-1001,not yet assigned\n", "2026-08-22"},
		{"ubuntu.toml", "vendor = \"ubuntu\"\ndate = \"2026-08-23\"\n[priority]\n\"CVE-2026-1000\" = \"High\"\n", ""},
		{"known.json", `{"dateReleased":"2026-08-24T10:00:00.000Z","count":1,"vulnerabilities":[{"cveID":"CVE-2026-1000","dateAdded":"2026-08-20"}]}`, ""},
	} {
		if err := s.Read(write(t, f.name, f.content), f.date); err != nil {
			t.Fatal(err)
		}
	}
	dyad := func(s string) cve.Dyad {
		d, err := cve.ParseDyad(s)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	cna := cve.Source{Feed: "kernel-cna", File: "cna.jsonl.gz", Date: "2026-08-21"}
	want := cve.Record{ID: "CVE-2026-1000", CNA: cna, Published: "2026-02-03", Title: "net: fix a thing", Description: "net: fix a [31mthing",
		Files: []string{"net/core/thing.c"}, FixCommits: []string{"5578de4834fe0f2a34fedc7374be691443396d1f"},
		Dyads:  []cve.Dyad{dyad("5.10:aaaaaaa:6.1.20:bbbbbbb"), dyad("5.10:aaaaaaa:6.3:ccccccc")},
		Scores: []cve.Score{{By: "kernel_cna", Vector: "CVSS:3.1/AV:L/AC:L/PR:L/UI:N/S:U/C:H/I:H/A:H", Value: 7.8, From: cna}},
		Priorities: []cve.Priority{
			{Vendor: "debian", Level: cve.Negligible, From: cve.Source{Feed: "priorities/debian", File: "debian.csv", Date: "2026-08-22"}},
			{Vendor: "ubuntu", Level: cve.High, From: cve.Source{Feed: "priorities/ubuntu", File: "ubuntu.toml", Date: "2026-08-23"}}},
		Exploited: []cve.Exploited{{Added: "2026-08-20", From: cve.Source{Feed: "cisa-kev", File: "known.json", Date: "2026-08-24"}}},
	}
	got, _ := s.Record("CVE-2026-1000")
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b cve.Version) bool { return a == b })); d != "" {
		t.Errorf("record (-want +got):\n%s", d)
	}
	if s.Len() != 1 || texts(s) != "" {
		t.Errorf("%d records, problems: %s", s.Len(), texts(s))
	}
	// A day later the score is another and the priorities stay.
	later := strings.NewReplacer("C:H/I:H/A:H", "C:N/I:N/A:L", "7.8", "3.3").Replace(good)
	if err := s.Read(write(t, "cna.jsonl", later), "2026-08-25"); err != nil {
		t.Fatal(err)
	}
	if err := s.Read(write(t, "old.jsonl", good), "2026-08-01"); err != nil {
		t.Fatal(err)
	}
	got, _ = s.Record("CVE-2026-1000")
	if len(got.Scores) != 1 || got.Scores[0].Value != 3.3 || len(got.Priorities) != 2 || len(got.Exploited) != 1 {
		t.Errorf("after a newer and an older file: %+v", got)
	}
}

func TestBadRecordsAreKeptAside(t *testing.T) {
	bad := func(old, replacement string) string { return strings.Replace(good, old, replacement, 1) }
	for _, c := range []struct{ name, file, content, want string }{
		{"not JSON", "a.jsonl", "{\n" + good, "line 1: not a record"},
		{"no CVE", "a.jsonl", bad("CVE-2026-1000", "CVE-26-1") + "\n" + good, "line 1: \"CVE-26-1\" is not a CVE identifier (kept aside)"},
		{"a path out of the tree", "a.jsonl", bad("net/core/thing.c", "../../etc/passwd") + "\n" + good, "is not one of a kernel tree"},
		{"a bad dyad", "a.jsonl", bad("6.1.20:bbbbbbb", "6.1.20") + "\n" + good, "line 1: CVE-2026-1000: "},
		{"a bad date", "a.jsonl", bad("2026-02-03", "yesterday") + "\n" + good, "is not a date"},
		{"a commit that is none", "a.jsonl", bad("5578de4834fe", "$(reboot)") + "\n" + good, "fix commit"},
		{"a line over the limit", "a.jsonl", `{"cve":"` + strings.Repeat("x", 3<<20) + "\"}\n" + good, "line 1: over the limit"},
		{"a bad vector", "a.jsonl", strings.ReplaceAll(good, "AV:L", "AV:Q"), "(taken without it)"},
		{"a score that is not the vector's", "a.jsonl", bad("7.8", "9.9"), "the feed says score 9.9"},
		{"a priority nobody knows", "debian.csv", "CVE-2026-1000,very\nCVE-2026-1000,high\n", "line 1: CVE-2026-1000: priority \"very\" is unknown"},
		{"a line with three fields", "debian.csv", "CVE-2026-1000,high,what\nCVE-2026-1000,high\n", "line 1: 3 fields"},
		{"a stray quote", "debian.csv", "CVE-2026-1000,hi\"gh\nCVE-2026-1000,high\n", "line 1: "},
		{"an exploited one without id", "k.json", `{"count":2,"vulnerabilities":[{"cveID":"?"},{"cveID":"CVE-2026-1000","dateAdded":"soon"}]}`, "entry 1: "},
		{"an exploited one without date is exploited", "k.json", `{"count":1,"vulnerabilities":[{"cveID":"CVE-2026-1000","dateAdded":"soon"}]}`, "(taken without it)"},
		{"a list that was cut", "k.json", `{"count":2,"vulnerabilities":[{"cveID":"CVE-2026-1000","dateAdded":"2026-01-01"}]}`, "it says 2, the list has 1"},
	} {
		s := feed.NewSet()
		if err := s.Read(write(t, c.file, c.content), "2026-08-21"); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if got := texts(s); !strings.Contains(got, c.want) || strings.Count(got, "\n") > 2 {
			t.Errorf("%s: problems %q, want %q", c.name, got, c.want)
		}
		if _, ok := s.Record("CVE-2026-1000"); !ok {
			t.Errorf("%s: the good record is gone too", c.name)
		}
	}
}

func TestAFileThatIsNoFeedIsRefused(t *testing.T) {
	for _, c := range []struct {
		name, file, content string
		want                fault.Code
	}{
		{"a name that says nothing", "feed.txt", good, "bad_feed"},
		{"JSON of something else", "a.json", `{}`, "bad_feed"},
		{"a key nobody knows", "a.toml", "vendor = \"x\"\nseverity = 1\n", "bad_feed"},
		{"no vendor", "a.toml", "[priority]\n", "bad_feed"},
		{"a file named for no vendor", "A feed!.csv", "CVE-2026-1000,high\n", "bad_feed"},
		{"a small file that is large", "a.jsonl.gz", zipped(t, strings.Repeat(" ", 257<<20)), "bad_feed"},
		{"a cut download", "a.jsonl.gz", zipped(t, strings.Repeat(good+"\n", 50))[:200], "bad_feed"},
	} {
		err := feed.NewSet().Read(write(t, c.file, c.content), "")
		if fault.CodeOf(err) != c.want {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := feed.NewSet().Read(filepath.Join(t.TempDir(), "none.jsonl"), ""); fault.CodeOf(err) != "no_feed" {
		t.Errorf("an absent file: %v", err)
	}
	if err := feed.NewSet().Read(write(t, "a.jsonl", good), "today"); fault.CodeOf(err) != "bad_date" {
		t.Errorf("a date that is none: %v", err)
	}
}

// The records are in the form of security/vulns: bippy 1.2.0 with its files
// beside, and the one of 2024 that had neither metrics nor files.
func TestRecordsOfTheKernelCNA(t *testing.T) {
	s := feed.NewSet()
	if err := s.Read("testdata/published", "2026-08-21"); err != nil {
		t.Fatal(err)
	}
	r, _ := s.Record("CVE-2026-1100")
	if len(r.Scores) != 1 || r.Scores[0].Value != 7.8 || r.Scores[0].By != "kernel_cna" || r.Title != "net: thing: increase a width" || r.Description == "" ||
		cmp.Diff([]string{"include/net/thing.h", "net/ipv4/thing.c"}, r.Files) != "" || len(r.Dyads) != 1 || r.Dyads[0].Fixed.String() != "6.12" ||
		cmp.Diff([]string{"b72a6a7ab9573e06d5c2fcb92eaa28614a735bfd"}, r.FixCommits) != "" {
		t.Errorf("%+v", r)
	}
	old, _ := s.Record("CVE-2024-1101")
	v, err := cve.ParseVersion("6.1.77")
	if err != nil {
		t.Fatal(err)
	}
	if state, _ := cve.StateAt(old.Dyads, v); state != cve.StateAffected || len(old.Files) != 0 || len(old.Dyads) != 2 || len(old.Scores) != 1 {
		t.Errorf("state %s of %+v", state, old)
	}
	want := "published, 2026/CVE-2026-1102.json: the CNA rejected this CVE (kept aside)\n" +
		"published, 2026/CVE-2026-1103.json: the record says \"CVE-2026-9999\" (kept aside)\n"
	if got := texts(s); got != want || s.Len() != 2 {
		t.Errorf("%d records, problems:\n%s", s.Len(), got)
	}
}

func TestSyncKeepsSnapshots(t *testing.T) {
	dir := t.TempDir()
	x, _, err := feed.Sync(dir, "testdata/published", "2026-08-21")
	if err != nil {
		t.Fatal(err)
	}
	if x.Name != "kernel-cna.jsonl.gz" || x.Records != 2 || x.Problems != 2 || len(x.SHA256) != 64 {
		t.Errorf("snapshot %+v", x)
	}
	if _, _, err := feed.Sync(dir, write(t, "debian.csv", "CVE-2026-1100,high\nCVE-2026-1100,\n"), "2026-08-20"); err != nil {
		t.Fatal(err)
	}
	s, err := feed.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	direct := feed.NewSet()
	if err := direct.Read("testdata/published", "2026-08-21"); err != nil {
		t.Fatal(err)
	}
	for _, id := range direct.IDs() {
		a, _ := direct.Record(id)
		b, _ := s.Record(id)
		a.CNA.File, b.Priorities = b.CNA.File, nil
		for i := range a.Scores {
			a.Scores[i].From = b.Scores[i].From
		}
		if d := cmp.Diff(a, b, cmp.Comparer(func(a, b cve.Version) bool { return a == b })); d != "" {
			t.Errorf("%s is another after Sync: %s", id, d)
		}
	}
	if r, _ := s.Record("CVE-2026-1100"); len(r.Priorities) != 1 || r.Priorities[0].From.Date != "2026-08-20" {
		t.Errorf("priorities: %+v", r.Priorities)
	}
	if _, _, err := feed.Sync(dir, "testdata/published", "2026-08-01"); fault.CodeOf(err) != "feed_older" {
		t.Errorf("an older snapshot: %v", err)
	}
	if _, _, err := feed.Sync(dir, write(t, "empty.jsonl", "?\n"), ""); fault.CodeOf(err) != "bad_feed" {
		t.Errorf("a feed without a good record: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "feeds", "store", "debian.csv"), []byte("CVE-2026-1100,low\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := feed.Load(dir); fault.CodeOf(err) != "feed_digest" {
		t.Errorf("a changed snapshot: %v", err)
	}
}

func TestTheWholeFeedOfTheKernelCNAIsRead(t *testing.T) {
	s := feed.NewSet()
	if err := s.Read(testkit.Shared(t, "cve", "cna-all.jsonl.gz"), ""); err != nil {
		t.Fatal(err)
	}
	scored := 0
	for _, id := range s.IDs() {
		if r, _ := s.Record(id); len(r.Scores) > 0 {
			scored++
		}
	}
	if s.Len() != 14626 || scored != 5456 || texts(s) != "" {
		t.Errorf("%d records, %d with a score, want 14626 and 5456; problems: %s", s.Len(), scored, texts(s))
	}
}

func BenchmarkReadCNA(b *testing.B) {
	name := testkit.Shared(b, "cve", "cna-all.jsonl.gz")
	b.ReportAllocs()
	for b.Loop() {
		if err := feed.NewSet().Read(name, ""); err != nil {
			b.Fatal(err)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add("a.jsonl", []byte(good+"\n{}\n"))
	f.Add("debian.csv", []byte("cve,priority\nCVE-2026-1000,high\n"))
	f.Add("a.toml", []byte("vendor = \"x\"\n[priority]\n\"CVE-2026-1000\" = \"low\"\n"))
	f.Add("a.json", []byte(`{"count":1,"vulnerabilities":[{"cveID":"CVE-2026-1000","dateAdded":"2026-01-01"}]}`))
	for _, name := range []string{"2026/CVE-2026-1100.json", "2024/CVE-2024-1101.json"} {
		b, err := os.ReadFile("testdata/published/" + name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add("a.json", b)
	}
	f.Fuzz(func(t *testing.T, name string, b []byte) {
		s := feed.NewSet()
		_ = feed.ReadBytes(s, name, b) // an error is a good answer
		for _, id := range s.IDs() {
			r, ok := s.Record(id)
			if _, err := cve.Parse(string(id)); err != nil || !ok {
				t.Errorf("record %q: %v", id, err)
			}
			for _, p := range r.Files {
				if filepath.IsAbs(p) || !filepath.IsLocal(p) {
					t.Errorf("path %q", p)
				}
			}
			for _, x := range r.Scores {
				if x.Value < 0 || x.Value > 10 {
					t.Errorf("score %v of %s", x.Value, x.Vector)
				}
			}
			if strings.ContainsAny(r.Title+r.Description, "\n\x1b\x00") {
				t.Errorf("control characters in %q", r.Title)
			}
		}
	})
}
