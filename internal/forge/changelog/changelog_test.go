// SPDX-License-Identifier: Apache-2.0

package changelog_test

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/changelog"
)

func parsed(t testing.TB, file string) []changelog.Upload {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	u, err := changelog.Parse(f, file)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// The example has every form that Debian's own changelog of linux 6.1 uses.
func TestEveryItemBecomesAChange(t *testing.T) {
	uploads := parsed(t, "testdata/changelog")
	if len(uploads) != 3 || uploads[0].Version != "6.1.12-1" || uploads[0].Source != "linux" || uploads[0].Suites != "bookworm-security" ||
		uploads[0].Date != "Fri, 16 Oct 2026 21:46:00 +0200" {
		t.Fatalf("uploads: %+v", uploads)
	}
	ids := func(s ...cve.ID) []cve.ID { return s }
	var want []changelog.Change
	add := func(version, stable, group, subject string, tags []string, cves []cve.ID) {
		want = append(want, changelog.Change{Subject: subject, Tags: tags, CVEs: cves, Stable: stable, Group: group, Version: version})
	}
	const v = "6.1.12-1"
	add(v, "", "", "New upstream stable update:", nil, nil)
	add(v, "6.1.11", "", "first: a subject that is so long that it is wrapped over two lines (twice)", nil, ids("CVE-2026-0001"))
	add(v, "6.1.11", "", "second: no CVE", []string{"x86"}, nil)
	add(v, "6.1.11", "", "third: several", []string{"arm64", "armhf"}, ids("CVE-2026-0002", "CVE-2026-123456"))
	add(v, "6.1.12", "", "Add mitigations for a thing:", []string{"amd64"}, ids("CVE-2026-0003"))
	add(v, "6.1.12", "Add mitigations for a thing:", "x86/thing: the first part", nil, ids("CVE-2026-0003"))
	add(v, "6.1.12", "Add mitigations for a thing:", "x86/thing: the second part", nil, ids("CVE-2026-0004", "CVE-2026-0003"))
	add(v, "6.1.12", "", "after the group: it does not inherit", nil, nil)
	add(v, "", "", "own: Debian's own change", nil, ids("CVE-2026-0005"))
	add(v, "", "", "Backport something:", nil, nil)
	add(v, "", "Backport something:", "net: part of the backport", nil, nil)
	if d := cmp.Diff(want, uploads[0].Changes); d != "" {
		t.Errorf("changes (-want +got):\n%s", d)
	}
}

func TestBetweenTakesTheUploadsAfterTheFirst(t *testing.T) {
	uploads := parsed(t, "testdata/changelog")
	in, err := changelog.Between(uploads, "6.1.8-1", "6.1.12-1")
	if err != nil {
		t.Fatal(err)
	}
	if len(in) != 2 || in[0].Version != "6.1.12-1" || in[1].Version != "6.1.10-1" {
		t.Errorf("uploads: %+v", in)
	}
	for _, c := range []struct {
		name, from, to string
		want           fault.Code
	}{
		{"the changelog is older than what is asked for", "6.1.8-1", "6.1.14-1", "no_upload"},
		{"the kernel's version is not one of Debian's", "6.1.9-1", "6.1.12-1", "no_upload"},
		{"backwards", "6.1.12-1", "6.1.8-1", "not_newer"},
		{"nothing between", "6.1.12-1", "6.1.12-1", "not_newer"},
		{"no version at all", "a b", "6.1.12-1", "bad_version"},
	} {
		if _, err := changelog.Between(uploads, c.from, c.to); fault.CodeOf(err) != c.want {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestAForeignTextIsRefused(t *testing.T) {
	bomb := func() string {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		for range 65 {
			if _, err := z.Write(bytes.Repeat([]byte("\n"), 1<<20)); err != nil {
				t.Fatal(err)
			}
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	for _, c := range []struct{ name, text, want string }{
		{"empty", "", "no upload"},
		{"something else", "<html>\n", "line 1: \"<html>\" comes before the first upload"},
		{"a line without end", "linux (6.1.1-1) sid; urgency=low\n\n  * " + strings.Repeat("x", 70_000), "token too long"},
		{"a version that is none", "linux (x:1) sid; urgency=low\n", "version"},
		{"cut gzip", "\x1f\x8b\x08", "unexpected EOF"},
		{"a small file that is large", bomb(), "over the limit"},
	} {
		_, err := changelog.Parse(strings.NewReader(c.text), "changelog")
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if fault.CodeOf(err) != "bad_changelog" {
			t.Errorf("%s: code %q", c.name, fault.CodeOf(err))
		}
	}
}

func FuzzParse(f *testing.F) {
	b, err := os.ReadFile("testdata/changelog")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("linux (1-1) sid; urgency=low\n    https://x/ChangeLog-6.1\n      + a:\n  [ N ]\n  - b\n * c (CVE-2026-0001):\n   + d\n -- A <a>  D\n  e\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		uploads, err := changelog.Parse(bytes.NewReader(b), "fuzz")
		if err != nil {
			return
		}
		named := map[cve.ID]bool{}
		for _, u := range uploads {
			for _, c := range u.Changes {
				if c.Version != u.Version {
					t.Errorf("change of %s says %s", u.Version, c.Version)
				}
				for _, id := range c.CVEs {
					named[id] = true
					if _, err := cve.Parse(string(id)); err != nil {
						t.Error(err)
					}
				}
			}
		}
		for id := range named {
			if !bytes.Contains(b, []byte(id)) && b[0] != 0x1f {
				t.Errorf("%s is not in the text", id)
			}
		}
	})
}

func BenchmarkParse(b *testing.B) {
	var text bytes.Buffer
	for u := range 200 {
		fmt.Fprintf(&text, "linux (6.1.%d-1) sid; urgency=low\n\n  * New upstream stable update:\n    https://x/ChangeLog-6.1.%d\n", 200-u, 200-u)
		for n := range 250 {
			fmt.Fprintf(&text, "    - [x86] area: a subject of the usual length, wrapped over two\n      lines (CVE-2026-%d)\n", 10_000+n)
		}
		text.WriteString("\n -- A <a@example.org>  Fri, 16 Oct 2026 21:46:00 +0200\n\n")
	}
	b.SetBytes(int64(text.Len()))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := changelog.Parse(bytes.NewReader(text.Bytes()), "bench"); err != nil {
			b.Fatal(err)
		}
	}
}
