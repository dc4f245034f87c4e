// SPDX-License-Identifier: Apache-2.0

package tufclient_test

import (
	"bytes"
	"compress/gzip"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
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

// grown is a repository with a release role and a client that has seen it.
func grown(t *testing.T) (*client, *tufsim.Repo) {
	t.Helper()
	r := tufsim.New(t, "good", start)
	r.Delegate(start, "debian-12", "amd64")
	r.Publish(start, tufrepo.Target{Path: firstPath, Content: []byte("klatch_1")})
	c := newClient(t, r)
	if _, err := c.mustRefresh(start).Target(firstPath); err != nil {
		t.Fatal(err)
	}
	return c, r
}

const releaseFile = "debian-12-amd64.json"

// forgeTop signs a changed top list, with the release list as it is, and leads
// to it: whoever has the targets keys can do this.
func forgeTop(r *tufsim.Repo, change func(*metadata.TargetsType)) {
	tufsim.Forge(r, "metadata/1.targets.json", "metadata/9.targets.json", r.Keys.Targets.Signers, func(m *metadata.TargetsType) {
		m.Version = 9
		change(m)
	})
	lead(r, map[string]int64{"targets.json": 9})
}

// lead makes snapshot and timestamp 9, with these versions of lists.
func lead(r *tufsim.Repo, versions map[string]int64) {
	tufsim.Forge(r, "metadata/2.snapshot.json", "metadata/9.snapshot.json", r.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
		m.Version = 9
		for name, v := range versions {
			m.Meta[name] = metadata.MetaFile(v)
		}
	})
	pin(r, 9, 9)
}

func pin(r *tufsim.Repo, timestamp, snapshot int64) {
	tufsim.Forge(r, "metadata/timestamp.json", "metadata/timestamp.json", r.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
		m.Version = timestamp
		m.Meta["snapshot.json"] = metadata.MetaFile(snapshot)
	})
}

// raw changes the text of a file without signing it again.
func raw(r *tufsim.Repo, name string, change func(string) string) {
	r.Write(name, []byte(change(string(r.Read(name)))))
}

// signedRaw signs a text as a timestamp is signed, so that only its form is
// wrong.
func signedRaw(r *tufsim.Repo, change func(signed map[string]any)) {
	var m map[string]any
	if err := json.Unmarshal(r.Read("metadata/timestamp.json"), &m); err != nil {
		panic(err)
	}
	change(m["signed"].(map[string]any))
	b, err := json.Marshal(m["signed"])
	if err != nil {
		panic(err)
	}
	sig, err := r.Keys.Timestamp.Signers[0].Sign(nil, b, crypto.Hash(0))
	if err != nil {
		panic(err)
	}
	m["signatures"].([]any)[0].(map[string]any)["sig"] = hex.EncodeToString(sig)
	if b, err = json.Marshal(m); err != nil {
		panic(err)
	}
	r.Write("metadata/timestamp.json", b)
}

