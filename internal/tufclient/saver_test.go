// SPDX-License-Identifier: Apache-2.0

package tufclient_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/tufclient"
	"klatch/internal/tufrepo"
)

// wire is a web server over a repository, with tags, that counts what it says
// and can break off.
type wire struct {
	*httptest.Server
	bodies, answers int
	ranges          []string
	cut             int64 // break targets off after so many bytes; 0: never
	garbage         bool  // and let them be lies
	deaf            bool  // answer every request with the whole
	endless         bool
}

func newWire(t *testing.T, r *tufsim.Repo) *wire {
	t.Helper()
	w := &wire{}
	w.Server = httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, q *http.Request) {
		w.answers++
		b, err := os.ReadFile(filepath.Join(r.Dir, filepath.FromSlash(q.URL.Path)))
		if err != nil {
			http.NotFound(out, q)
			return
		}
		isTarget := strings.HasPrefix(q.URL.Path, "/targets/")
		if isTarget {
			w.ranges = append(w.ranges, q.Header.Get("Range"))
			if w.garbage {
				b = bytes.Repeat([]byte("x"), len(b))
			}
			if w.deaf {
				q.Header.Del("Range")
			}
			if w.endless {
				for range 64 {
					if _, err := out.Write(b); err != nil {
						return
					}
				}
				return
			}
		}
		if isTarget && w.cut > 0 {
			from := int64(0)
			if _, err := fmt.Sscanf(q.Header.Get("Range"), "bytes=%d-", &from); err == nil {
				out.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(b)-1, len(b)))
				out.Header().Set("Content-Length", strconv.Itoa(len(b)-int(from)))
				out.WriteHeader(http.StatusPartialContent)
			} else {
				out.Header().Set("Content-Length", strconv.Itoa(len(b)))
			}
			out.Write(b[from:min(from+w.cut, int64(len(b)))])
			return // net/http notices that it is too short, and closes
		}
		sum := sha256.Sum256(b)
		out.Header().Set("ETag", `"`+hex.EncodeToString(sum[:8])+`"`)
		counted := &bodyCount{ResponseWriter: out, n: &w.bodies}
		http.ServeContent(counted, q, "", time.Time{}, bytes.NewReader(b))
	}))
	t.Cleanup(w.Close)
	return w
}

type bodyCount struct {
	http.ResponseWriter
	n *int
}

func (c *bodyCount) Write(b []byte) (int, error) {
	*c.n += len(b)
	return c.ResponseWriter.Write(b)
}

func saving(t *testing.T) (*http.Client, string) {
	dir := t.TempDir()
	return &http.Client{Transport: tufclient.Saver{Next: http.DefaultTransport, Dir: dir}}, dir
}

// TestALookWhenNothingIsNewCostsNoBody: the timestamp is the only file of
// metadata that is asked for and there, and it is not sent again; a newer one
// is. The count is what stands in the documentation.
func TestALookWhenNothingIsNewCostsNoBody(t *testing.T) {
	now := time.Now()
	r := tufsim.New(t, "saver", now)
	r.Publish(now, tufrepo.Target{Path: "a/b/6.1/x", Content: []byte("one")})
	w := newWire(t, r)
	client, dir := saving(t)
	cfg := tufclient.Config{Root: r.Root, Dir: t.TempDir(), BaseURL: w.URL, Client: client, Now: now}
	look := func() (*tufclient.Snapshot, int, int) {
		t.Helper()
		w.bodies, w.answers = 0, 0
		s, err := tufclient.Refresh(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		return s, w.bodies, w.answers
	}
	_, first, _ := look()
	_, again, answers := look()
	t.Logf("first look %d bytes of metadata, the next %d in %d requests", first, again, answers)
	if first == 0 || again != 0 || answers != 2 { // the next root, which is not there, and the timestamp
		t.Errorf("first %d, again %d bytes in %d requests", first, again, answers)
	}
	r.Publish(now, tufrepo.Target{Path: "a/b/6.1/y", Content: []byte("two")})
	if s, bytes, _ := look(); bytes == 0 || len(s.Targets()) != 2 {
		t.Errorf("the newer one was not seen: %d bytes", bytes)
	}
	// A damaged answer in the folder is not used.
	kept, err := filepath.Glob(filepath.Join(dir, "answer-*"))
	if err != nil || len(kept) != 1 {
		t.Fatal(kept, err)
	}
	if err := os.WriteFile(kept[0], []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, bytes, _ := look(); bytes == 0 || len(s.Targets()) != 2 {
		t.Errorf("with a damaged answer: %d bytes", bytes)
	}
}

// TestATransferGoesOnWhereItBroke, whatever the server does meanwhile: what
// arrives in the end is what was signed.
func TestATransferGoesOnWhereItBroke(t *testing.T) {
	now := time.Now()
	r := tufsim.New(t, "saver", now)
	var content bytes.Buffer
	for i := range 80_000 {
		fmt.Fprintf(&content, "%08d", i)
	}
	r.Publish(now, tufrepo.Target{Path: "a/b/6.1/x", Content: content.Bytes()})
	for _, tt := range []struct {
		name  string
		then  func(w *wire, try func() error) // after a transfer that broke off at 300,000 bytes
		asked string                          // ranges of all requests
		fails int
	}{
		{"it goes on", func(w *wire, _ func() error) { w.cut = 0 }, " bytes=300000-", 0},
		{"it breaks off again", func(w *wire, _ func() error) {}, " bytes=300000- bytes=600000-", 1},
		{"the server knows no ranges", func(w *wire, _ func() error) { w.cut, w.deaf = 0, true }, " bytes=300000-", 0},
		{"the beginning was a lie", func(w *wire, _ func() error) { w.cut, w.garbage = 0, false }, " bytes=300000- ", 0},
		{"the rest is a lie", func(w *wire, try func() error) {
			w.cut, w.garbage = 0, true
			if err := try(); fault.CodeOf(err) != "target_digest" {
				t.Error(err)
			}
			w.garbage = false
		}, " bytes=300000-  ", 0},
		{"the rest has no end", func(w *wire, try func() error) {
			w.cut, w.endless = 0, true
			if err := try(); fault.CodeOf(err) != "target_digest" {
				t.Error(err)
			}
			w.endless = false
		}, " bytes=300000- ", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWire(t, r)
			client, dir := saving(t)
			s, err := tufclient.Refresh(t.Context(), tufclient.Config{Root: r.Root, Dir: t.TempDir(), BaseURL: w.URL, Client: client, Now: now})
			if err != nil {
				t.Fatal(err)
			}
			target, err := s.Target("a/b/6.1/x")
			if err != nil {
				t.Fatal(err)
			}
			var got []byte
			try := func() error {
				got, err = s.Download(t.Context(), target, 1<<20)
				return err
			}
			w.cut, w.garbage = 300_000, strings.HasPrefix(tt.name, "the beginning")
			if err := try(); fault.KindOf(err) != fault.Unavailable {
				t.Fatalf("a transfer that breaks off: %v", err)
			}
			tt.then(w, try)
			for range tt.fails {
				if err := try(); fault.KindOf(err) != fault.Unavailable {
					t.Errorf("breaks off again: %v", err)
				}
			}
			if err := try(); err != nil || !bytes.Equal(got, content.Bytes()) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if asked := strings.Join(w.ranges, " "); asked != tt.asked {
				t.Errorf("asked for %q, want %q", asked, tt.asked)
			}
			if left, err := filepath.Glob(filepath.Join(dir, "begun-*")); err != nil || len(left) != 0 {
				t.Errorf("left over: %q, %v", left, err)
			}
		})
	}
}
