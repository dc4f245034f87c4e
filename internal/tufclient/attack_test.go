// SPDX-License-Identifier: Apache-2.0

package tufclient_test

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/fault"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/tufclient"
	"klatch/internal/tufrepo"
)

var start = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

const (
	timestampPath = "/metadata/timestamp.json"
	firstPath     = "debian-12/amd64/6.1.0-50/klatch_1.lpb"
)

// client is one machine's view of a repository.
type client struct {
	t   *testing.T
	cfg tufclient.Config
}

func newClient(t *testing.T, r *tufsim.Repo) *client {
	return &client{t, tufclient.Config{Root: r.Root, Dir: filepath.Join(t.TempDir(), "tuf"), BaseURL: r.Serve(), Now: start, Timeout: 2 * time.Second}}
}

func (c *client) refresh(now time.Time) (*tufclient.Snapshot, error) {
	c.cfg.Now = now
	return tufclient.Refresh(c.t.Context(), c.cfg)
}

func (c *client) mustRefresh(now time.Time) *tufclient.Snapshot {
	c.t.Helper()
	s, err := c.refresh(now)
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

func serve(b []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.Write(b) }
}

func endless(w http.ResponseWriter, r *http.Request) {
	junk := bytes.Repeat([]byte("a"), 64<<10)
	for r.Context().Err() == nil {
		if _, err := w.Write(junk); err != nil {
			return
		}
	}
}

func drip(w http.ResponseWriter, r *http.Request) {
	for {
		select {
		case <-r.Context().Done():
			return
		case <-time.After(50 * time.Millisecond):
			if _, err := w.Write([]byte("{")); err != nil {
				return
			}
			if err := http.NewResponseController(w).Flush(); err != nil {
				return
			}
		}
	}
}

// TestAttack/M: the client has accepted a repository once; then its server
// turns evil. Each time the client says why, and keeps what it had.
func TestAttack(t *testing.T) {
	target := func(n string) tufrepo.Target {
		return tufrepo.Target{Path: "debian-12/amd64/6.1.0-50/" + n + ".lpb", Content: []byte(n), Custom: json.RawMessage(`{"sequence":1}`)}
	}
	later := start.Add(time.Hour)
	for _, tt := range []struct {
		name   string
		attack func(c *client, r *tufsim.Repo)
		now    time.Time
		want   fault.Code
	}{
		{"freeze: the same timestamp for ever", func(*client, *tufsim.Repo) {}, start.Add(tufrepo.TimestampLife + time.Second), "metadata_expired"},
		{"a new timestamp that is expired already", func(_ *client, r *tufsim.Repo) {
			r.Publish(later, target("klatch_2"))
			tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", r.Keys.Timestamp.Signers, func(m *metadata.TimestampType) { m.Expires = start })
		}, later, "metadata_expired"},
		{"a snapshot that is expired already", func(_ *client, r *tufsim.Repo) {
			r.Publish(later, target("klatch_2"))
			tufsim.Forge(r, "metadata/2.snapshot.json", "metadata/2.snapshot.json", r.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) { m.Expires = start })
			tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", r.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
				m.Meta["snapshot.json"] = &metadata.MetaFiles{Version: 2}
			})
		}, later, "metadata_expired"},
		{"an old timestamp again", func(c *client, r *tufsim.Repo) {
			old := r.Read("metadata/timestamp.json")
			r.Publish(later, target("klatch_2"))
			c.mustRefresh(later)
			r.Write("metadata/timestamp.json", old)
		}, later, "metadata_rollback"},
		{"a new timestamp that names an old snapshot", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", r.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
				m.Version = 9
				m.Meta["snapshot.json"] = &metadata.MetaFiles{Version: 0}
			})
		}, later, "metadata_rollback"},
		{"a new snapshot that names old targets", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/1.snapshot.json", "metadata/2.snapshot.json", r.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
				m.Version = 2
				m.Meta["targets.json"] = &metadata.MetaFiles{Version: 0}
			})
			tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", r.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
				m.Version = 9
				m.Meta["snapshot.json"] = &metadata.MetaFiles{Version: 2}
			})
		}, later, "metadata_rollback"},
		{"timestamp by a foreign key", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", tufsim.Signers("evil", 1), func(m *metadata.TimestampType) { m.Version = 9 })
		}, later, "metadata_untrusted"},
		{"timestamp by the snapshot key", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", r.Keys.Snapshot.Signers, func(m *metadata.TimestampType) { m.Version = 9 })
		}, later, "metadata_untrusted"},
		{"root by one key of two", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/1.root.json", "metadata/2.root.json", r.Keys.Root.Signers[:1], func(m *metadata.RootType) { m.Version = 2 })
		}, later, "metadata_untrusted"},
		{"root that skips a version", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/1.root.json", "metadata/2.root.json", r.Keys.Root.Signers, func(m *metadata.RootType) { m.Version = 3 })
		}, later, "metadata_rollback"},
		{"targets by one key of two", func(_ *client, r *tufsim.Repo) { forgeTargets(r, 1) }, later, "metadata_untrusted"},
		{"mix and match: targets of another moment", func(_ *client, r *tufsim.Repo) {
			r.Publish(later, target("klatch_2"))
			r.Write("metadata/2.targets.json", r.Read("metadata/1.targets.json"))
		}, later, "metadata_untrusted"},
		{"mix and match: snapshot of another moment", func(_ *client, r *tufsim.Repo) {
			r.Publish(later, target("klatch_2"))
			r.Write("metadata/2.snapshot.json", r.Read("metadata/1.snapshot.json"))
		}, later, "metadata_untrusted"},
		{"wrong version inside the file name", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/1.snapshot.json", "metadata/2.snapshot.json", r.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) { m.Version = 1 })
			tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", r.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
				m.Version = 9
				m.Meta["snapshot.json"] = &metadata.MetaFiles{Version: 2}
			})
		}, later, "metadata_rollback"},
		{"snapshot in the place of the timestamp", func(_ *client, r *tufsim.Repo) {
			r.Write("metadata/timestamp.json", r.Read("metadata/1.snapshot.json"))
		}, later, "metadata_malformed"},
		{"endless timestamp", func(_ *client, r *tufsim.Repo) { r.Lie(timestampPath, endless) }, later, "metadata_malformed"},
		{"endless root", func(_ *client, r *tufsim.Repo) { r.Lie("/metadata/2.root.json", endless) }, later, "metadata_malformed"},
		{"slow drip", func(_ *client, r *tufsim.Repo) { r.Lie(timestampPath, drip) }, later, "metadata_unavailable"},
		{"truncated timestamp", func(_ *client, r *tufsim.Repo) {
			b := r.Read("metadata/timestamp.json")
			r.Lie(timestampPath, serve(b[:len(b)/2]))
		}, later, "metadata_malformed"},
		{"empty timestamp", func(_ *client, r *tufsim.Repo) { r.Lie(timestampPath, serve(nil)) }, later, "metadata_malformed"},
		{"timestamp that names no snapshot", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", r.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
				m.Version, m.Meta = 9, map[string]*metadata.MetaFiles{}
			})
		}, later, "metadata_malformed"},
		{"no timestamp", func(_ *client, r *tufsim.Repo) { r.Lie(timestampPath, http.NotFound) }, later, "metadata_unavailable"},
		{"server error instead of a new root", func(_ *client, r *tufsim.Repo) {
			r.Lie("/metadata/2.root.json", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) })
		}, later, "metadata_unavailable"},
		{"our clock goes back", func(*client, *tufsim.Repo) {}, start.Add(-time.Hour), "clock_back"},
	} {
		t.Run("M/"+tt.name, func(t *testing.T) {
			t.Parallel()
			r := tufsim.New(t, "good", start)
			r.Publish(start, target("klatch_1"))
			c := newClient(t, r)
			c.mustRefresh(start)
			tt.attack(c, r)
			_, err := c.refresh(tt.now)
			if fault.CodeOf(err) != tt.want {
				t.Errorf("code %q, want %q: %v", fault.CodeOf(err), tt.want, err)
			}
		})
	}
}