// TestAttackMetadata completes group M: the client knows a good repository with
// a release role; then whoever holds the server, and some of the keys, tries.
func TestAttackMetadata(t *testing.T) {
	later := start.Add(time.Hour)
	role := func(change func(*metadata.DelegatedRole)) func(*client, *tufsim.Repo) {
		return func(_ *client, r *tufsim.Repo) {
			forgeTop(r, func(m *metadata.TargetsType) { change(&m.Delegations.Roles[0]) })
		}
	}
	release := func(signers int, change func(*metadata.TargetsType)) func(*client, *tufsim.Repo) {
		return func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/2."+releaseFile, "metadata/9."+releaseFile, r.Keys.Release.Signers[:signers], func(m *metadata.TargetsType) {
				m.Version = 9
				change(m)
			})
			lead(r, map[string]int64{releaseFile: 9})
		}
	}
	for _, tt := range []struct {
		name   string
		attack func(c *client, r *tufsim.Repo)
		want   fault.Code
	}{
		// Signatures.
		{"release list by one key of two", release(1, func(*metadata.TargetsType) {}), "metadata_untrusted"},
		{"release list by the targets keys", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/2."+releaseFile, "metadata/9."+releaseFile, r.Keys.Targets.Signers, func(m *metadata.TargetsType) { m.Version = 9 })
			lead(r, map[string]int64{releaseFile: 9})
		}, "metadata_untrusted"},
		{"the same signature twice", func(_ *client, r *tufsim.Repo) {
			two := []crypto.Signer{r.Keys.Targets.Signers[0], r.Keys.Targets.Signers[0]}
			tufsim.Forge(r, "metadata/1.targets.json", "metadata/9.targets.json", two, func(m *metadata.TargetsType) { m.Version = 9 })
			lead(r, map[string]int64{"targets.json": 9})
		}, "metadata_malformed"},
		{"one key under two ids", func(_ *client, r *tufsim.Repo) {
			forgeTop(r, func(m *metadata.TargetsType) {
				k := *m.Delegations.Keys[m.Delegations.Roles[0].KeyIDs[0]]
				k.UnrecognizedFields = map[string]any{"x": "y"}
				m.Delegations.Keys[strings.Repeat("ab", 32)] = &k
				m.Delegations.Roles[0].KeyIDs = []string{m.Delegations.Roles[0].KeyIDs[0], strings.Repeat("ab", 32)}
			})
			raw(r, "metadata/2."+releaseFile, func(s string) string {
				var m map[string]any
				if err := json.Unmarshal([]byte(s), &m); err != nil {
					panic(err)
				}
				first := m["signatures"].([]any)[0].(map[string]any)
				m["signatures"] = []any{first, map[string]any{"keyid": strings.Repeat("ab", 32), "sig": first["sig"]}}
				b, _ := json.Marshal(m)
				return string(b)
			})
			lead(r, map[string]int64{"targets.json": 9, releaseFile: 2})
		}, "metadata_untrusted"},
		{"a scheme nobody knows", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/1.root.json", "metadata/2.root.json", r.Keys.Root.Signers, func(m *metadata.RootType) {
				m.Version = 2
				for _, k := range m.Keys {
					k.Scheme, k.Type = "none", "none"
				}
			})
		}, "metadata_malformed"},
		{"a threshold of zero", role(func(d *metadata.DelegatedRole) { d.Threshold = 0 }), "metadata_malformed"},
		{"snapshot by the timestamp key", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/2.snapshot.json", "metadata/9.snapshot.json", r.Keys.Timestamp.Signers, func(m *metadata.SnapshotType) { m.Version = 9 })
			pin(r, 9, 9)
		}, "metadata_untrusted"},
		{"a root by nobody but its own new keys", func(_ *client, r *tufsim.Repo) { otherRoot(r, tufsim.Signers("evil", 2)) }, "metadata_untrusted"},
		{"a root that its own new keys did not sign", func(_ *client, r *tufsim.Repo) { otherRoot(r, r.Keys.Root.Signers) }, "metadata_untrusted"},
		{"a root without a role", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/1.root.json", "metadata/2.root.json", r.Keys.Root.Signers, func(m *metadata.RootType) {
				m.Version = 2
				delete(m.Roles, "timestamp")
			})
		}, "metadata_malformed"},
		// Form.
		{"another _type", func(_ *client, r *tufsim.Repo) { signedRaw(r, func(s map[string]any) { s["_type"] = "snapshot" }) }, "metadata_malformed"},
		{"a specification that we do not know", func(_ *client, r *tufsim.Repo) {
			signedRaw(r, func(s map[string]any) { s["spec_version"], s["version"] = "2.0.0", 9 })
		}, "metadata_malformed"},
		{"null in the place of everything", func(_ *client, r *tufsim.Repo) { r.Lie(timestampPath, serve([]byte("null"))) }, "metadata_malformed"},
		{"null members", func(_ *client, r *tufsim.Repo) {
			signedRaw(r, func(s map[string]any) { s["meta"], s["version"] = nil, 9 })
		}, "metadata_malformed"},
		{"JSON a million levels deep", func(_ *client, r *tufsim.Repo) {
			r.Lie(timestampPath, serve(bytes.Repeat([]byte("["), 15000)))
		}, "metadata_malformed"},
		{"a member twice", func(_ *client, r *tufsim.Repo) {
			raw(r, "metadata/timestamp.json", func(s string) string { return strings.Replace(s, `"version":2`, `"version":2,"version":9`, 1) })
		}, "metadata_untrusted"},
		{"bytes after the end", func(_ *client, r *tufsim.Repo) {
			raw(r, "metadata/timestamp.json", func(s string) string { return s + "{}" })
		}, "metadata_malformed"},
		{"a version below zero", func(_ *client, r *tufsim.Repo) { pin(r, -1, 2) }, "metadata_rollback"},
		// Freshness and versions.
		{"release list that is expired", release(2, func(m *metadata.TargetsType) { m.Expires = start }), "metadata_expired"},
		{"targets that are expired", func(_ *client, r *tufsim.Repo) { forgeTop(r, func(m *metadata.TargetsType) { m.Expires = start }) }, "metadata_expired"},
		{"root that is expired", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/1.root.json", "metadata/2.root.json", r.Keys.Root.Signers, func(m *metadata.RootType) { m.Version, m.Expires = 2, start })
		}, "metadata_expired"},
		{"an older release list", func(c *client, r *tufsim.Repo) {
			r.Publish(later, tufrepo.Target{Path: "debian-12/amd64/6.1.0-50/klatch_2.lpb", Content: []byte("2")})
			c.mustRefresh(later)
			tufsim.Forge(r, "metadata/3.snapshot.json", "metadata/9.snapshot.json", r.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
				m.Version, m.Meta[releaseFile] = 9, metadata.MetaFile(2)
			})
			pin(r, 9, 9)
		}, "metadata_rollback"},
		{"a release list of a specification that we do not know", release(2, func(m *metadata.TargetsType) { m.SpecVersion = "2.0.0" }), "metadata_malformed"},
		{"an older root again", func(c *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/1.root.json", "metadata/2.root.json", r.Keys.Root.Signers, func(m *metadata.RootType) { m.Version = 2 })
			c.mustRefresh(later)
			r.Write("metadata/3.root.json", r.Read("metadata/1.root.json"))
		}, "metadata_rollback"},
		{"a snapshot that forgets the release role", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/2.snapshot.json", "metadata/9.snapshot.json", r.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
				m.Version = 9
				delete(m.Meta, releaseFile)
			})
			pin(r, 9, 9)
		}, "metadata_untrusted"},
		{"a delegation that the snapshot does not have", func(_ *client, r *tufsim.Repo) {
			forgeTop(r, func(m *metadata.TargetsType) {
				two := m.Delegations.Roles[0]
				two.Name, two.Paths = "debian-13-amd64", []string{"debian-13/amd64/*/*"}
				m.Delegations.Roles = append(m.Delegations.Roles, two)
			})
		}, "metadata_untrusted"},
		{"fast forward to the highest number", func(_ *client, r *tufsim.Repo) { pin(r, math.MaxInt64, 2) }, "metadata_jump"},
		{"fast forward of the snapshot", func(_ *client, r *tufsim.Repo) {
			const high = 1 << 40
			tufsim.Forge(r, "metadata/2.snapshot.json", fmt.Sprintf("metadata/%d.snapshot.json", int64(high)), r.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) { m.Version = high })
			pin(r, 9, high)
		}, "metadata_jump"},
		{"wrong digest in the snapshot", func(_ *client, r *tufsim.Repo) {
			tufsim.Forge(r, "metadata/2.snapshot.json", "metadata/9.snapshot.json", r.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
				m.Version = 9
				m.Meta[releaseFile].Hashes["sha256"] = make([]byte, 32)
			})
			pin(r, 9, 9)
		}, "metadata_untrusted"},
		{"a list one byte longer than signed", func(_ *client, r *tufsim.Repo) { length(r, -1) }, "metadata_malformed"},
		{"a list one byte shorter than signed", func(_ *client, r *tufsim.Repo) { length(r, 1) }, "metadata_untrusted"},
		// The tree of roles.
		{"a star that is to go over a slash", role(func(d *metadata.DelegatedRole) { d.Paths = []string{"debian-12/*"} }), "delegation_refused"},
		{"a star for every distribution", role(func(d *metadata.DelegatedRole) { d.Paths = []string{"*/amd64/*/*"} }), "delegation_refused"},
		{"a pattern with a class", role(func(d *metadata.DelegatedRole) { d.Paths = []string{"debian-12/amd64/[0-9]*/*"} }), "delegation_refused"},
		{"two patterns", role(func(d *metadata.DelegatedRole) { d.Paths = append(d.Paths, "debian-13/amd64/*/*") }), "delegation_refused"},
		{"prefixes of digests", role(func(d *metadata.DelegatedRole) { d.Paths, d.PathHashPrefixes = nil, []string{""} }), "delegation_refused"},
		{"a role that is not terminating", role(func(d *metadata.DelegatedRole) { d.Terminating = false }), "delegation_refused"},
		{"a role whose name leaves the folder", role(func(d *metadata.DelegatedRole) { d.Name = "../../etc/cron.d/x" }), "delegation_refused"},
		{"a role with the name of a top role", role(func(d *metadata.DelegatedRole) { d.Name = "root" }), "delegation_refused"},
		{"a diamond: two roles for the same paths", func(_ *client, r *tufsim.Repo) {
			forgeTop(r, func(m *metadata.TargetsType) {
				two := m.Delegations.Roles[0]
				two.Name, two.Paths = "debian-12-other", []string{"debian-12/amd64/6.1.0-50/*"}
				m.Delegations.Roles = append(m.Delegations.Roles, two)
			})
		}, "delegation_refused"},
		{"a diamond: one name twice", func(_ *client, r *tufsim.Repo) {
			forgeTop(r, func(m *metadata.TargetsType) {
				two := m.Delegations.Roles[0]
				two.Paths = []string{"debian-13/amd64/*/*"}
				m.Delegations.Roles = append(m.Delegations.Roles, two)
			})
		}, "delegation_refused"},
		{"33 roles", func(_ *client, r *tufsim.Repo) {
			forgeTop(r, func(m *metadata.TargetsType) {
				for i := range 32 {
					two := m.Delegations.Roles[0]
					two.Name, two.Paths = fmt.Sprintf("debian-%d-amd64", 20+i), []string{fmt.Sprintf("debian-%d/amd64/*/*", 20+i)}
					m.Delegations.Roles = append(m.Delegations.Roles, two)
				}
			})
		}, "delegation_refused"},
		{"hash bins", func(_ *client, r *tufsim.Repo) {
			forgeTop(r, func(m *metadata.TargetsType) {
				m.Delegations.SuccinctRoles = &metadata.SuccinctRoles{KeyIDs: m.Delegations.Roles[0].KeyIDs, Threshold: 2, BitLength: 8, NamePrefix: "bin"}
				m.Delegations.Roles = nil
			})
		}, "delegation_refused"},
		{"a release role that delegates further", release(2, func(m *metadata.TargetsType) {
			m.Delegations = &metadata.Delegations{Keys: map[string]*metadata.Key{}, Roles: []metadata.DelegatedRole{}}
		}), "delegation_refused"},
		{"300 roots", func(_ *client, r *tufsim.Repo) {
			for v := int64(2); v <= 300; v++ {
				tufsim.Forge(r, "metadata/1.root.json", fmt.Sprintf("metadata/%d.root.json", v), r.Keys.Root.Signers[:2], func(m *metadata.RootType) {
					m.Version = v
					if v < 300 {
						m.Expires = start // only the newest would be good
					}
				})
			}
		}, "metadata_expired"},
		// The network.
		{"a gzip bomb by header", func(_ *client, r *tufsim.Repo) {
			var bomb bytes.Buffer
			z := gzip.NewWriter(&bomb)
			z.Write(bytes.Repeat([]byte(" "), 100<<20))
			z.Close()
			r.Lie(timestampPath, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Encoding", "gzip")
				w.Write(bomb.Bytes())
			})
		}, "metadata_malformed"},
		{"redirect to another host", func(c *client, r *tufsim.Repo) {
			evil := tufsim.New(c.t, "evil", start)
			evil.Publish(start, tufrepo.Target{Path: firstPath, Content: []byte("evil")})
			other := httptest.NewServer(evil.Handler())
			c.t.Cleanup(other.Close)
			r.Lie(timestampPath, func(w http.ResponseWriter, q *http.Request) {
				http.Redirect(w, q, other.URL+q.URL.Path, http.StatusFound)
			})
		}, "metadata_untrusted"},
		{"redirect without an end", func(_ *client, r *tufsim.Repo) {
			r.Lie(timestampPath, func(w http.ResponseWriter, q *http.Request) { http.Redirect(w, q, q.URL.Path, http.StatusFound) })
		}, "metadata_unavailable"},
	} {
		t.Run("Attack/M/"+tt.name, func(t *testing.T) {
			t.Parallel()
			c, r := grown(t)
			tt.attack(c, r)
			s, err := c.refresh(later)
			if fault.CodeOf(err) != tt.want || s != nil {
				t.Errorf("code %q, want %q: %v", fault.CodeOf(err), tt.want, err)
			}
		})
	}
}

