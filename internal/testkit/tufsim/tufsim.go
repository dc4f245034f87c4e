// SPDX-License-Identifier: Apache-2.0

// Package tufsim is a publisher with a TUF repository for tests, and the
// attacks on it: it holds all keys, so it can sign what no honest publisher
// would, and its web server can lie about any file. Tests only.
package tufsim

import (
	"crypto"
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/durable"
	"klatch/internal/tufrepo"
)

// Repo is a publisher's repository in a temporary folder.
type Repo struct {
	Dir  string
	Keys tufrepo.Keys
	Root []byte // for the trust anchor
	t    testing.TB
	seed string
	mu   sync.Mutex
	lies map[string]http.HandlerFunc
}

// New makes a repository: root and targets two of three keys, the online roles
// one of one. Keys follow from seed, so two repositories of one test differ.
func New(t testing.TB, seed string, now time.Time) *Repo {
	t.Helper()
	r := &Repo{Dir: t.TempDir(), t: t, seed: seed, lies: map[string]http.HandlerFunc{}}
	r.Keys = tufrepo.Keys{
		Root:      tufrepo.Role{Signers: Signers(seed+"root", 3), Threshold: 2},
		Targets:   tufrepo.Role{Signers: Signers(seed+"targets", 3), Threshold: 2},
		Snapshot:  tufrepo.Role{Signers: Signers(seed+"snapshot", 1), Threshold: 1},
		Timestamp: tufrepo.Role{Signers: Signers(seed+"timestamp", 1), Threshold: 1},
	}
	var err error
	if r.Root, err = tufrepo.Init(t.Context(), r.Dir, r.Keys, now); err != nil {
		t.Fatal(err)
	}
	return r
}

// Delegate adds a release role: two of three keys.
func (r *Repo) Delegate(now time.Time, distro, arch string) {
	r.t.Helper()
	keys := Signers(r.seed+distro+arch, 3)
	r.Keys.Release.Signers = append(r.Keys.Release.Signers, keys...)
	role := tufrepo.ReleaseRole{Distro: distro, Arch: arch, Threshold: 2}
	for _, k := range keys {
		role.Keys = append(role.Keys, k.Public())
	}
	if _, err := tufrepo.Publish(r.t.Context(), r.Dir, tufrepo.Publication{Roles: []tufrepo.ReleaseRole{role}}, r.Keys, now); err != nil {
		r.t.Fatal(err)
	}
}

// Rekey replaces the keys of snapshot and timestamp by those in r.Keys, with a
// new root. The old ones are with a thief, and are not used.
func (r *Repo) Rekey(now time.Time, old tufrepo.Keys) error {
	c := tufrepo.Change{Add: map[string][]crypto.PublicKey{}, Remove: map[string][]string{}}
	for role, pair := range map[string][2]crypto.Signer{
		"snapshot":  {r.Keys.Snapshot.Signers[0], old.Snapshot.Signers[0]},
		"timestamp": {r.Keys.Timestamp.Signers[0], old.Timestamp.Signers[0]},
	} {
		id, err := tufrepo.KeyID(pair[1].Public())
		if err != nil {
			return err
		}
		c.Add[role], c.Remove[role] = []crypto.PublicKey{pair[0].Public()}, []string{id}
	}
	honest, err := tufrepo.Prepare(r.t.Context(), r.Dir, c, now)
	if err != nil {
		return err
	}
	_, err = tufrepo.Complete(r.t.Context(), r.Dir, honest, r.Keys, now)
	return err
}

// At is a repository that somebody else made, to read and forge in.
func At(t testing.TB, dir string) *Repo {
	return &Repo{Dir: dir, t: t, lies: map[string]http.HandlerFunc{}}
}

// Signers makes n Ed25519 keys from a seed.
func Signers(seed string, n int) []crypto.Signer {
	var keys []crypto.Signer
	for i := range n {
		b := make([]byte, ed25519.SeedSize)
		copy(b, fmt.Sprintf("%d %s", i, seed))
		keys = append(keys, ed25519.NewKeyFromSeed(b))
	}
	return keys
}

// Publish adds targets.
func (r *Repo) Publish(now time.Time, targets ...tufrepo.Target) tufrepo.Result {
	r.t.Helper()
	res, err := tufrepo.Publish(r.t.Context(), r.Dir, tufrepo.Publication{Targets: targets}, r.Keys, now)
	if err != nil {
		r.t.Fatal(err)
	}
	return res
}

// Read gives a file of the repository.
func (r *Repo) Read(name string) []byte {
	r.t.Helper()
	b, err := durable.ReadFile(filepath.Join(r.Dir, name), 64<<20)
	if err != nil {
		r.t.Fatal(err)
	}
	return b
}

// Write replaces a file of the repository.
func (r *Repo) Write(name string, b []byte) {
	r.t.Helper()
	if err := os.MkdirAll(filepath.Dir(filepath.Join(r.Dir, name)), 0o750); err != nil {
		r.t.Fatal(err)
	}
	if err := durable.WriteFile(filepath.Join(r.Dir, name), b, 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// Forge reads a signed file, lets change alter it, signs it with the signers
// given and writes it to name.
func Forge[T metadata.Roles](r *Repo, from, to string, signers []crypto.Signer, change func(*T)) {
	r.t.Helper()
	m := &metadata.Metadata[T]{}
	if err := json.Unmarshal(r.Read(from), m); err != nil {
		r.t.Fatal(err)
	}
	change(&m.Signed)
	m.ClearSignatures()
	for _, s := range signers {
		hash := crypto.Hash(0) // as Ed25519 wants it
		if _, is := s.Public().(ed25519.PublicKey); !is {
			hash = crypto.SHA256
		}
		loaded, err := signature.LoadSigner(s, hash)
		if err != nil {
			r.t.Fatal(err)
		}
		if _, err := m.Sign(loaded); err != nil {
			r.t.Fatal(err)
		}
	}
	b, err := m.ToBytes(false)
	if err != nil {
		r.t.Fatal(err)
	}
	r.Write(to, b)
}

// Lie answers requests for one path, such as "/metadata/timestamp.json", with
// a handler; nil tells the truth again.
func (r *Repo) Lie(path string, h http.HandlerFunc) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h == nil {
		delete(r.lies, path)
		return
	}
	r.lies[path] = h
}

// Serve starts a web server over the repository and returns its address.
func (r *Repo) Serve() string {
	s := httptest.NewServer(r.Handler())
	r.t.Cleanup(s.Close)
	return s.URL
}

// Handler serves the repository, lies included.
func (r *Repo) Handler() http.Handler {
	files := http.FileServer(http.Dir(r.Dir))
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		r.mu.Lock()
		lie := r.lies[q.URL.Path]
		r.mu.Unlock()
		if lie != nil {
			lie(w, q)
			return
		}
		files.ServeHTTP(w, q)
	})
}

// Forget ends all lies.
func (r *Repo) Forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.lies)
}