// forgeTargets publishes a new list of targets, signed by the first n keys,
// under a snapshot and a timestamp that are in order: the online keys are
// stolen, those of the targets are not.
func forgeTargets(r *tufsim.Repo, n int) {
	tufsim.Forge(r, "metadata/1.targets.json", "metadata/2.targets.json", r.Keys.Targets.Signers[:n], func(m *metadata.TargetsType) { m.Version = 2 })
	tufsim.Forge(r, "metadata/1.snapshot.json", "metadata/2.snapshot.json", r.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
		m.Version = 2
		m.Meta["targets.json"] = &metadata.MetaFiles{Version: 2}
	})
	tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", r.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
		m.Version = 9
		m.Meta["snapshot.json"] = &metadata.MetaFiles{Version: 2}
	})
}

// TestAttackOnTargets: the metadata is right, the file is not.
func TestAttackOnTargets(t *testing.T) {
	content := bytes.Repeat([]byte("livepatch "), 1000)
	for _, tt := range []struct {
		name string
		lie  http.HandlerFunc
		want fault.Code
	}{
		{"one flipped bit", serve(append([]byte{content[0] ^ 1}, content[1:]...)), "target_digest"},
		{"truncated", serve(content[:5000]), "target_digest"},
		{"longer", serve(append(bytes.Clone(content), 'x')), "target_digest"},
		{"endless", endless, "target_digest"},
		{"slow drip", drip, "metadata_unavailable"},
		{"missing", http.NotFound, "target_missing"},
		{"server error", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(502) }, "metadata_unavailable"},
	} {
		t.Run("Attack/M/"+tt.name, func(t *testing.T) {
			t.Parallel()
			r := tufsim.New(t, "good", start)
			r.Publish(start, tufrepo.Target{Path: firstPath, Content: content})
			c := newClient(t, r)
			s := c.mustRefresh(start)
			first := s.Targets()[0]
			if b, err := s.Download(t.Context(), first, 1<<20); err != nil || !bytes.Equal(b, content) {
				t.Fatal(err)
			}
			r.Lie("/targets/"+tufclient.BlobPath(first), tt.lie)
			if b, err := s.Download(t.Context(), first, 1<<20); fault.CodeOf(err) != tt.want || b != nil {
				t.Errorf("code %q, want %q: %v", fault.CodeOf(err), tt.want, err)
			}
		})
	}
}

