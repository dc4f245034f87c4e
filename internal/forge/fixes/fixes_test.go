// SPDX-License-Identifier: Apache-2.0

package fixes_test

import (
	"encoding/csv"
	"os"
	"slices"
	"strings"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/changelog"
	"klatch/internal/forge/feed"
	"klatch/internal/forge/fixes"
	"klatch/internal/testkit"
)

const debian = `linux (6.1.20-1) bookworm-security; urgency=high

  * New upstream stable update:
    https://www.kernel.org/pub/linux/kernel/v6.x/ChangeLog-6.1.19
    - net: both know (CVE-2026-0001)
    - [x86] kvm: only the changelog knows (CVE-2026-0002)
    - mm: by the CNA it was never there (CVE-2026-0003)
    - fs: by the CNA it was fixed before (CVE-2026-0004)
    - lib: a subject without CVE
    https://www.kernel.org/pub/linux/kernel/v6.x/ChangeLog-6.1.20
    - [x86] bugs: named by its title only
  * crypto: Debian's own (CVE-2026-0005)

 -- A <a@example.org>  Fri, 16 Oct 2026 21:46:00 +0200

linux (6.1.15-1) bookworm; urgency=medium

  * block: Debian was faster than stable (CVE-2026-0008)

 -- A <a@example.org>  Fri, 02 Oct 2026 21:46:00 +0200

linux (6.1.10-1) bookworm; urgency=medium

  * net: taken before (CVE-2026-0006)

 -- A <a@example.org>  Fri, 25 Sep 2026 21:46:00 +0200
`

// records in the form of the feed: CVE, title, file, dyads.
var records = [][]string{
	{"CVE-2026-0001", "net: both know", "net/core/a.c", "5.10:aaaaaa1:6.1.19:bbbbbb1", "5.10:aaaaaa1:6.3:bbbbbb2"},
	{"CVE-2026-0003", "mm: x", "mm/a.c", "6.2:aaaaaa1:6.3:bbbbbb2"},
	{"CVE-2026-0004", "fs: x", "fs/a.c", "5.10:aaaaaa1:6.1.9:bbbbbb1"},
	{"CVE-2026-0005", "crypto: x", "crypto/a.c", "5.10:aaaaaa1:6.1.30:bbbbbb1", "5.10:aaaaaa1:6.3:bbbbbb2"},
	{"CVE-2026-0006", "net: taken before", "net/b.c", "5.10:aaaaaa1:6.1.12:bbbbbb1"},
	{"CVE-2026-0007", "x86/bugs: named by its title only", "arch/x86/a.c", "5.10:aaaaaa1:6.1.20:bbbbbb7", "5.10:aaaaaa1:6.3:bbbbbb2"},
	{"CVE-2026-0008", "block: x", "block/a.c", "5.10:aaaaaa1:6.1.17:bbbbbb1"},
	{"CVE-2026-0009", "fs: of no interest, it is fixed later", "fs/b.c", "5.10:aaaaaa1:6.1.40:bbbbbb1"},
	{"CVE-2026-0010", "fs: nobody names it, upstream has it", "fs/c.c", "5.10:aaaaaa1:6.1.14:bbbbbb1"},
}

