// SPDX-License-Identifier: Apache-2.0

//go:build vm

package kerneltree_test

import (
	"compress/gzip"
	"io"
	"os"
	"regexp"
	"slices"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/changelog"
	"klatch/internal/testkit/kerneltest"
)

// The archive's real changelog: every CVE that its text names is in a change,
// and nothing else is.
func TestTheChangelogOfANewerVersionKnowsTheKernelsOwn(t *testing.T) {
	k := kerneltest.Prepared(t)
	m, version := k.Maker, k.Entry.SourceV
	file, of, err := m.Changelog(t.Context(), "linux-source-6.1", version)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	uploads, err := changelog.Parse(f, file)
	if err != nil {
		t.Fatal(err)
	}
	if uploads[0].Version != of || uploads[0].Source != "linux" {
		t.Errorf("the newest upload is %s %s, taken from %s", uploads[0].Source, uploads[0].Version, of)
	}
	if !slices.ContainsFunc(uploads, func(u changelog.Upload) bool { return u.Version == version }) {
		t.Errorf("the changelog of %s has no %s", of, version)
	}
	named, withStable := map[cve.ID]bool{}, 0
	for _, u := range uploads {
		for _, c := range u.Changes {
			for _, id := range c.CVEs {
				named[id] = true
			}
			if c.Stable != "" {
				withStable++
			}
			if c.Subject == "" {
				t.Errorf("%s: a change without subject: %+v", u.Version, c)
			}
		}
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range regexp.MustCompile(`CVE-[0-9]{4}-[0-9]+`).FindAll(text, -1) {
		if !named[cve.ID(b)] {
			t.Errorf("the text names %s, no change does", b)
		}
	}
	if len(uploads) < 200 || len(named) < 3000 || withStable < 20_000 {
		t.Errorf("%d uploads, %d CVEs named, %d changes of stable updates: less than the changelog of 2026 has", len(uploads), len(named), withStable)
	}
	if _, _, err := m.Changelog(t.Context(), "linux-source-6.1", "6.1.99999-1"); fault.CodeOf(err) != "no_version" {
		t.Errorf("a version that nobody has: %v", err)
	}
}
