// SPDX-License-Identifier: Apache-2.0

package repo_test

import (
	"bytes"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/server/blob/fsblob"
	"klatch/internal/server/repo"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/trust"
	"klatch/internal/tufclient"
	"klatch/internal/tufrepo"
)

var (
	start  = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	stock  = pubsim.Kernel("6.1.0-50-cloud-amd64", 1)
	nearby = pubsim.Kernel("6.1.0-51-cloud-amd64", 2)
)

// quiet throws logs away.
var quiet = slog.New(slog.DiscardHandler)

// mirror is a server's copy and the publisher's web server.
type mirror struct {
	*repo.Repo
	dir, data, upstream string
	rules               repo.Rules
	t                   *testing.T
	p                   *pubsim.Publisher
	anchor              *trust.Anchor
}

func newMirror(t *testing.T, p *pubsim.Publisher) *mirror {
	data := t.TempDir()
	m := &mirror{dir: filepath.Join(data, "repository"), data: data, upstream: p.Serve(), t: t, p: p, anchor: p.Anchor}
	m.reopen()
	return m
}

func (m *mirror) reopen() {
	m.Repo = repo.New(fsblob.New(m.dir), filepath.Join(m.data, "upstream"), m.anchor, quiet)
}

func (m *mirror) sync(now time.Time) (repo.Result, error) {
	return m.Sync(m.t.Context(), repo.Source{BaseURL: m.upstream, Client: http.DefaultClient, Rules: m.rules}, now)
}

// serve gives the address of a web server over the copy.
func (m *mirror) serve() string {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) { m.Handler().ServeHTTP(w, q) }))
	m.t.Cleanup(s.Close)
	return s.URL
}

// machine is what a machine sees in the copy.
func (m *mirror) machine(now time.Time) (*tufclient.Snapshot, error) {
	return tufclient.Refresh(m.t.Context(), tufclient.Config{Root: m.p.Root, Dir: m.t.TempDir(), BaseURL: m.serve(), Now: now})
}

func (m *mirror) targets() string {
	var list []string
	for _, e := range m.Catalog().Entries {
		list = append(list, e.Target)
	}
	return strings.Join(list, " ")
}

func TestSyncServesWhatThePublisherSigned(t *testing.T) {
	p := pubsim.New(t, "acme", start)
	one := p.Release(start, stock, 1, "CVE-2026-0001")
	two := p.Release(start, stock, 2, "CVE-2026-0001", "CVE-2026-0002")
	p.Release(start, nearby, 1, "CVE-2026-0001")
	m := newMirror(t, p)
	r, err := m.sync(start)
	if err != nil || !r.Changed || r.Copied != 3 || r.Livepatches != 3 {
		t.Fatalf("%+v, %v", r, err)
	}
	if got := m.targets(); !strings.HasPrefix(got, two+" "+one+" ") {
		t.Errorf("catalog %s", got)
	}
	if r, err = m.sync(start.Add(time.Minute)); err != nil || r.Changed || r.Copied != 0 {
		t.Errorf("nothing new: %+v, %v", r, err)
	}
	s, err := m.machine(start)
	if err != nil {
		t.Fatal(err)
	}
	for _, target := range s.Targets() {
		if _, err := s.Download(t.Context(), target, 1<<20); err != nil {
			t.Error(err)
		}
	}

	// A restart reads the files again; so does a server that lost everything
	// but the folder, and one whose publisher has been silent for too long.
	m.reopen()
	if !m.Changed(t.Context()) {
		t.Error("a fresh catalog looks current")
	}
	for _, now := range []time.Time{start, start.Add(100 * 24 * time.Hour)} {
		if err := m.Load(t.Context(), now); err != nil || len(m.Catalog().Entries) != 3 {
			t.Errorf("at %s: %+v, %v", now, m.Catalog(), err)
		}
	}
	if want := start.Add(tufrepo.TimestampLife); !m.Catalog().Expires.Equal(want) || m.Changed(t.Context()) {
		t.Errorf("expires %s, want %s", m.Catalog().Expires, want)
	}
}

