// SPDX-License-Identifier: Apache-2.0

//go:build system

package main_test

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/livepatch"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/testkit/s3server"
	"klatch/internal/tufclient"
)

// TestTheCopyMovesToAnObjectStoreAndBack while serve runs: the machines see the
// same repository before, meanwhile and after; a place that is not whole or not
// ours is not switched to.
func TestTheCopyMovesToAnObjectStoreAndBack(t *testing.T) {
	server := s3server.Start(t)
	s := newStage(t)
	k := pubsim.Kernel("6.1.0-50-cloud-amd64", 1)
	p := s.publisher
	for n := livepatch.Sequence(1); n <= 3; n++ {
		p.Release(time.Now(), k, n, "CVE-2026-0001")
	}
	s.init()
	s.run(0, "klatch-server", "configure", "--upstream", s.upstream, "--interval", "1s")
	s.start()
	s.await("copied", func(st status) bool { return st.Livepatches == 3 })

	out, _ := s.run(0, "klatch-fleet", "token", "create")
	seen := func(livepatches int) {
		t.Helper()
		tr := &http.Transport{TLSClientConfig: s.trusting(strings.TrimSpace(out))}
		defer tr.CloseIdleConnections()
		snapshot, err := tufclient.Refresh(t.Context(), tufclient.Config{Root: p.Root, Dir: t.TempDir(), BaseURL: s.fleet, Now: time.Now(), Client: &http.Client{Transport: tr}})
		if err != nil {
			t.Fatal(err)
		}
		if n := len(snapshot.Targets()); n != livepatches {
			t.Errorf("%d livepatches, want %d", n, livepatches)
		}
		for _, target := range snapshot.Targets() {
			if _, err := snapshot.Download(t.Context(), target, livepatch.MaxBundle); err != nil {
				t.Error(err)
			}
		}
	}
	seen(3)

	// Somebody else's repository is there: nothing is switched.
	foreign := pubsim.New(t, "foreign", time.Now())
	foreign.Release(time.Now(), k, 1)
	_, stderr := s.run(3, "klatch-server", "storage", "move", "--to", foreign.Dir)
	if !strings.Contains(stderr, "does not verify") || !strings.Contains(stderr, "hint: ") {
		t.Error(stderr)
	}
	bucket := server.Bucket()
	s.run(3, "klatch-server", "storage", "move", "--to", strings.Replace(bucket, "bucket-", "no-bucket-", 1))
	s.run(2, "klatch-server", "storage", "move", "--to", "relative/folder")

	s.run(0, "klatch-server", "storage", "move", "--to", bucket)
	if now, _ := s.run(0, "klatch-server", "storage"); now != bucket+"\n" {
		t.Error(now)
	}
	if err := os.Rename(filepath.Join(s.data, "repository"), filepath.Join(s.data, "old")); err != nil {
		t.Fatal(err)
	}
	p.Release(time.Now(), k, 4, "CVE-2026-0001")
	s.await("the next one in the object store", func(st status) bool { return st.Livepatches == 4 && len(st.Problems) == 0 })
	for end := time.Now().Add(30 * time.Second); !strings.Contains(s.log.String(), "storage moved") && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
	}
	seen(4)
	s.kill()
	s.start()
	seen(4)

	// The bucket is a repository by itself, with the headers that caches need.
	stamp, err := filepath.Glob(filepath.Join(server.Dir, "bucket-1", "klatch", "metadata", "timestamp.json"))
	if err != nil || len(stamp) != 1 {
		t.Errorf("%q, %v", stamp, err)
	}
	moved := filepath.Join(t.TempDir(), "moved")
	s.run(0, "klatch-server", "storage", "move", "--to", moved)
	if _, err := os.Stat(filepath.Join(moved, "metadata", "timestamp.json")); err != nil {
		t.Error(err)
	}
	if st := s.status(); st.Livepatches != 4 || len(st.Problems) != 0 {
		t.Errorf("%+v", st)
	}
	_, stderr = s.run(3, "klatch-server", "storage", "move", "--to", moved)
	if !strings.Contains(stderr, "there already") {
		t.Error(stderr)
	}
}
