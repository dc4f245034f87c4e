// SPDX-License-Identifier: Apache-2.0

package rolloutrepo_test

import (
	"crypto/sha256"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/rollout"
	"klatch/internal/server/repo"
	"klatch/internal/server/rolloutdraft"
	. "klatch/internal/server/rolloutrepo"
	"klatch/internal/tufclient"
	"klatch/internal/tufrepo"
)

// above is a server whose tiers others follow; what it serves can be replaced.
type above struct {
	*server
	URL  string
	dir  string
	lie  func(w http.ResponseWriter, q *http.Request) bool
	stop func()
}

func newAbove(t *testing.T, profile rollout.Profile) *above {
	a := &above{server: newServer(t, profile)}
	a.dir = a.Dir()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if a.lie == nil || !a.lie(w, q) {
			http.StripPrefix("/rollout", repo.Files(a.dir)).ServeHTTP(w, q)
		}
	}))
	t.Cleanup(web.Close)
	a.URL, a.stop = web.URL, web.Close
	return a
}

// below is a server that follows it.
func (a *above) below() *server {
	a.t.Helper()
	b := &server{t: a.t, data: a.t.TempDir(), now: a.now, released: a.released}
	if _, err := Adopt(a.t.Context(), b.data, a.encoded()); err != nil {
		a.t.Fatal(err)
	}
	b.Repo = b.follow(a)
	return b
}