func set(t *testing.T) *feed.Set {
	t.Helper()
	var b strings.Builder
	for _, r := range records {
		b.WriteString(`{"cve":"` + r[0] + `","title":"` + r[1] + `","files":["` + r[2] + `"],"dyad":["` + strings.Join(r[3:], `","`) + `"]}` + "\n")
	}
	name := t.TempDir() + "/cna.jsonl"
	if err := os.WriteFile(name, []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	s := feed.NewSet()
	if err := s.Read(name, "2026-10-20"); err != nil {
		t.Fatal(err)
	}
	if listed, _ := s.Problems(); len(listed) > 0 {
		t.Fatal(listed)
	}
	return s
}

func TestChangelogAndCNAAreJoined(t *testing.T) {
	uploads, err := changelog.Parse(strings.NewReader(debian), "changelog")
	if err != nil {
		t.Fatal(err)
	}
	d, err := fixes.Between(uploads, set(t), "6.1.10-1", "6.1.20-1")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(d.Uploads, []string{"6.1.20-1", "6.1.15-1"}) || len(d.Changes) != 9 {
		t.Errorf("uploads %v, %d changes", d.Uploads, len(d.Changes))
	}
	for i, want := range []struct {
		id       cve.ID
		by       fixes.Knowledge
		upload   string
		fixedIn  string
		subject  string
		noData   bool
		status   cve.Status
		disagree fixes.DisagreementKind
	}{
		{"CVE-2026-0001", fixes.ByBoth, "6.1.20-1", "6.1.19", "net: both know", false, cve.Affected, ""},
		{"CVE-2026-0002", fixes.ByChangelog, "6.1.20-1", "", "kvm: only the changelog knows", true, cve.Affected, ""},
		{"CVE-2026-0003", fixes.ByChangelog, "6.1.20-1", "", "mm: by the CNA it was never there", false, cve.NotAffected, fixes.NotPresent},
		{"CVE-2026-0004", fixes.ByChangelog, "6.1.20-1", "6.1.9", "fs: by the CNA it was fixed before", false, cve.Affected, fixes.FixedBefore},
		{"CVE-2026-0005", fixes.ByChangelog, "6.1.20-1", "", "crypto: Debian's own", false, cve.Affected, fixes.StillOpen},
		{"CVE-2026-0006", fixes.ByCNA, "6.1.15-1", "6.1.12", "", false, cve.Fixed, fixes.FixedEarlier},
		{"CVE-2026-0007", fixes.ByCNA, "6.1.20-1", "6.1.20", "bugs: named by its title only", false, cve.Affected, ""},
		{"CVE-2026-0008", fixes.ByBoth, "6.1.15-1", "6.1.17", "block: Debian was faster than stable", false, cve.Affected, fixes.OtherUpload},
		{"CVE-2026-0010", fixes.ByCNA, "6.1.15-1", "6.1.14", "", false, cve.Affected, ""},
	} {
		if i >= len(d.Fixes) {
			t.Fatalf("%d fixes, want %s too", len(d.Fixes), want.id)
		}
		f := d.Fixes[i]
		var subject string
		if len(f.Changes) > 0 {
			subject = f.Changes[0].Subject
		}
		var disagree fixes.DisagreementKind
		if f.Disagreement != nil {
			disagree = f.Disagreement.Kind
		}
		if f.CVE != want.id || f.KnownBy != want.by || f.Upload != want.upload || f.FixedIn != want.fixedIn || subject != want.subject ||
			f.NoData() != want.noData || f.Status != want.status || disagree != want.disagree || f.Title == "" {
			t.Errorf("got %+v (disagreement %+v)\nwant %+v", f, f.Disagreement, want)
		}
	}
	if d.Fixes[6].Commit != "bbbbbb7" {
		t.Errorf("commit on the stable line: %q", d.Fixes[6].Commit)
	}
	if len(d.Fixes) != 9 {
		t.Errorf("%d fixes, want 9", len(d.Fixes))
	}
}

func TestVersionsMustBeOfOneLine(t *testing.T) {
	text := "linux (6.12.1-1) sid; urgency=low\n\n  * a\n\n" + debian
	uploads, err := changelog.Parse(strings.NewReader(text), "changelog")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fixes.Between(uploads, feed.NewSet(), "6.1.10-1", "6.12.1-1"); fault.CodeOf(err) != "other_series" {
		t.Errorf("another line: %v", err)
	}
	for debian, want := range map[string]string{"6.1.170-3": "6.1.170", "6.1.52-1~bpo11+1": "6.1.52", "2:6.1.4-1": "6.1.4", "5.19~rc4-1~exp1": "5.19-rc4"} {
		if v, err := fixes.Upstream(debian); err != nil || v.String() != want {
			t.Errorf("%s: %s, %v", debian, v, err)
		}
	}
	if _, err := fixes.Upstream("1:2"); err == nil {
		t.Error("1:2 has an upstream version")
	}
}

// The shared list holds, of Debian's real changelog, the first upload that
// names each CVE, and the point release that the kernel CNA says: two sources
// made by different people.
func TestDyadsAndDebiansChangelogNameTheSameUpload(t *testing.T) {
	f, err := os.Open(testkit.Shared(t, "cve", "debian_bookworm_fixed.csv"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	records := feed.NewSet()
	if err := records.Read(testkit.Shared(t, "cve", "cna-all.jsonl.gz"), ""); err != nil {
		t.Fatal(err)
	}
	byVersion := map[string]*changelog.Upload{}
	expected := map[cve.ID]string{}
	for _, r := range rows[1:] {
		v := r[1]
		if byVersion[v] == nil {
			byVersion[v] = &changelog.Upload{Source: "linux", Version: v}
		}
		byVersion[v].Changes = append(byVersion[v].Changes, changelog.Change{Subject: "about " + r[0], CVEs: []cve.ID{cve.ID(r[0])}, Version: v})
		if r[2] != "" {
			expected[cve.ID(r[0])] = r[2]
		}
	}
	var uploads []changelog.Upload
	for _, u := range byVersion {
		uploads = append(uploads, *u)
	}
	slices.SortFunc(uploads, func(a, b changelog.Upload) int {
		c, err := changelog.Compare(b.Version, a.Version)
		if err != nil {
			t.Fatal(err)
		}
		return c
	})
	i := slices.IndexFunc(uploads, func(u changelog.Upload) bool { return strings.HasPrefix(u.Version, "6.0.") })
	if i < 0 {
		i = slices.IndexFunc(uploads, func(u changelog.Upload) bool { return !strings.HasPrefix(u.Version, "6.1.") })
	}
	// The upload before the line begins stands for the kernel that has nothing.
	line := append(slices.Clone(uploads[:i]), changelog.Upload{Source: "linux", Version: "6.1-1~exp1"})
	d, err := fixes.Between(line, records, "6.1-1~exp1", line[0].Version)
	if err != nil {
		t.Fatal(err)
	}
	both, same := 0, 0
	for _, f := range d.Fixes {
		if expected[f.CVE] == "" {
			continue
		}
		both++
		if f.FixedIn == "" { // of several origins on this line one has no fix; such a CVE is not counted as the same
			t.Logf("%s: by the CNA the newest version lacks a fix: %s", f.CVE, f.Reason)
			continue
		}
		if f.FixedIn != expected[f.CVE] {
			t.Errorf("%s: fixed in %q, the list says %s", f.CVE, f.FixedIn, expected[f.CVE])
		}
		if f.Upload == f.UpstreamUpload {
			same++
			continue
		}
		// The other way round would mean that the changelog forgot a CVE and named it at a wrong upload.
		if c, err := changelog.Compare(f.Upload, f.UpstreamUpload); err != nil || c > 0 {
			t.Errorf("%s: named in %s, upstream's fix came with %s: %v", f.CVE, f.Upload, f.UpstreamUpload, err)
		}
		t.Logf("%s: Debian took it in %s, stable has it since %s (%s)", f.CVE, f.Upload, f.FixedIn, f.UpstreamUpload)
	}
	t.Logf("%d CVEs in both sources, %d in the same upload; %d fixes in %d uploads", both, same, len(d.Fixes), len(line)-1)
	if both != len(expected) || both < 500 || same*1000 < both*990 {
		t.Errorf("%d of the list's %d CVEs found, %d in the same upload, want all and 99 %%", both, len(expected), same)
	}
}
