// SPDX-License-Identifier: Apache-2.0

package tufclient_test

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/testkit/tufsim"
	"klatch/internal/tufclient"
	"klatch/internal/tufrepo"
)

// BenchmarkRefresh is what a look costs with so many livepatches in one release
// role: bytes over the network, time, memory. "first" has no memory; "same" is a
// machine for which
// nothing was, so that it asks for two files only. "mirror" takes every list.
func BenchmarkRefresh(b *testing.B) {
	for _, n := range []int{500, 5000} {
		r := big(b, n)
		var sent atomic.Int64
		h := r.Handler()
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) { h.ServeHTTP(&counting{w, &sent}, q) }))
		b.Cleanup(server.Close)
		name := func(i int) string { return fmt.Sprintf("debian-12/amd64/6.1.0-%d-cloud-amd64/klatch_1.lpb", i) }
		for _, mode := range []string{"first", "same", "mirror"} {
			b.Run(fmt.Sprintf("%d/%s", n, mode), func(b *testing.B) {
				cfg := tufclient.Config{Root: r.Root, Dir: filepath.Join(b.TempDir(), "tuf"), BaseURL: server.URL, Now: start, Lazy: mode != "mirror"}
				look := func(dir string) {
					cfg.Dir = dir
					s, err := tufclient.Refresh(b.Context(), cfg)
					if err != nil {
						b.Fatal(err)
					}
					if mode == "same" {
						return
					}
					if _, err := s.Target(name(n - 1)); err != nil {
						b.Fatal(err)
					}
				}
				if mode == "same" {
					look(cfg.Dir)
				}
				base := cfg.Dir
				sent.Store(0)
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					if mode == "same" {
						look(base)
					} else {
						look(fmt.Sprintf("%s%d", base, i))
					}
				}
				b.ReportMetric(float64(sent.Load())/float64(b.N), "wire-B/op")
			})
		}
	}
}

// big is a repository whose release role lists n livepatches, with custom parts
// as klatch-forge writes them.
func big(b *testing.B, n int) *tufsim.Repo {
	r := tufsim.New(b, "big", start)
	r.Delegate(start, "debian-12", "amd64")
	r.Publish(start, tufrepo.Target{Path: firstPath, Content: []byte("1")})
	tufsim.Forge(r, "metadata/2."+releaseFile, "metadata/9."+releaseFile, r.Keys.Release.Signers[:2], func(m *metadata.TargetsType) {
		m.Version, m.Targets = 9, map[string]*metadata.TargetFiles{}
		for i := range n {
			sum := sha256.Sum256(fmt.Append(nil, i))
			custom := json.RawMessage(fmt.Sprintf(`{"format":"klatch-target/1","kernel":{"distro":"debian-12","arch":"amd64","release":"6.1.0-%d-cloud-amd64","build_id":"%x"},"sequence":1,"fixes":[{"cve":"CVE-2026-%d","check":"passed"}]}`, i, sum[:20], 1000+i))
			m.Targets[fmt.Sprintf("debian-12/amd64/6.1.0-%d-cloud-amd64/klatch_1.lpb", i)] = &metadata.TargetFiles{Length: 4 << 20, Hashes: metadata.Hashes{"sha256": sum[:]}, Custom: &custom}
		}
	})
	list := r.Read("metadata/9." + releaseFile)
	sum := sha256.Sum256(list)
	tufsim.Forge(r, "metadata/2.snapshot.json", "metadata/9.snapshot.json", r.Keys.Snapshot.Signers, func(m *metadata.SnapshotType) {
		m.Version = 9
		m.Meta[releaseFile] = &metadata.MetaFiles{Version: 9, Length: int64(len(list)), Hashes: metadata.Hashes{"sha256": sum[:]}}
	})
	pin(r, 9, 9)
	return r
}

type counting struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c *counting) Write(b []byte) (int, error) {
	c.n.Add(int64(len(b)))
	return c.ResponseWriter.Write(b)
}
