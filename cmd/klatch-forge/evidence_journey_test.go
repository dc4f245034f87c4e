// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/evidence"
	"klatch/internal/forge/build"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/publish"
	"klatch/internal/forge/sign"
	"klatch/internal/testkit/evidencesim"
	"klatch/internal/trust"
)

// step runs klatch-forge and wants its exit status and words.
func step(t *testing.T, exit int, words []string, args ...string) string {
	t.Helper()
	out, said, got := program(t, args...)
	if got != exit {
		t.Fatalf("%q: exit status %d, want %d\n%s%s", args, got, exit, out, said)
	}
	for _, w := range words {
		if !strings.Contains(out+said, w) {
			t.Errorf("%q does not say %q:\n%s%s", args, w, out, said)
		}
	}
	return out
}

// TestLabIsASimpleJourneyThatSaysSo: one key, no command more than before, and
// nobody can take it for more than it is.
func TestLabIsASimpleJourneyThatSaysSo(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	step(t, 0, nil, "init", dir, "--profile", "lab")
	d, err := datadir.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, plan, err := evidencesim.Built(d, 1)
	if err != nil {
		t.Fatal(err)
	}
	release := string(evidencesim.Release)
	step(t, 3, []string{"(no_provenance)", "hint: build again"}, "--dir", dir, "sign", "--kernel", release)
	if err := evidencesim.Attested(d, b, plan, time.Now()); err != nil {
		t.Fatal(err)
	}
	loud := []string{"LAB", "one builder only", "no scenario ran on a real machine", "one key speaks in several roles: lab"}
	step(t, 0, loud, "--dir", dir, "sign", "--kernel", release)
	step(t, 0, nil, "--dir", dir, "publish")

	// From here on a stranger, who has the files and the anchor and may write
	// nothing.
	repository, anchor := filepath.Join(t.TempDir(), "copy"), filepath.Join(t.TempDir(), "trust.json")
	if err := os.CopyFS(repository, os.DirFS(d.Repository())); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(d.Anchor())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(anchor, content, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	before := listing(t, repository)
	step(t, 0, append(loud, "accepted", "CVE-2026-0001 (passed)", evidencesim.Author, "profile lab"), "evidence", "verify", repository, "--anchor", anchor)
	if after := listing(t, repository); after != before {
		t.Errorf("verify changed the copy:\n%s\n%s", before, after)
	}
	step(t, 3, []string{"no_livepatch"}, "evidence", "verify", repository, "--anchor", anchor, "--sequence", "7")
	step(t, 3, []string{"cannot read the anchor", "hint: "}, "evidence", "verify", repository, "--anchor", anchor+"x")
	step(t, 3, []string{"source_missing"}, "evidence", "verify", repository+"x", "--anchor", anchor)
}

func listing(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	if err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		content, err := os.ReadFile(p)
		b.WriteString(p + " " + string(content) + "\n")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestAnOldCopyIsCheckedAsOfItsOwnTime: expired metadata is refused, with the
// way to look at a copy that somebody kept.
func TestAnOldCopyIsCheckedAsOfItsOwnTime(t *testing.T) {
	d, err := datadir.Make(t.TempDir(), datadir.Policy{Publisher: "example.org", Profile: trust.Lab})
	if err != nil {
		t.Fatal(err)
	}
	then := time.Now().Add(-72 * time.Hour)
	if err := sign.MakeKeys(t.Context(), d, then); err != nil {
		t.Fatal(err)
	}
	b, plan, err := evidencesim.Built(d, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := evidencesim.Attested(d, b, plan, then); err != nil {
		t.Fatal(err)
	}
	if _, err := sign.Sign(d, b, then); err != nil {
		t.Fatal(err)
	}
	if _, err := publish.Publish(t.Context(), d, []build.Result{b}, then); err != nil {
		t.Fatal(err)
	}
	step(t, 3, []string{"metadata_expired", "--old-copy"}, "evidence", "verify", d.Repository(), "--anchor", d.Anchor())
	step(t, 0, []string{"OLD COPY", "accepted"}, "evidence", "verify", d.Repository(), "--anchor", d.Anchor(), "--old-copy")
}

// TestPeopleAndMachinesOfASmallPublisher: a reviewer and a second builder join
// by the commands of the how-to, their statements come from elsewhere.
func TestPeopleAndMachinesOfASmallPublisher(t *testing.T) {
	p := evidencesim.New(t) // profile full: everything is there
	dir, release := p.Dir.Path, string(evidencesim.Release)
	bob := filepath.Join(t.TempDir(), "bob")
	step(t, 0, nil, "init", bob, "--profile", "lab")
	line := strings.Fields(step(t, 0, []string{"evidence allow --role reviewer --name carol"}, "--dir", bob, "evidence", "key", "--role", "reviewer", "--name", "carol"))
	key := line[len(line)-1]

	folder := filepath.Join(t.TempDir(), "2")
	if err := os.CopyFS(folder, os.DirFS(filepath.Dir(p.Build.Module.Path))); err != nil {
		t.Fatal(err)
	}
	step(t, 0, []string{evidencesim.Author, "+++ b/net/f1.c", "replaces vmlinux:f"}, "--dir", bob, "review", "--from", folder)
	step(t, 0, []string{"rejected", "2 source patches"}, "--dir", bob, "review", "--from", folder, "--as", "carol", "--reject", "--comment", "leaks")
	statement := filepath.Join(folder, "evidence", "reviewer-carol.json")
	step(t, 3, []string{"(unknown_signer)", "evidence allow"}, "--dir", dir, "evidence", "add", "--kernel", release, statement)
	step(t, 0, []string{"carol may sign"}, "--dir", dir, "evidence", "allow", "--role", "reviewer", "--name", "carol", "--also", "carol@example.org", key)
	step(t, 0, []string{"reviewer by carol"}, "--dir", dir, "evidence", "add", "--kernel", release, statement)
	step(t, 3, []string{"(review_rejected)", "leaks"}, "--dir", dir, "sign", "--kernel", release)
	step(t, 3, []string{"(review_rejected)"}, "--dir", dir, "evidence", "show", "--kernel", release)
	step(t, 0, []string{"approved"}, "--dir", bob, "review", "--from", folder, "--as", "carol", "--approve")
	step(t, 0, nil, "--dir", dir, "evidence", "add", "--kernel", release, statement)
	step(t, 0, []string{"bob, carol"}, "--dir", dir, "evidence", "show", "--kernel", release)
	step(t, 0, []string{"builder-1, builder-b"}, "--dir", dir, "sign", "--kernel", release)
	step(t, 0, nil, "--dir", dir, "publish")
	out := step(t, 0, nil, "evidence", "verify", p.Dir.Repository(), "--anchor", p.Dir.Anchor(), "--json")
	var says struct {
		Accepted bool
		Answer   struct {
			Livepatches []struct{ Evidence evidence.Report }
		}
	}
	if err := json.Unmarshal([]byte(out), &says); err != nil {
		t.Fatal(err)
	}
	if n := len(says.Answer.Livepatches); !says.Accepted || n != 2 || len(says.Answer.Livepatches[1].Evidence.Reviewers) != 2 {
		t.Errorf("%s", out)
	}
	// A statement about another build is not taken.
	step(t, 3, []string{"(other_module)"}, "--dir", dir, "evidence", "add", "--kernel", release,
		filepath.Join(build.Dir(dir, evidencesim.Release, 1), "evidence", "reviewer-bob.json"))
	// The author reviews nothing, and is told so at once.
	step(t, 0, []string{"you are the author", "does not count"}, "--dir", dir, "review", "--kernel", release, "--as", evidencesim.Alice, "--approve")
	step(t, 2, []string{"--as"}, "--dir", dir, "review", "--kernel", release, "--approve")
}
