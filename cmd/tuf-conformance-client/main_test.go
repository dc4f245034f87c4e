// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/testkit/tufsim"
	"klatch/internal/tufrepo"
)

// The classes of cases of the TUF conformance suite (basic, expiration, file
// download, keys, quoting, rollback, delegation graphs, key rotation), against
// the program as the suite runs it.

const program = "KLATCH_CONFORMANCE_CLIENT"

// TestMain lets the test binary be the program.
func TestMain(m *testing.M) {
	if os.Getenv(program) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// runner is the program with its folders, against one address.
type runner struct {
	t             *testing.T
	url           string
	meta, targets string
	tmp           string // go-tuf looks for the list of a role ../x beside its folder
}

func newRunner(t *testing.T) *runner {
	return &runner{t: t, meta: t.TempDir(), targets: t.TempDir(), tmp: t.TempDir()}
}

// client is the program, and a repository of package tufrepo that it looks at.
type client struct {
	*tufsim.Repo
	*runner
	requests atomic.Int64
}

const target = "file one.txt"

func newClient(t *testing.T) *client {
	now := time.Now()
	r := tufsim.New(t, "conformance", now)
	r.Publish(now, tufrepo.Target{Path: "plain", Content: []byte("plain content")})
	c := &client{Repo: r, runner: newRunner(t)}
	h := r.Handler()
	c.url = serve(t, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		c.requests.Add(1)
		h.ServeHTTP(w, q)
	}))
	c.init(r.Root)
	return c
}

func (c *runner) init(root []byte) {
	c.t.Helper()
	name := filepath.Join(c.t.TempDir(), "root.json")
	if err := os.WriteFile(name, root, 0o600); err != nil {
		c.t.Fatal(err)
	}
	c.must(true, "init", name)
}

// run starts the program; ok is exit status 0, and any other must be 1.
func (c *runner) run(env []string, args ...string) (ok bool) {
	c.t.Helper()
	cmd := exec.Command(os.Args[0], append([]string{"--metadata-dir", c.meta, "--metadata-url", c.url + "/metadata"}, args...)...)
	cmd.Env = append(append(os.Environ(), program+"=1", "TMPDIR="+c.tmp), env...)
	out, err := cmd.CombinedOutput()
	c.t.Logf("%q: %s", args, out)
	if code := cmd.ProcessState.ExitCode(); code != 0 && code != 1 {
		c.t.Fatalf("%q: exit status %d, %v", args, code, err)
	}
	return err == nil
}

func (c *runner) must(want bool, args ...string) {
	c.t.Helper()
	if ok := c.run(nil, args...); ok != want {
		c.t.Errorf("%q: success %v, want %v", args, ok, want)
	}
}

// later refreshes at another time: the program asks date when it sees faketime
// preloaded, as the suite does it, and this date is ours.
func (c *runner) later(want bool, at time.Time, args ...string) {
	c.t.Helper()
	bin := c.t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\necho %d\n", at.Unix())
	if err := os.WriteFile(filepath.Join(bin, "date"), []byte(script), 0o700); err != nil {
		c.t.Fatal(err)
	}
	if ok := c.run([]string{"LD_PRELOAD=libfaketime-of-the-suite.so", "PATH=" + bin + ":" + os.Getenv("PATH")}, args...); ok != want {
		c.t.Errorf("%q at %s: success %v, want %v", args, at, ok, want)
	}
}

func (c *runner) refresh(want bool) { c.t.Helper(); c.must(want, "refresh") }

func (c *runner) fetch(name string) []string {
	return []string{"--target-name", name, "--target-dir", c.targets, "--target-base-url", c.url + "/targets", "download"}
}

func (c *runner) download(want bool, name string) { c.t.Helper(); c.must(want, c.fetch(name)...) }

// downloaded compares the contents of the folder for downloads, in any order.
func (c *runner) downloaded(want ...string) {
	c.t.Helper()
	files, err := filepath.Glob(filepath.Join(c.targets, "*"))
	got := []string{}
	for _, f := range files {
		b, e := os.ReadFile(f)
		got, err = append(got, string(b)), errors.Join(err, e)
	}
	slices.Sort(got)
	slices.Sort(want)
	if err != nil || !slices.Equal(got, want) {
		c.t.Errorf("downloaded %q, want %q (%v)", got, want, err)
	}
}

