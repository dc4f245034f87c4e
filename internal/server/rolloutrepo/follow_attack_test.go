// SPDX-License-Identifier: Apache-2.0

package rolloutrepo_test

import (
	"crypto"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/keyfile"
	"klatch/internal/rollout"
	"klatch/internal/tufrepo"
)

// The server above is a thief's, or broken: the old state stays, and why is
// said.
func TestAttackOnAFollowedRollout(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		attack func(t *testing.T, a *above, old string)
		code   fault.Code
	}{
		"rolled back": {func(_ *testing.T, a *above, old string) { a.dir = old }, "metadata_rollback"},
		"of another operator": {func(t *testing.T, a *above, _ string) {
			thief := newServer(t, rollout.Small)
			thief.release(stock, 2)
			a.dir = thief.Dir()
		}, "metadata_untrusted"},
		"without an operator's repository": {func(t *testing.T, a *above, _ string) { a.dir = t.TempDir() }, "metadata_unavailable"},
		"not there":                        {func(_ *testing.T, a *above, _ string) { a.stop() }, "metadata_unavailable"},
		"frozen":                           {func(_ *testing.T, a *above, _ string) { a.now = a.now.Add(40 * 24 * time.Hour) }, "metadata_expired"},
		"with a changed selection": {func(t *testing.T, a *above, _ string) {
			a.release(stock, 3)
			a.lie = func(w http.ResponseWriter, q *http.Request) bool {
				lies := strings.Contains(q.URL.Path, "/targets/select/")
				if lies {
					w.Write([]byte("{}"))
				}
				return lies
			}
		}, "target_digest"},
		"without a selection that it signed": {func(t *testing.T, a *above, _ string) {
			a.release(stock, 3)
			a.lie = func(w http.ResponseWriter, q *http.Request) bool {
				lies := strings.Contains(q.URL.Path, "/targets/select/")
				if lies {
					http.NotFound(w, q)
				}
				return lies
			}
		}, "target_missing"},
	} {
		t.Run("Attack/R/followed tiers "+name, func(t *testing.T) {
			t.Parallel()
			a := newAbove(t, rollout.Small)
			a.release(stock, 1)
			old := filepath.Join(t.TempDir(), "old")
			if err := os.CopyFS(old, os.DirFS(a.Dir())); err != nil {
				t.Fatal(err)
			}
			a.now = a.now.Add(time.Hour)
			a.release(stock, 2)
			b := a.below()
			if err := b.copy(a); err != nil {
				t.Fatal(err)
			}
			served, now := tree(t, b.Dir()), b.now
			tt.attack(t, a, old)
			err := b.copy(a)
			if fault.CodeOf(err) != tt.code || fault.HintOf(err) == "" || !strings.Contains(err.Error(), "the old ones stay") {
				t.Errorf("%v, hint %q, want %s", err, fault.HintOf(err), tt.code)
			}
			if tree(t, b.Dir()) != served {
				t.Error("what is served has changed")
			}
			b.now = now
			b.wants("klatch_2", "not_selected")
		})
	}
}

// What is signed and cannot be read is not taken: this server could not say
// what a tier runs. Who holds the keys of the server above can sign it.
func TestSignedFilesThatCannotBeReadAreNotFollowed(t *testing.T) {
	t.Parallel()
	a := newAbove(t, rollout.Lab)
	a.release(stock, 1)
	b := a.below()
	if err := b.copy(a); err != nil {
		t.Fatal(err)
	}
	served := tree(t, filepath.Join(b.Dir(), "metadata"))
	s, err := a.State()
	if err != nil {
		t.Fatal(err)
	}
	good, err := s.Selections[0].Encode()
	if err != nil {
		t.Fatal(err)
	}
	key := func(name string) crypto.Signer {
		k, err := keyfile.Open(filepath.Join(a.data, "rollout-keys", name+"-1.key"))
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	one := func(names ...string) tufrepo.Role {
		r := tufrepo.Role{Threshold: 1}
		for _, n := range names {
			r.Signers = append(r.Signers, key(n))
		}
		return r
	}
	keys := tufrepo.Keys{Targets: one("targets"), Release: one("select", "promotion"), Snapshot: one("snapshot"), Timestamp: one("timestamp")}
	a.dir = filepath.Join(t.TempDir(), "rollout")
	if err := os.CopyFS(a.dir, os.DirFS(a.Dir())); err != nil {
		t.Fatal(err)
	}
	var before []string
	for _, tt := range []struct {
		path    string
		content []byte
		code    fault.Code
	}{
		{"select/canary/x.json", []byte("{}"), "selection_malformed"},
		{"select/canary/x.json", good, "target_path"},
		{"promotion/stable/x.json", []byte("{}"), "promotion_malformed"},
		{rollout.TiersPath, []byte("{}"), "tiers_malformed"},
	} {
		a.now = a.now.Add(time.Hour)
		repository := tufrepo.Repository{Dir: a.dir}
		p := tufrepo.Publication{Targets: []tufrepo.Target{{Path: tt.path, Content: tt.content, Replace: true}}}
		if len(before) > 0 && before[0] != tt.path {
			p.Withdraw = before
		}
		if _, err := repository.Publish(t.Context(), p, keys, a.now); err != nil {
			t.Fatal(err)
		}
		before = []string{tt.path}
		if err := b.copy(a); fault.CodeOf(err) != tt.code {
			t.Errorf("%s: %v, want %s", tt.path, err, tt.code)
		}
		if tree(t, filepath.Join(b.Dir(), "metadata")) != served {
			t.Errorf("%s: what is served has changed", tt.path)
		}
		b.wants("klatch_1", "not_selected")
	}
}
