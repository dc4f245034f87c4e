// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/testkit/tufsim"
)

// sim is a repository as the suite's own cases want one: a single key for each
// role, metadata that is altered in memory and then published, and a list of
// what was asked for. Package tufsim is for repositories of package tufrepo,
// whose shape is narrower.
type sim struct {
	*runner
	root      *metadata.Metadata[metadata.RootType]
	timestamp *metadata.Metadata[metadata.TimestampType]
	snapshot  *metadata.Metadata[metadata.SnapshotType]
	lists     map[string]*metadata.Metadata[metadata.TargetsType]
	signers   map[string][]crypto.Signer
	hashes    bool              // timestamp and snapshot name digests and lengths
	made      int               // keys
	ids       map[string]string // of altered keys, by what go-tuf signs as

	mu    sync.Mutex
	pub   map[string][][]byte // what is served, by role; version 1 first
	files map[string][]byte   // what is served for a target
	asked []string            // "root 2", "timestamp"
	sent  []string            // paths below targets/
}

func newSim(t *testing.T) *sim {
	until := time.Now().UTC().Truncate(time.Second).AddDate(0, 0, 60)
	s := &sim{
		runner: newRunner(t), root: metadata.Root(until), timestamp: metadata.Timestamp(until), snapshot: metadata.Snapshot(until),
		lists:   map[string]*metadata.Metadata[metadata.TargetsType]{"targets": metadata.Targets(until)},
		signers: map[string][]crypto.Signer{}, ids: map[string]string{}, pub: map[string][][]byte{}, files: map[string][]byte{},
	}
	s.root.Signed.Version, s.timestamp.Signed.Version, s.snapshot.Signed.Version, s.lists["targets"].Signed.Version = 0, 0, 0, 0
	for _, role := range []string{"root", "timestamp", "snapshot", "targets"} {
		s.addKey(role, s.key())
	}
	s.publish("root", "targets", "snapshot", "timestamp")
	s.url = serve(t, s)
	return s
}

// begin shows the client the first root.
func (s *sim) begin() { s.t.Helper(); s.init(s.pub["root"][0]) }

func (s *sim) key() crypto.Signer {
	s.made++
	return tufsim.Signers("sim", s.made)[s.made-1]
}

func (s *sim) check(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *sim) public(k crypto.Signer) *metadata.Key {
	p, err := metadata.KeyFromPublicKey(k.Public())
	s.check(err)
	return p
}

// addKey gives a top role one more key, which signs from now on.
func (s *sim) addKey(role string, k crypto.Signer) {
	s.check(s.root.Signed.AddKey(s.public(k), role))
	s.signers[role] = append(s.signers[role], k)
}

// addAltered gives a top role a key that is written otherwise than go-tuf does
// it, under the name that follows from that.
func (s *sim) addAltered(role string, k crypto.Signer, alter func(*metadata.Key)) {
	p := s.public(k)
	was, err := p.ID()
	s.check(err)
	p = s.public(k)
	alter(p)
	own, err := p.ID()
	s.check(err)
	if own == was {
		s.t.Fatalf("key %s is not altered", own)
	}
	s.check(s.root.Signed.AddKey(p, role))
	s.ids[was] = own
	s.signers[role] = append(s.signers[role], k)
}

// setKeys replaces the keys of a top role, and who signs for it.
func (s *sim) setKeys(role string, threshold int, keys, signers []crypto.Signer) {
	s.root.Signed.Roles[role].KeyIDs, s.root.Signed.Roles[role].Threshold = nil, threshold
	for _, k := range keys {
		s.check(s.root.Signed.AddKey(s.public(k), role))
	}
	s.signers[role] = signers
}

// rotate gives a top role a fresh key in place of the old ones.
func (s *sim) rotate(role string) {
	k := []crypto.Signer{s.key()}
	s.setKeys(role, 1, k, k)
}

// list is a role below targets, with a key of its own.
func (s *sim) list(role string) *metadata.TargetsType {
	if s.lists[role] == nil {
		s.lists[role] = metadata.Targets(s.root.Signed.Expires)
		s.lists[role].Signed.Version = 0
		s.signers[role] = []crypto.Signer{s.key()}
	}
	return &s.lists[role].Signed
}

// delegate puts a role below another.
func (s *sim) delegate(parent string, r metadata.DelegatedRole) {
	s.t.Helper()
	s.list(r.Name)
	p := &s.lists[parent].Signed
	if p.Delegations == nil {
		p.Delegations = &metadata.Delegations{Keys: map[string]*metadata.Key{}}
	}
	r.Threshold, r.KeyIDs = 1, []string{}
	p.Delegations.Roles = append(p.Delegations.Roles, r)
	s.check(p.AddKey(s.public(s.signers[r.Name][0]), r.Name))
}

// add lists a target and serves it.
func (s *sim) add(role, name, content string, algorithms ...string) {
	f, err := metadata.TargetFile().FromBytes(name, []byte(content), algorithms...)
	s.check(err)
	s.list(role).Targets[name] = f
	s.serve(name, content)
}

func (s *sim) serve(name, content string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[name] = []byte(content)
}