// otherRoot makes root 2 with two keys of an attacker in the place of the
// publisher's.
func otherRoot(r *tufsim.Repo, by []crypto.Signer) {
	tufsim.Forge(r, "metadata/1.root.json", "metadata/2.root.json", by, func(m *metadata.RootType) {
		m.Version = 2
		m.Roles[metadata.ROOT].KeyIDs = nil
		for _, s := range tufsim.Signers("evil", 2) {
			k, err := metadata.KeyFromPublicKey(s.Public())
			if err != nil {
				panic(err)
			}
			if err := m.AddKey(k, metadata.ROOT); err != nil {
				panic(err)
			}
		}
	})
}

// length claims so many bytes more than the release list has.
func length(r *tufsim.Repo, more int64) {
	tufsim.Forge(r, "metadata/2.snapshot.json", "metadata/9.snapshot.json", r.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
		m.Version = 9
		tufsim.Forge(r, "metadata/2."+releaseFile, "metadata/9."+releaseFile, r.Keys.Release.Signers[:2], func(l *metadata.TargetsType) { l.Version = 9 })
		m.Meta[releaseFile] = metadata.MetaFile(9)
		m.Meta[releaseFile].Length = int64(len(r.Read("metadata/9."+releaseFile))) + more
	})
	pin(r, 9, 9)
}