func (s *server) encoded() []byte {
	s.t.Helper()
	b, err := s.Anchor().Encode()
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

func (s *server) follow(a *above) *Repo {
	s.t.Helper()
	r, err := Follow(s.data, a.URL, slog.New(slog.DiscardHandler))
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

// copy is one round of the copy.
func (s *server) copy(a *above) error {
	s.t.Helper()
	s.now, s.released = a.now, a.released
	f, err := s.Fetch(s.t.Context(), a.URL, http.DefaultClient, s.now)
	if err == nil {
		_, err = f.Install(s.t.Context())
	}
	return err
}

// wants says what machines of the two tiers decide by this server.
func (s *server) wants(canary, stable string) {
	s.t.Helper()
	for tier, want := range map[string]string{"canary": canary, "stable": stable} {
		c, err := s.decide(tier, stock)
		got := string(c.Code)
		if c.Class == rollout.Take {
			got = c.Sequence.ModuleName()
		}
		if err != nil || got != want {
			s.t.Errorf("%s: %q, %v, want %q", tier, got, err, want)
		}
	}
}

func TestACopyFollowsTheTiersAboveAndChangesNone(t *testing.T) {
	t.Parallel()
	a := newAbove(t, rollout.Small)
	one := a.release(stock, 1)
	b := a.below()
	if _, err := b.State(); fault.CodeOf(err) != "rollout_not_copied" || fault.HintOf(err) == "" || b.Offered("canary", one) {
		t.Errorf("before the first copy: %v", err)
	}
	if changed, err := b.Update(t.Context(), a.released, a.now); changed || err != nil {
		t.Error(changed, err)
	}
	if err := b.copy(a); err != nil {
		t.Fatal(err)
	}
	b.wants("klatch_1", "not_selected")
	if !b.Offered("canary", one) || b.Offered("stable", one) {
		t.Error("what is offered is not what the tiers run")
	}
	second := b.follow(a) // as a running serve, while another process copies

	d, err := a.promote(Promotion{Tier: "stable", All: true, Urgent: true})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		if _, err := d.Sign(a.Anchor(), a.key([]string{"promotion-1", "promotion-2"}[i])); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Complete(t.Context(), "anna", d, a.now); err != nil {
		t.Fatal(err)
	}
	b.wants("klatch_1", "not_selected")
	if err := b.copy(a); err != nil {
		t.Fatal(err)
	}
	b.wants("klatch_1", "klatch_1")
	if second.Offered("stable", one) {
		t.Error("read before it was told to")
	}
	if changed, err := second.Update(t.Context(), nil, a.now); !changed || err != nil || !second.Offered("stable", one) {
		t.Errorf("%t, %v", changed, err)
	}
	if err := a.Hold(t.Context(), "anna", "stable", "a freeze", a.now); err != nil {
		t.Fatal(err)
	}
	if err := b.copy(a); err != nil {
		t.Fatal(err)
	}
	b.wants("klatch_1", "held")
	s, err := b.State()
	if err != nil || s.Holds["stable"] != "a freeze" || len(s.Holds) != 1 || len(s.Promotions) != 1 || b.Offered("stable", one) {
		t.Errorf("%+v, %v", s, err)
	}

	before := tree(t, b.data)
	for name, change := range map[string]func() error{
		"promote": func() error { _, err := b.promote(Promotion{Tier: "stable", All: true}); return err },
		"order": func() error {
			_, err := b.Order(t.Context(), "x", func(t rollout.Tiers) (rollout.Tiers, error) { return t.Remove("stable") }, "x", b.now)
			return err
		},
		"keys": func() error {
			_, err := b.Keys(t.Context(), "x", tufrepo.Change{Renew: []string{"root"}}, b.now)
			return err
		},
		"hold":     func() error { return b.Hold(t.Context(), "x", "canary", "x", b.now) },
		"release":  func() error { return b.Hold(t.Context(), "x", "stable", "", b.now) },
		"complete": func() error { return b.Complete(t.Context(), "x", &rolloutdraft.Draft{}, b.now) },
	} {
		if err := change(); fault.CodeOf(err) != "rollout_upstream" || !strings.Contains(fault.HintOf(err), a.URL) {
			t.Errorf("%s: %v, hint %q", name, err, fault.HintOf(err))
		}
	}
	if after := tree(t, b.data); after != before {
		t.Error("a refused change wrote something")
	}
}

// tree is what a folder holds.
func tree(t *testing.T, dir string) string {
	t.Helper()
	h := sha256.New()
	err := fs.WalkDir(os.DirFS(dir), ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(filepath.Join(dir, path))
		h.Write([]byte(path + "\x00" + string(b) + "\x00"))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(h.Sum(nil))
}

// A copy that was broken off shows the old state, and the next one ends it.
func TestACopyThatWasBrokenOffShowsTheOldState(t *testing.T) {
	t.Parallel()
	a := newAbove(t, rollout.Lab)
	a.release(stock, 1)
	b := a.below()
	if err := b.copy(a); err != nil {
		t.Fatal(err)
	}
	timestamp := filepath.Join(b.Dir(), "metadata", "timestamp.json")
	old, err := os.ReadFile(timestamp)
	if err != nil {
		t.Fatal(err)
	}
	a.release(stock, 2)
	stale, err := b.Fetch(t.Context(), a.URL, http.DefaultClient, a.now)
	if err != nil {
		t.Fatal(err)
	}
	b.released = a.released
	b.wants("klatch_1", "not_selected") // fetched and not in force
	a.now = a.now.Add(time.Hour)
	a.release(stock, 3)
	if err := b.copy(a); err != nil {
		t.Fatal(err)
	}
	b.wants("klatch_3", "not_selected")
	if changed, err := stale.Install(t.Context()); changed || err != nil {
		t.Errorf("what another process brought was undone: %t, %v", changed, err)
	}
	b.wants("klatch_3", "not_selected")

	// A file that cannot be written keeps the timestamp out.
	a.release(stock, 4)
	names, err := filepath.Glob(filepath.Join(a.Dir(), "metadata", "*.snapshot.json"))
	if err != nil {
		t.Fatal(err)
	}
	var blocked []string
	for _, n := range names {
		n = filepath.Join(b.Dir(), "metadata", filepath.Base(n))
		if err := os.Mkdir(n, 0o700); err == nil {
			blocked = append(blocked, n)
		}
	}
	if err := b.copy(a); err == nil || len(blocked) == 0 {
		t.Fatalf("%v, blocked %q", err, blocked)
	}
	b.wants("klatch_3", "not_selected")
	for _, n := range blocked {
		if err := os.Remove(n); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.copy(a); err != nil {
		t.Fatal(err)
	}
	b.wants("klatch_4", "not_selected")

	// All files of the new state, and the timestamp of the old one.
	if err := os.WriteFile(timestamp, old, 0o600); err != nil {
		t.Fatal(err)
	}
	b.now = a.now.Add(-time.Hour)
	b.Repo = b.follow(a)
	b.wants("klatch_1", "not_selected")
	if s, err := b.State(); err != nil || len(s.Selections) != 1 || s.Selections[0].Sequence != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	if err := b.copy(a); err != nil {
		t.Fatal(err)
	}
	b.wants("klatch_4", "not_selected")
}

// What is carried over an air gap is all that a copy is made of, and what does
// not verify is not carried.
func TestFilesOfARolloutAreACopy(t *testing.T) {
	t.Parallel()
	a := newAbove(t, rollout.Small)
	a.release(stock, 1)
	b := a.below()
	if err := b.copy(a); err != nil {
		t.Fatal(err)
	}
	for name, from := range map[string]*server{"its own": a.server, "a copy": b} {
		files, err := from.Files(t.Context(), a.now)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		carried := t.TempDir()
		for path, content := range files {
			if !repo.Exportable(path) {
				t.Errorf("%s: %s cannot be exported", name, path)
			}
			path = filepath.Join(carried, path)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		c := a.below()
		f, err := c.Fetch(t.Context(), "file://localhost", &http.Client{Transport: tufclient.DirTransport(carried)}, a.now)
		if err == nil {
			_, err = f.Install(t.Context())
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		c.wants("klatch_1", "not_selected")
	}
	if _, err := a.Files(t.Context(), a.now.Add(40*24*time.Hour)); fault.CodeOf(err) != "metadata_expired" {
		t.Errorf("expired: %v", err)
	}
	for _, name := range []string{"rollout/log/00000000/checkpoint", "rollout/left-out.json", "rollout/rollout/metadata/timestamp.json", "rollout/../metadata/timestamp.json", "rollout-keys/select-1.key"} {
		if repo.Exportable(name) {
			t.Errorf("%s can be exported", name)
		}
	}
}

func TestAServerFollowsOneOperator(t *testing.T) {
	t.Parallel()
	a, other := newAbove(t, rollout.Small), newAbove(t, rollout.Small)
	one := a.release(stock, 1)
	if _, err := Adopt(t.Context(), a.data, other.encoded()); fault.CodeOf(err) != "rollout_exists" || fault.HintOf(err) == "" {
		t.Errorf("a server with an operator of its own: %v", err)
	}
	if _, err := Adopt(t.Context(), t.TempDir(), []byte("{}")); fault.CodeOf(err) != "rollout_anchor_malformed" {
		t.Error(err)
	}
	if _, err := Follow(t.TempDir(), "", slog.New(slog.DiscardHandler)); fault.CodeOf(err) != "rollout_anchor_lost" || fault.HintOf(err) == "" {
		t.Error(err)
	}
	b := a.below()
	if err := b.copy(a); err != nil {
		t.Fatal(err)
	}
	if _, err := Adopt(t.Context(), b.data, a.encoded()); err != nil || !b.follow(a).Offered("canary", one) {
		t.Errorf("the same anchor again: %v", err)
	}
	stale, err := b.Fetch(t.Context(), a.URL, http.DefaultClient, a.now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Adopt(t.Context(), b.data, other.encoded()); err != nil {
		t.Fatal(err)
	}
	if changed, err := stale.Install(t.Context()); changed || err != nil {
		t.Errorf("tiers of the operator before were installed: %t, %v", changed, err)
	}
	b.Repo = b.follow(other)
	if _, err := b.State(); fault.CodeOf(err) != "rollout_not_copied" || b.Offered("canary", one) {
		t.Errorf("of the operator before: %v", err)
	}
	if err := b.copy(other); err != nil {
		t.Fatal(err)
	}
	b.wants("not_selected", "not_selected")
}