// publish makes the next version of roles, in the order given; what names
// them follows.
func (s *sim) publish(roles ...string) {
	s.t.Helper()
	for _, role := range roles {
		switch role {
		case "root":
			s.root.Signed.Version++
			put(s, role, s.root)
		case "timestamp":
			s.timestamp.Signed.Version++
			put(s, role, s.timestamp)
		case "snapshot":
			s.snapshot.Signed.Version++
			s.timestamp.Signed.Meta["snapshot.json"] = s.meta(s.snapshot.Signed.Version, put(s, role, s.snapshot))
		default:
			m := s.lists[role]
			m.Signed.Version++
			s.snapshot.Signed.Meta[role+".json"] = s.meta(m.Signed.Version, put(s, role, m))
		}
	}
}

// all publishes the three roles below root.
func (s *sim) all() { s.t.Helper(); s.publish("targets", "snapshot", "timestamp") }

func (s *sim) meta(version int64, b []byte) *metadata.MetaFiles {
	if !s.hashes {
		return &metadata.MetaFiles{Version: version}
	}
	sum := sha256.Sum256(b)
	return &metadata.MetaFiles{Version: version, Length: int64(len(b)), Hashes: metadata.Hashes{"sha256": sum[:]}}
}

func put[T metadata.Roles](s *sim, role string, m *metadata.Metadata[T]) []byte {
	s.t.Helper()
	m.ClearSignatures()
	for _, k := range s.signers[role] {
		s.check(sign(m, k))
	}
	for i, sig := range m.Signatures {
		if own := s.ids[sig.KeyID]; own != "" {
			m.Signatures[i].KeyID = own
		}
	}
	b, err := m.ToBytes(false)
	s.check(err)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pub[role] = append(s.pub[role], b)
	return b
}

func sign[T metadata.Roles](m *metadata.Metadata[T], k crypto.Signer) error {
	var loaded signature.Signer
	var err error
	switch k := k.(type) {
	case *rsa.PrivateKey:
		loaded, err = signature.LoadRSAPSSSigner(k, crypto.SHA256, &rsa.PSSOptions{Hash: crypto.SHA256})
	case ed25519.PrivateKey:
		loaded, err = signature.LoadSigner(k, 0)
	default:
		loaded, err = signature.LoadSigner(k, crypto.SHA256)
	}
	if err == nil {
		_, err = m.Sign(loaded)
	}
	return err
}

// last is the newest published version of a role, to compare or to replace.
func (s *sim) last(role string) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pub[role][len(s.pub[role])-1]
}

// replace serves other bytes in place of the newest version.
func (s *sim) replace(role string, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pub[role][len(s.pub[role])-1] = b
}

// withdraw forgets the newest n versions of a role.
func (s *sim) withdraw(role string, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pub[role] = s.pub[role][:len(s.pub[role])-n]
}

// signatures alters the list of signatures of the newest version.
func (s *sim) signatures(role string, change func([]metadata.Signature) []metadata.Signature) {
	s.t.Helper()
	var m struct {
		Signatures []metadata.Signature `json:"signatures"`
		Signed     json.RawMessage      `json:"signed"`
	}
	s.check(json.Unmarshal(s.last(role), &m))
	m.Signatures = change(m.Signatures)
	b, err := json.Marshal(m)
	s.check(err)
	s.replace(role, b)
}

// ServeHTTP answers metadata/N.ROLE.json, metadata/timestamp.json and
// targets/DIR/DIGEST.NAME.
func (s *sim) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := q.URL.EscapedPath()
	if rest, ok := strings.CutPrefix(name, "/targets/"); ok {
		s.sent = append(s.sent, rest)
		digest, base, _ := strings.Cut(path.Base(q.URL.Path), ".")
		dir := strings.TrimPrefix(path.Dir(q.URL.Path), "/targets")
		content, ok := s.files[strings.TrimPrefix(path.Join(dir, base), "/")]
		if _, err := hex.DecodeString(digest); !ok || err != nil {
			http.NotFound(w, q)
			return
		}
		w.Write(content)
		return
	}
	name = strings.TrimSuffix(strings.TrimPrefix(name, "/metadata/"), ".json")
	version, role, versioned := strings.Cut(name, ".")
	n, err := strconv.Atoi(version)
	if !versioned || err != nil {
		role, n = name, len(s.pub[name])
		s.asked = append(s.asked, name)
	} else {
		s.asked = append(s.asked, role+" "+version)
	}
	plain, err := url.PathUnescape(role)
	if versions := s.pub[plain]; err == nil && n > 0 && n <= len(versions) {
		w.Write(versions[n-1])
		return
	}
	http.NotFound(w, q)
}

// requests compares what the client asked for since the last call.
func (s *sim) requests(want ...string) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Equal(s.asked, want) {
		s.t.Errorf("asked for %q, want %q", s.asked, want)
	}
	s.asked = nil
}

// lastAsked compares the last request only.
func (s *sim) lastAsked(want string) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.asked) == 0 || s.asked[len(s.asked)-1] != want {
		s.t.Errorf("asked for %q, want %q last", s.asked, want)
	}
}

// same compares the client's file of a role with the newest published version.
func (s *sim) same(roles ...string) {
	s.t.Helper()
	for _, role := range roles {
		if !bytes.Equal(s.kept(role), s.last(role)) {
			s.t.Errorf("%s: not the bytes of the newest version", role)
		}
	}
}
