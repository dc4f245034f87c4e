// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/testkit/tufsim"
)

func serve(t *testing.T, h http.Handler) string {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

// top makes version 2 of targets and snapshot, with these expiries.
func (c *client) top(snapshot, targets time.Time) {
	tufsim.Forge(c.Repo, "metadata/1.targets.json", "metadata/2.targets.json", c.Keys.Targets.Signers, func(m *metadata.TargetsType) {
		m.Version = 2
		if !targets.IsZero() {
			m.Expires = targets.UTC().Truncate(time.Second)
		}
	})
	tufsim.Forge(c.Repo, "metadata/1.snapshot.json", "metadata/2.snapshot.json", c.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
		m.Version, m.Meta["targets.json"] = 2, metadata.MetaFile(2)
		if !snapshot.IsZero() {
			m.Expires = snapshot.UTC().Truncate(time.Second)
		}
	})
	c.pin(2)
}

// pin makes a timestamp that names a snapshot.
func (c *client) pin(snapshot int64) {
	tufsim.Forge(c.Repo, "metadata/timestamp.json", "metadata/timestamp.json", c.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
		m.Version++
		m.Meta["snapshot.json"] = metadata.MetaFile(snapshot)
	})
}

// newRoot replaces the keys of roles.
func (c *client) newRoot(version int64, signers []crypto.Signer, keys map[string][]crypto.Signer) {
	from := "metadata/" + string(rune('0'+version-1)) + ".root.json"
	tufsim.Forge(c.Repo, from, "metadata/"+string(rune('0'+version))+".root.json", signers, func(m *metadata.RootType) {
		m.Version = version
		for role, ss := range keys {
			m.Roles[role].KeyIDs = nil
			for _, s := range ss {
				k, err := metadata.KeyFromPublicKey(s.Public())
				if err == nil {
					err = m.AddKey(k, role)
				}
				if err != nil {
					c.t.Fatal(err)
				}
			}
		}
	})
}

func (c *client) rekey(role string, fresh []crypto.Signer) {
	c.newRoot(2, c.Keys.Root.Signers, map[string][]crypto.Signer{role: fresh})
}

// delegate builds a graph of roles by name; a name that begins with "t-" is
// terminating. One role lists the one target.
func (c *client) delegate(graph map[string][]string, holder, name string) {
	content := []byte("content of " + name)
	sum := sha256.Sum256(content)
	roles := map[string]bool{}
	for from, to := range graph {
		roles[from] = true
		for _, r := range to {
			roles[r] = true
		}
	}
	signers := func(role string) []crypto.Signer {
		if role == "targets" {
			return c.Keys.Targets.Signers
		}
		return tufsim.Signers("role "+role, 1)
	}
	for role := range roles {
		version := int64(1)
		if role == "targets" {
			version = 2
		}
		tufsim.Forge(c.Repo, "metadata/1.targets.json", "metadata/"+url.PathEscape(versioned(version, role)), signers(role), func(m *metadata.TargetsType) {
			m.Version, m.Targets = version, map[string]*metadata.TargetFiles{}
			if role == holder {
				m.Targets[name] = &metadata.TargetFiles{Length: int64(len(content)), Hashes: metadata.Hashes{"sha256": sum[:]}}
			}
			if len(graph[role]) == 0 {
				return
			}
			m.Delegations = &metadata.Delegations{Keys: map[string]*metadata.Key{}}
			depth := strings.Count(name, "/")
			for _, child := range graph[role] {
				m.Delegations.Roles = append(m.Delegations.Roles, metadata.DelegatedRole{Name: child, Threshold: 1, KeyIDs: []string{},
					Terminating: strings.HasPrefix(child, "t-"), Paths: []string{strings.Repeat("*/", depth) + "*"}})
				k, err := metadata.KeyFromPublicKey(signers(child)[0].Public())
				if err == nil {
					err = m.AddKey(k, child)
				}
				if err != nil {
					c.t.Fatal(err)
				}
			}
		})
	}
	tufsim.Forge(c.Repo, "metadata/1.snapshot.json", "metadata/2.snapshot.json", c.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
		m.Version = 2
		for role := range roles {
			m.Meta[role+".json"] = metadata.MetaFile(1)
		}
		m.Meta["targets.json"] = metadata.MetaFile(2)
	})
	c.pin(2)
	for role := range roles {
		if name := versioned(1, role); strings.Contains(role, "/") {
			b := c.Read("metadata/" + url.PathEscape(name))
			c.Lie("/metadata/"+name, func(w http.ResponseWriter, _ *http.Request) { w.Write(b) })
		}
	}
	dir, base := "", name
	if i := strings.LastIndex(name, "/"); i >= 0 {
		dir, base = name[:i+1], name[i+1:]
	}
	blob := dir + hex.EncodeToString(sum[:]) + "." + base
	c.Lie("/targets/"+blob, func(w http.ResponseWriter, _ *http.Request) { w.Write(content) })
}

func versioned(v int64, role string) string { return string(rune('0'+v)) + "." + role + ".json" }
