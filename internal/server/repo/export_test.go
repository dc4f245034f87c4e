// SPDX-License-Identifier: Apache-2.0

package repo_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/server/archive"
	"klatch/internal/server/repo"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/testkit/tufsim"
)

// export writes what a mirror holds and opens it again.
func (m *mirror) export(now time.Time, f repo.Filter) (*archive.Archive, []byte) {
	m.t.Helper()
	var b bytes.Buffer
	if _, _, err := m.Export(m.t.Context(), &b, f, nil, now); err != nil {
		m.t.Fatal(err)
	}
	return m.archive(b.Bytes()), b.Bytes()
}

func (m *mirror) archive(b []byte) *archive.Archive {
	m.t.Helper()
	a, err := archive.Parse(bytes.NewReader(b), int64(len(b)), repo.Servable)
	if err != nil {
		m.t.Fatal(err)
	}
	return a
}

func (m *mirror) load(a *archive.Archive, now time.Time) (repo.Result, error) {
	return m.Import(m.t.Context(), a, m.rules, nil, now)
}

// TestAnExportIsAllThatIsNeeded: it goes into a server that never had a
// network, names what is not in it, and goes in again.
func TestAnExportIsAllThatIsNeeded(t *testing.T) {
	p := newLogging(t)
	p.release(start, 1)
	two := p.Release(start, nearby, 1, "CVE-2026-0001")
	outside, inside := newMirror(t, p.Publisher), newMirror(t, p.Publisher)
	inside.upstream = "http://127.0.0.1:1"
	if _, err := outside.sync(start); err != nil {
		t.Fatal(err)
	}
	a, _ := outside.export(start, repo.Filter{Kernels: []string{"6.1.0-50-*"}})
	if a.Publisher != "acme" || a.Has("targets/"+two) || !a.Has("metadata/timestamp.json") || !a.Has("metadata/1.root.json") {
		t.Errorf("%+v", a.Manifest)
	}
	for range 2 {
		r, err := inside.load(a, start)
		if err != nil || r.Livepatches != 1 || len(r.LeftOut) != 1 || r.LeftOut[0].Target != two || r.LeftOut[0].Why != repo.NotThere {
			t.Fatalf("%+v, %v", r, err)
		}
	}
	if log, err := inside.served(p.log); err != nil || log == nil {
		t.Errorf("the log did not come along: %v", err)
	}
	all, _ := outside.export(start, repo.Filter{})
	if r, err := inside.load(all, start); err != nil || r.Livepatches != 2 || len(r.LeftOut) != 0 || r.Copied != 1 {
		t.Errorf("the rest: %+v, %v", r, err)
	}
	// What the server has already need not be in the file.
	if r, err := inside.load(a, start); err != nil || r.Livepatches != 2 || len(r.LeftOut) != 0 {
		t.Errorf("less again: %+v, %v", r, err)
	}
}

// TestImportRefusesAndKeepsTheOldState: each is named, and the machines see
// what they saw.
func TestImportRefusesAndKeepsTheOldState(t *testing.T) {
	p := pubsim.New(t, "acme", start)
	one := p.Release(start, stock, 1, "CVE-2026-0001")
	outside := newMirror(t, p)
	sync := func(now time.Time) {
		t.Helper()
		if _, err := outside.sync(now); err != nil {
			t.Fatal(err)
		}
	}
	sync(start)
	old, _ := outside.export(start, repo.Filter{})
	p.Release(start.Add(time.Hour), stock, 2)
	sync(start.Add(time.Hour))
	_, good := outside.export(start.Add(time.Hour), repo.Filter{})

	foreign := pubsim.New(t, "foreign", start)
	foreign.Release(start, stock, 5)
	other := newMirror(t, foreign)
	if _, err := other.sync(start); err != nil {
		t.Fatal(err)
	}
	theirs, raw := other.export(start, repo.Filter{})
	renamed := bytes.Replace(raw, []byte(`"publisher":"foreign"`), []byte(`"publisher":"acme"`), 1)
	flipped := bytes.Clone(good)
	at := bytes.LastIndex(flipped, []byte("module"))
	flipped[at] ^= 1

	for _, tt := range []struct {
		name string
		a    *archive.Archive
		now  time.Time
		code fault.Code
	}{
		{"another publisher's", theirs, start, "import_foreign"},
		{"another publisher's under our name", other.archive(relength(t, renamed)), start, "metadata_untrusted"},
		{"older than what was seen", old, start.Add(2 * time.Hour), "metadata_rollback"},
		{"expired", other.archive(good), start.Add(72 * time.Hour), "metadata_expired"},
		{"a livepatch with a flipped bit", other.archive(flipped), start.Add(2 * time.Hour), "sync_broken"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inside := newMirror(t, p)
			if _, err := inside.load(old, start); err != nil {
				t.Fatal(err)
			}
			if tt.code == "metadata_rollback" { // it has seen the newer one
				if _, err := inside.load(other.archive(good), start.Add(time.Hour)); err != nil {
					t.Fatal(err)
				}
			}
			before := inside.targets()
			_, err := inside.load(tt.a, tt.now)
			if fault.CodeOf(err) != tt.code || fault.HintOf(err) == "" {
				t.Errorf("code %q, want %q: %v", fault.CodeOf(err), tt.code, err)
			}
			if inside.targets() != before || !strings.Contains(before, one) {
				t.Errorf("the fleet sees %q, before %q", inside.targets(), before)
			}
		})
	}
	if err := other.archive(flipped).Check(t.Context(), nil); fault.CodeOf(err) != "export_damaged" || !strings.Contains(err.Error(), "klatch_") {
		t.Errorf("the digest of the list: %v", err)
	}
}