func TestDownloadKeepsTheCallersLimitAndTheSignedList(t *testing.T) {
	r := tufsim.New(t, "good", start)
	r.Publish(start, tufrepo.Target{Path: firstPath, Content: []byte("0123456789")})
	s := newClient(t, r).mustRefresh(start)
	first := s.Targets()[0]
	if _, err := s.Download(t.Context(), first, 9); fault.CodeOf(err) != "metadata_malformed" {
		t.Errorf("over the caller's limit: %v", err)
	}
	other := first
	other.SHA256 = "00" + first.SHA256[2:]
	if _, err := s.Download(t.Context(), other, 100); fault.CodeOf(err) != "target_digest" {
		t.Errorf("target with another digest: %v", err)
	}
	other.Path = "debian-12/amd64/6.1.0-50/klatch_9.lpb"
	if _, err := s.Download(t.Context(), other, 100); fault.CodeOf(err) != "target_missing" {
		t.Errorf("target not in the list: %v", err)
	}
}

func TestRefreshFollowsTheRepository(t *testing.T) {
	r := tufsim.New(t, "good", start)
	c := newClient(t, r)
	if _, err := c.refresh(start); fault.CodeOf(err) != "metadata_unavailable" {
		t.Errorf("nothing published: %v", err)
	}
	r.Publish(start, tufrepo.Target{Path: firstPath, Content: []byte("1"), Custom: json.RawMessage(`{"sequence":1}`)})
	s := c.mustRefresh(start)
	if ts := s.Targets(); len(ts) != 1 || ts[0].Path != firstPath || ts[0].Bytes != 1 || string(ts[0].Custom) != `{"sequence":1}` {
		t.Errorf("targets %+v", ts)
	}
	// A new root by the same keys, then a new publication, seen in one look.
	tufsim.Forge(r, "metadata/1.root.json", "metadata/2.root.json", r.Keys.Root.Signers, func(m *metadata.RootType) { m.Version = 2 })
	r.Publish(start.Add(time.Hour), tufrepo.Target{Path: "a/b", Content: []byte("2")})
	if s = c.mustRefresh(start.Add(time.Hour)); len(s.Targets()) != 2 || s.Root != 2 {
		t.Errorf("root %d, targets %+v", s.Root, s.Targets())
	}
	var names []string
	for _, f := range s.Files() {
		names = append(names, f.Name)
	}
	if got := strings.Join(names, " "); got != "1.root.json 2.root.json 2.targets.json 2.snapshot.json timestamp.json" {
		t.Errorf("files %s", got)
	}
	// A repository in a folder says the same.
	base, hc, err := tufclient.Source(r.Dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	c.cfg.BaseURL, c.cfg.Client = base, hc
	s = c.mustRefresh(start.Add(time.Hour))
	if b, err := s.Download(t.Context(), s.Targets()[0], 10); err != nil || string(b) != "2" {
		t.Error(string(b), err)
	}
}

func TestNewAnchorStartsAgain(t *testing.T) {
	r, other := tufsim.New(t, "one", start), tufsim.New(t, "two", start)
	r.Publish(start, tufrepo.Target{Path: "a", Content: []byte("1")})
	other.Publish(start, tufrepo.Target{Path: "b", Content: []byte("1")})
	c := newClient(t, r)
	c.mustRefresh(start)
	c.cfg.BaseURL = other.Serve()
	if _, err := c.refresh(start.Add(time.Hour)); fault.CodeOf(err) != "metadata_untrusted" {
		t.Errorf("another publisher under the old anchor: %v", err)
	}
	c.cfg.Root = other.Root
	if s := c.mustRefresh(start.Add(time.Hour)); s.Targets()[0].Path != "b" {
		t.Errorf("targets %+v", s.Targets())
	}
}

func TestDirTransportStaysInside(t *testing.T) {
	dir := t.TempDir()
	inside := filepath.Join(dir, "repo")
	if err := os.MkdirAll(inside, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../secret", filepath.Join(inside, "link")); err != nil {
		t.Fatal(err)
	}
	c := http.Client{Transport: tufclient.DirTransport(inside)}
	for _, p := range []string{"/../secret", "/link", "/..%2fsecret", "/"} {
		a, err := c.Get("file://localhost" + p)
		if err == nil && a.StatusCode == http.StatusOK {
			t.Errorf("%s was served", p)
		}
		if err == nil {
			a.Body.Close()
		}
	}
	for _, from := range []string{"ftp://x/", "http://", "https://user:secret@host/", filepath.Join(dir, "nothing"), filepath.Join(dir, "secret")} {
		if _, _, err := tufclient.Source(from, nil); err == nil {
			t.Errorf("source %q was taken", from)
		}
	}
}