// kept is the client's file of a role; none is nil.
func (c *runner) kept(role string) []byte {
	c.t.Helper()
	b, err := os.ReadFile(filepath.Join(c.meta, role+".json"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.t.Fatal(err)
	}
	return b
}

// trusts compares the version of a role that the client holds; 0 is none.
func (c *runner) trusts(role string, want int64) {
	c.t.Helper()
	var m struct {
		Signed struct {
			Type    string `json:"_type"`
			Version int64  `json:"version"`
		} `json:"signed"`
	}
	if b := c.kept(role); b != nil {
		if err := json.Unmarshal(b, &m); err != nil {
			c.t.Fatal(err)
		}
	}
	if m.Signed.Version != want {
		c.t.Errorf("trusts %s %d, want %d", role, m.Signed.Version, want)
	}
}

// holds compares all that the client trusts: versions of root, timestamp,
// snapshot and targets, 0 for none, and how many other roles there are.
func (c *runner) holds(root, timestamp, snapshot, targets int64, others int) {
	c.t.Helper()
	top := 0
	for role, v := range map[string]int64{"root": root, "timestamp": timestamp, "snapshot": snapshot, "targets": targets} {
		c.trusts(role, v)
		if v > 0 {
			top++
		}
	}
	if all, err := filepath.Glob(filepath.Join(c.meta, "*.json")); err != nil || len(all) != top+others {
		c.t.Errorf("holds %q, want %d top roles and %d others (%v)", all, top, others, err)
	}
}

func TestConformance(t *testing.T) {
	for _, tt := range []struct {
		name string
		run  func(c *client)
	}{
		{"basic/ours: init asks nothing of the repository", func(c *client) {
			if n := c.requests.Load(); n != 0 {
				c.t.Errorf("%d requests", n)
			}
			c.trusts("root", 1)
			c.trusts("timestamp", 0)
		}},
		{"basic/ours: refresh takes all top roles", func(c *client) {
			c.refresh(true)
			for _, role := range []string{"root", "timestamp", "snapshot", "targets"} {
				c.trusts(role, 1)
			}
		}},
		{"basic/ours: only roles are in the metadata folder, under plain names", func(c *client) {
			c.refresh(true)
			names, _ := filepath.Glob(filepath.Join(c.meta, "*"))
			if len(names) != 4 {
				c.t.Errorf("%q", names)
			}
		}},
		{"basic/ours: bytes are kept as they came", func(c *client) {
			c.refresh(true)
			b, err := os.ReadFile(filepath.Join(c.meta, "timestamp.json"))
			if err != nil || string(b) != string(c.Read("metadata/timestamp.json")) {
				c.t.Errorf("other bytes: %v", err)
			}
		}},
		{"basic/ours: an unsigned timestamp", func(c *client) {
			c.refresh(true)
			tufsim.Forge(c.Repo, "metadata/timestamp.json", "metadata/timestamp.json", nil, func(m *metadata.TimestampType) { m.Version = 2 })
			c.refresh(false)
			c.trusts("timestamp", 1)
		}},
		{"expiration/ours: root", func(c *client) {
			tufsim.Forge(c.Repo, "metadata/1.root.json", "metadata/2.root.json", c.Keys.Root.Signers, func(m *metadata.RootType) {
				m.Version, m.Expires = 2, time.Now().Add(-time.Hour)
			})
			c.refresh(false)
			c.trusts("root", 2)
			c.trusts("timestamp", 0)
		}},
		{"expiration/ours: an expired root between two good ones", func(c *client) {
			tufsim.Forge(c.Repo, "metadata/1.root.json", "metadata/2.root.json", c.Keys.Root.Signers, func(m *metadata.RootType) {
				m.Version, m.Expires = 2, time.Now().Add(-time.Hour)
			})
			tufsim.Forge(c.Repo, "metadata/1.root.json", "metadata/3.root.json", c.Keys.Root.Signers, func(m *metadata.RootType) { m.Version = 3 })
			c.refresh(true)
			c.trusts("root", 3)
		}},
		{"expiration/ours: timestamp, which still counts against a rollback", func(c *client) {
			tufsim.Forge(c.Repo, "metadata/timestamp.json", "metadata/timestamp.json", c.Keys.Timestamp.Signers, func(m *metadata.TimestampType) {
				m.Version, m.Expires = 7, time.Now().Add(-time.Hour)
			})
			c.refresh(false)
			c.trusts("snapshot", 0)
		}},
		{"expiration/ours: snapshot", func(c *client) {
			c.top(time.Now().Add(-time.Hour), time.Time{})
			c.refresh(false)
			c.trusts("targets", 0)
		}},
		{"expiration/ours: targets", func(c *client) {
			c.top(time.Time{}, time.Now().Add(-time.Hour))
			c.refresh(false)
			c.trusts("targets", 0)
		}},
		{"rollback/ours: timestamp", func(c *client) {
			old := c.Read("metadata/timestamp.json")
			c.Publish(time.Now(), tufrepo.Target{Path: "two", Content: []byte("2")})
			c.refresh(true)
			c.Write("metadata/timestamp.json", old)
			c.refresh(false)
			c.trusts("timestamp", 2)
		}},
		{"rollback/ours: snapshot that forgets a role", func(c *client) {
			c.Publish(time.Now(), tufrepo.Target{Path: "two", Content: []byte("2")})
			c.refresh(true)
			tufsim.Forge(c.Repo, "metadata/2.snapshot.json", "metadata/3.snapshot.json", c.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
				m.Version, m.Meta = 3, map[string]*metadata.MetaFiles{"other.json": metadata.MetaFile(1)}
			})
			c.pin(3)
			c.refresh(false)
			c.trusts("snapshot", 2)
		}},
		{"rollback/ours: fast forward is healed by new keys", func(c *client) {
			c.refresh(true)
			tufsim.Forge(c.Repo, "metadata/timestamp.json", "metadata/timestamp.json", c.Keys.Timestamp.Signers, func(m *metadata.TimestampType) { m.Version = 99999 })
			c.refresh(true)
			fresh := tufsim.Signers("new timestamp", 1)
			c.rekey("timestamp", fresh)
			tufsim.Forge(c.Repo, "metadata/timestamp.json", "metadata/timestamp.json", fresh, func(m *metadata.TimestampType) { m.Version = 2 })
			c.refresh(true)
			c.trusts("timestamp", 2)
		}},
		{"key rotation/ours: a chain of roots", func(c *client) {
			keys := c.Keys.Root.Signers
			for v := int64(2); v < 6; v++ {
				next := tufsim.Signers(strings.Repeat("x", int(v)), 3)
				c.newRoot(v, append(append([]crypto.Signer{}, keys...), next...), map[string][]crypto.Signer{"root": next})
				keys = next
			}
			c.refresh(true)
			c.trusts("root", 5)
		}},
		{"key rotation/ours: not signed by the old root", func(c *client) {
			next := tufsim.Signers("next", 3)
			c.newRoot(2, next, map[string][]crypto.Signer{"root": next})
			c.refresh(false)
			c.trusts("root", 1)
		}},
		{"key rotation/ours: not signed by itself", func(c *client) {
			c.newRoot(2, c.Keys.Root.Signers, map[string][]crypto.Signer{"root": tufsim.Signers("next", 3)})
			c.refresh(false)
			c.trusts("root", 1)
		}},
		{"keys/ours: one signature twice is one", func(c *client) {
			two := []crypto.Signer{c.Keys.Root.Signers[0], c.Keys.Root.Signers[0]}
			tufsim.Forge(c.Repo, "metadata/1.root.json", "metadata/2.root.json", two, func(m *metadata.RootType) { m.Version = 2 })
			c.refresh(false)
			c.trusts("root", 1)
		}},
		{"file download/ours: twice is one request", func(c *client) {
			c.download(true, "plain")
			before := c.requests.Load()
			c.download(true, "plain")
			if n := c.requests.Load() - before; n != 2 { // the next root, the timestamp
				c.t.Errorf("%d requests", n)
			}
			got, _ := filepath.Glob(filepath.Join(c.targets, "*"))
			if len(got) != 1 {
				c.t.Errorf("%q", got)
			}
		}},
		{"file download/ours: not in the list", func(c *client) { c.download(false, "other") }},
		{"file download/ours: changed on the server", func(c *client) {
			blobs, _ := filepath.Glob(filepath.Join(c.Dir, "targets", "*.plain"))
			c.Write("targets/"+filepath.Base(blobs[0]), []byte("plain CONTENT"))
			c.download(false, "plain")
			if got, _ := filepath.Glob(filepath.Join(c.targets, "*")); len(got) != 0 {
				c.t.Errorf("kept %q", got)
			}
		}},
		{"file download/ours: longer than signed", func(c *client) {
			blobs, _ := filepath.Glob(filepath.Join(c.Dir, "targets", "*.plain"))
			c.Write("targets/"+filepath.Base(blobs[0]), []byte("plain content and more"))
			c.download(false, "plain")
		}},
		{"delegation graphs/ours: two levels", func(c *client) {
			c.delegate(map[string][]string{"targets": {"a"}, "a": {"b"}}, "b", target)
			c.download(true, target)
			c.trusts("b", 1)
		}},
		{"delegation graphs/ours: a cycle ends", func(c *client) {
			c.delegate(map[string][]string{"targets": {"a"}, "a": {"b"}, "b": {"a"}}, "b", target)
			c.download(true, target)
			c.download(false, "absent")
		}},
		{"delegation graphs/ours: terminating ends the search", func(c *client) {
			c.delegate(map[string][]string{"targets": {"t-stop", "b"}}, "b", target)
			c.download(false, target)
		}},
		{"quoting/ours: role and target with strange names", func(c *client) {
			c.delegate(map[string][]string{"targets": {"../b c"}}, "../b c", "x y/z é")
			c.download(true, "x y/z é")
			names, _ := filepath.Glob(filepath.Join(c.meta, "..", "b c*"))
			if got, _ := filepath.Glob(filepath.Join(c.targets, "*")); len(got) != 1 || len(names) != 0 {
				c.t.Errorf("files %q, outside %q", got, names)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.run(newClient(t))
		})
	}
	for _, class := range [][]simCase{basicCases(), expirationCases(), rollbackCases(), downloadCases(), keyCases(), quotingCases(), rotationCases(), graphCases()} {
		for _, tt := range class {
			t.Run(tt.name, func(t *testing.T) {
				t.Parallel()
				tt.run(newSim(t))
			})
		}
	}
}

// simCase is one case of the suite under its own name, as class/case.
type simCase struct {
	name string
	run  func(s *sim)
}