func TestSyncRefusesAndKeepsTheOldState(t *testing.T) {
	later := start.Add(time.Hour)
	foreign := pubsim.New(t, "foreign", start)
	for _, tt := range []struct {
		name   string
		attack func(p *pubsim.Publisher)
		want   fault.Code
	}{
		{"a file with a flipped bit", func(p *pubsim.Publisher) {
			_, b := p.Bundle(stock, 2)
			good := b.Encode()
			path := p.Release(later, stock, 2)
			lieAbout(p, path, func([]byte) []byte { good[len(good)/2] ^= 1; return good })
		}, "sync_broken"},
		{"a truncated file", func(p *pubsim.Publisher) {
			lieAbout(p, p.Release(later, stock, 2), func(b []byte) []byte { return b[:len(b)/2] })
		}, "sync_broken"},
		{"a manifest by another publisher", func(p *pubsim.Publisher) {
			m, b := foreign.Bundle(stock, 2)
			p.Publish(later, tufrepo.Target{Path: m.TargetPath(), Content: b.Encode()})
		}, "sync_broken"},
		{"a module of another manifest", func(p *pubsim.Publisher) {
			m, b := p.Bundle(stock, 2)
			_, other := p.Bundle(nearby, 2)
			b.Module = other.Module
			p.Publish(later, tufrepo.Target{Path: m.TargetPath(), Content: b.Encode()})
		}, "sync_broken"},
		{"a livepatch of the neighbor kernel under this one's name", func(p *pubsim.Publisher) {
			m, _ := p.Bundle(stock, 2)
			_, b := p.Bundle(nearby, 2)
			p.Publish(later, tufrepo.Target{Path: m.TargetPath(), Content: b.Encode()})
		}, "sync_broken"},
		{"no bundle at all", func(p *pubsim.Publisher) {
			m, _ := p.Bundle(stock, 2)
			p.Publish(later, tufrepo.Target{Path: m.TargetPath(), Content: []byte("hello")})
		}, "sync_broken"},
		{"another publisher's repository", func(p *pubsim.Publisher) {
			foreign.Release(start, stock, 2)
			p.Write("metadata/timestamp.json", foreign.Read("metadata/timestamp.json"))
		}, "metadata_untrusted"},
		{"a publisher who is asleep", func(*pubsim.Publisher) {}, "metadata_expired"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := pubsim.New(t, "acme", start)
			one := p.Release(start, stock, 1, "CVE-2026-0001")
			m := newMirror(t, p)
			if _, err := m.sync(start); err != nil {
				t.Fatal(err)
			}
			good := p.Release(later, nearby, 7)
			tt.attack(p)
			now := later
			if tt.want == "metadata_expired" {
				now = start.Add(72 * time.Hour)
			}
			r, err := m.sync(now)
			if fault.CodeOf(err) != tt.want {
				t.Errorf("code %q, want %q: %v", fault.CodeOf(err), tt.want, err)
			}
			if tt.want == "sync_broken" && (len(r.Broken) != 1 || r.Copied < 1) {
				t.Errorf("result %+v; %s should have been copied", r, good)
			}
			if got := m.targets(); got != one {
				t.Errorf("catalog %q, want %q", got, one)
			}
			if s, err := m.machine(start); err != nil || len(s.Targets()) != 1 {
				t.Errorf("a machine sees %v, %v", s, err)
			}
		})
	}
}

func lieAbout(p *pubsim.Publisher, path string, change func([]byte) []byte) {
	matches, err := filepath.Glob(filepath.Join(p.Dir, "targets", filepath.Dir(path), "*."+filepath.Base(path)))
	if err != nil || len(matches) != 1 {
		panic(err)
	}
	name, err := filepath.Rel(p.Dir, matches[0])
	if err != nil {
		panic(err)
	}
	b := change(bytes.Clone(p.Read(name)))
	p.Lie("/"+name, func(w http.ResponseWriter, _ *http.Request) { w.Write(b) })
}

func TestSyncCompletesWhatAFailedRunBegan(t *testing.T) {
	p := pubsim.New(t, "acme", start)
	p.Release(start, stock, 1)
	p.Release(start, nearby, 1)
	path := p.Release(start, stock, 2)
	lieAbout(p, path, func(b []byte) []byte { return b[1:] })
	m := newMirror(t, p)
	if _, err := m.sync(start); fault.CodeOf(err) != "sync_broken" {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(m.dir, "metadata", "timestamp.json")); err == nil {
		t.Error("the copy was switched")
	}
	p.Forget()
	m.reopen()
	r, err := m.sync(start)
	if err != nil || r.Kept != 2 || r.Copied != 1 || !r.Changed {
		t.Errorf("%+v, %v", r, err)
	}
	// A file that rots in the copy is named, and the next sync mends it.
	name, err := filepath.Glob(filepath.Join(m.dir, "targets", "*", "*", "*", "*.klatch_2.lpb"))
	if err != nil || len(name) != 1 {
		t.Fatal(name, err)
	}
	if err := os.WriteFile(name[0], []byte("rotten"), 0o600); err != nil {
		t.Fatal(err)
	}
	m.reopen()
	if err := m.Load(t.Context(), start); err != nil || len(m.Catalog().Problems) != 1 || len(m.Catalog().Entries) != 2 {
		t.Errorf("%+v, %v", m.Catalog(), err)
	}
	if r, err := m.sync(start); err != nil || r.Copied != 1 || len(m.Catalog().Problems) != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestHandlerServesOnlyTheRepository(t *testing.T) {
	p := pubsim.New(t, "acme", start)
	p.Release(start, stock, 1)
	m := newMirror(t, p)
	if _, err := m.sync(start); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{
		"/metadata/timestamp.json": 200, "/metadata/1.root.json": 200,
		"/metadata/": 404, "/metadata": 404, "/targets/": 404, "/.lock": 404, "/metadata/.tmp-1": 404,
		"/metadata/../.lock": 404, "/metadata/9.root.json": 404, "/targets/debian-12": 404, "/../klatch.db": 404,
	} {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.URL.Path = path
		m.Handler().ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("%s: %d, want %d", path, w.Code, want)
		}
	}
}