// relength corrects the number in the first line.
func relength(t *testing.T, b []byte) []byte {
	t.Helper()
	line, rest, _ := bytes.Cut(b, []byte("\n"))
	end := bytes.Index(rest, []byte("]}")) + 2
	if !bytes.HasPrefix(line, []byte(archive.Format)) {
		t.Fatalf("%q", line)
	}
	return append([]byte(archive.Format+" "+strconv.Itoa(end)+"\n"), rest...)
}

// TestAGapInTheRootsIsNamed: an export from a server that began with a newer
// anchor lacks the roots in between.
func TestAGapInTheRootsIsNamed(t *testing.T) {
	p := pubsim.New(t, "acme", start)
	p.Release(start, stock, 1)
	for range 3 { // roots 2, 3 and 4
		old := p.Keys
		p.Keys.Snapshot.Signers = tufsim.Signers(time.Now().String()+"s", 1)
		p.Keys.Timestamp.Signers = tufsim.Signers(time.Now().String()+"t", 1)
		if err := p.Rekey(start, old); err != nil {
			t.Fatal(err)
		}
	}
	outside, inside := newMirror(t, p), newMirror(t, p)
	if _, err := outside.sync(start); err != nil {
		t.Fatal(err)
	}
	whole, _ := outside.export(start, repo.Filter{})
	for _, n := range []string{"2", "3"} {
		if err := os.Remove(filepath.Join(outside.dir, "metadata", n+".root.json")); err != nil {
			t.Fatal(err)
		}
	}
	// Such a server has root 4 in its anchor.
	newer := *p.Anchor
	newer.Root = p.Read("metadata/4.root.json")
	outside.anchor = &newer
	outside.reopen()
	short, _ := outside.export(start, repo.Filter{})
	if short.Has("metadata/3.root.json") || !short.Has("metadata/4.root.json") {
		t.Fatalf("%+v", short.Files)
	}
	_, err := inside.load(short, start)
	if fault.CodeOf(err) != "import_root_gap" || !strings.Contains(err.Error(), "trusts root 1") || !strings.Contains(err.Error(), "not in it: 2, 3") {
		t.Errorf("%v", err)
	}
	if r, err := inside.load(whole, start); err != nil || r.Livepatches != 1 {
		t.Errorf("with all roots: %+v, %v", r, err)
	}
	if _, err := inside.load(short, start); err != nil {
		t.Errorf("a server that knows root 4 already: %v", err)
	}
}

// TestNothingIsExportedThatIsNotWhole: a file that rotted here is named.
func TestNothingIsExportedThatIsNotWhole(t *testing.T) {
	p := pubsim.New(t, "acme", start)
	p.Release(start, stock, 1)
	m := newMirror(t, p)
	if _, _, err := m.Export(t.Context(), &bytes.Buffer{}, repo.Filter{}, nil, start); fault.CodeOf(err) != "repository_empty" || fault.HintOf(err) == "" {
		t.Errorf("an empty server: %v", err)
	}
	if _, err := m.sync(start); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.files("targets")[0], []byte("rotten"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := m.Export(t.Context(), &bytes.Buffer{}, repo.Filter{}, nil, start); fault.CodeOf(err) != "target_digest" {
		t.Errorf("%v", err)
	}
}