// TestAttackWithoutEffect: what the attacker signs is proper TUF; it only does
// not get them what they want.
func TestAttackWithoutEffect(t *testing.T) {
	later := start.Add(time.Hour)
	t.Run("Attack/M/a release role that lists another role's paths", func(t *testing.T) {
		c, r := grown(t)
		tufsim.Forge(r, "metadata/2."+releaseFile, "metadata/9."+releaseFile, r.Keys.Release.Signers[:2], func(m *metadata.TargetsType) {
			m.Version = 9
			for _, name := range []string{"debian-13/amd64/6.12/klatch_1.lpb", "policy/recalls-9.note", "debian-12/amd64/x"} {
				m.Targets[name] = m.Targets[firstPath]
			}
		})
		lead(r, map[string]int64{releaseFile: 9})
		if s := c.mustRefresh(later); len(s.Targets()) != 1 || s.Targets()[0].Role != "debian-12-amd64" {
			t.Errorf("targets %+v", s.Targets())
		}
	})
	t.Run("Attack/M/equal version with other bytes", func(t *testing.T) {
		c, r := grown(t)
		was := c.mustRefresh(start)
		tufsim.Forge(r, "metadata/2.snapshot.json", "metadata/9.snapshot.json", r.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) { m.Version = 9 })
		pin(r, 2, 9)
		if s := c.mustRefresh(later); s.Snapshot != was.Snapshot {
			t.Errorf("snapshot %d counts, want %d", s.Snapshot, was.Snapshot)
		}
	})
	t.Run("Attack/M/storms of 404 and 500 end, and then it goes on", func(t *testing.T) {
		c, r := grown(t)
		for _, status := range []int{404, 500, 503, 200} {
			r.Lie(timestampPath, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) })
			if _, err := c.refresh(later); err == nil {
				t.Errorf("status %d was taken", status)
			}
		}
		r.Forget()
		c.mustRefresh(later)
	})
	t.Run("Attack/M/fast forward is healed by new keys", func(t *testing.T) {
		c, r := grown(t)
		honest := r.Read("metadata/timestamp.json")
		pin(r, 999_999, 2)
		c.mustRefresh(later)
		r.Write("metadata/timestamp.json", honest) // the publisher's own copy
		old := r.Keys
		r.Keys.Timestamp.Signers, r.Keys.Snapshot.Signers = tufsim.Signers("new t", 1), tufsim.Signers("new s", 1)
		if err := r.Rekey(later, old); err != nil {
			t.Fatal(err)
		}
		if s := c.mustRefresh(later.Add(time.Minute)); s.Timestamp >= 999_999 || s.Root != 2 {
			t.Errorf("timestamp %d, root %d", s.Timestamp, s.Root)
		}
	})
}

// TestLazyLookTakesOneRole: a machine fetches the list of its own role and no
// other, and not at all where nothing is offered to it.
func TestLazyLookTakesOneRole(t *testing.T) {
	r := tufsim.New(t, "good", start)
	r.Delegate(start, "debian-12", "amd64")
	r.Delegate(start, "debian-13", "amd64")
	r.Publish(start, tufrepo.Target{Path: firstPath, Content: []byte("1")}, tufrepo.Target{Path: "debian-13/amd64/6.12/klatch_1.lpb", Content: []byte("2")})
	asked := map[string]int{}
	h := r.Handler()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		asked[filepath.Base(q.URL.Path)]++
		h.ServeHTTP(w, q)
	}))
	defer server.Close()
	cfg := tufclient.Config{Root: r.Root, Dir: filepath.Join(t.TempDir(), "tuf"), BaseURL: server.URL, Now: start, Lazy: true}
	for range 2 {
		s, err := tufclient.Refresh(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Target(firstPath); err != nil {
			t.Fatal(err)
		}
	}
	for name, n := range asked {
		switch {
		case strings.Contains(name, "debian-13"), strings.Contains(name, "debian-12") && n != 1:
			t.Errorf("asked %d times for %s", n, name)
		}
	}
}
