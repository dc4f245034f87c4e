// SPDX-License-Identifier: Apache-2.0

// Package blobtest is the conformance suite of package blob: every
// implementation runs it. Tests only.
package blobtest

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/server/blob"
)

// Run checks one implementation. open gives an empty store.
func Run(t *testing.T, open func(t *testing.T) blob.Store) {
	for name, test := range map[string]func(*testing.T, blob.Store){
		"what was put is read":                        putAndRead,
		"a file that is not there is not found":       missing,
		"a file over the limit is refused":            limit,
		"a part is read from where one seeks":         seek,
		"names below a prefix are listed, sorted":     list,
		"a deleted file is gone, twice is no error":   remove,
		"names that lead elsewhere are refused":       names,
		"a reader sees the old or the new, whole":     replace,
		"an empty file is a file":                     empty,
		"a large file arrives whole":                  large,
		"a name may be the beginning of another name": beginnings,
	} {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

var header = blob.Header{ContentType: "application/octet-stream", CacheControl: "no-cache"}

func put(t *testing.T, s blob.Store, name string, content []byte) {
	t.Helper()
	if err := s.Put(t.Context(), name, content, header); err != nil {
		t.Fatal(err)
	}
}

func want(t *testing.T, s blob.Store, name string, content []byte) {
	t.Helper()
	b, err := blob.Read(t.Context(), s, name, int64(len(content)))
	if err != nil || !bytes.Equal(b, content) {
		t.Errorf("%s: %d bytes, want %d: %v", name, len(b), len(content), err)
	}
}

func putAndRead(t *testing.T, s blob.Store) {
	put(t, s, "targets/debian-12/amd64/6.1.0-50-cloud-amd64/ab.klatch_1.lpb", []byte("one"))
	want(t, s, "targets/debian-12/amd64/6.1.0-50-cloud-amd64/ab.klatch_1.lpb", []byte("one"))
	put(t, s, "targets/debian-13/amd64/6.12.9+deb13-amd64/ab.klatch_1.lpb", []byte("two"))
	want(t, s, "targets/debian-13/amd64/6.12.9+deb13-amd64/ab.klatch_1.lpb", []byte("two"))
	put(t, s, "metadata/timestamp.json", []byte("{}"))
	put(t, s, "metadata/timestamp.json", []byte(`{"newer":1}`))
	want(t, s, "metadata/timestamp.json", []byte(`{"newer":1}`))
	if s.Place() == "" {
		t.Error("the store does not say where it is")
	}
}

func missing(t *testing.T, s blob.Store) {
	for range 2 { // in an empty store, and beside others
		if _, err := s.Open(t.Context(), "metadata/timestamp.json"); fault.KindOf(err) != fault.NotFound {
			t.Errorf("kind %q: %v", fault.KindOf(err), err)
		}
		put(t, s, "metadata/1.root.json", []byte("x"))
	}
	if _, err := s.Open(t.Context(), "metadata"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a folder opens as a file: %v", err)
	}
}

func limit(t *testing.T, s blob.Store) {
	put(t, s, "a/b", []byte("12345"))
	if _, err := blob.Read(t.Context(), s, "a/b", 4); err == nil {
		t.Error("five bytes passed a limit of four")
	}
	want(t, s, "a/b", []byte("12345"))
}

func seek(t *testing.T, s blob.Store) {
	put(t, s, "a/b", []byte("0123456789"))
	r, err := s.Open(t.Context(), "a/b")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close() //nolint:errcheck // read only
	if r.Size() != 10 {
		t.Errorf("size %d", r.Size())
	}
	for _, tt := range []struct {
		offset int64
		whence int
		want   string
	}{{4, io.SeekStart, "456789"}, {0, io.SeekStart, "0123456789"}, {-3, io.SeekEnd, "789"}, {0, io.SeekEnd, ""}} {
		if _, err := r.Seek(tt.offset, tt.whence); err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil || string(b) != tt.want {
			t.Errorf("from %d: %q, want %q: %v", tt.offset, b, tt.want, err)
		}
	}
}

func list(t *testing.T, s blob.Store) {
	all := []string{"log/0a/checkpoint", "log/0a/tile/0/000", "log/0a/tile/0/000.p/3", "logx/1", "metadata/1.root.json"}
	for _, n := range slices.Backward(all) {
		put(t, s, n, []byte("x"))
	}
	for prefix, want := range map[string][]string{"": all, "log/": all[:3], "log/0a/tile/": all[1:3], "none/": nil} {
		got, err := s.List(t.Context(), prefix)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("below %q: %q, %v", prefix, got, err)
		}
	}
	if _, err := s.List(t.Context(), "log"); fault.KindOf(err) != fault.Invalid {
		t.Errorf("a prefix in the middle of a name: %v", err)
	}
}

func remove(t *testing.T, s blob.Store) {
	put(t, s, "a/b", []byte("x"))
	put(t, s, "a/c", []byte("y"))
	for range 2 {
		if err := s.Delete(t.Context(), "a/b"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Open(t.Context(), "a/b"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("still there: %v", err)
	}
	want(t, s, "a/c", []byte("y"))
	if err := s.Delete(t.Context(), "never/was"); err != nil {
		t.Error(err)
	}
}

func names(t *testing.T, s blob.Store) {
	for _, n := range []string{"", "/", "/a", "a/", "a//b", "../a", "a/../b", "a/.b", ".lock", "a\x00", "a b", "a\\b", "ä", "a?b", "a#b", "a%2fb", strings.Repeat("a", 1000)} {
		_, openErr := s.Open(t.Context(), n)
		for what, err := range map[string]error{"open": openErr, "put": s.Put(t.Context(), n, nil, header), "delete": s.Delete(t.Context(), n)} {
			if fault.KindOf(err) != fault.Invalid {
				t.Errorf("%s %.20q: %v", what, n, err)
			}
		}
	}
	if all, err := s.List(t.Context(), ""); err != nil || len(all) != 0 {
		t.Errorf("%q, %v", all, err)
	}
}

func replace(t *testing.T, s blob.Store) {
	versions := [][]byte{bytes.Repeat([]byte("a"), 100_000), bytes.Repeat([]byte("b"), 50_000)}
	put(t, s, "a/b", versions[0])
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range 20 {
			if err := s.Put(t.Context(), "a/b", versions[i%2], header); err != nil {
				t.Error(err)
			}
		}
	})
	for range 40 {
		b, err := blob.Read(t.Context(), s, "a/b", 1<<20)
		if err != nil || !bytes.Equal(b, versions[0]) && !bytes.Equal(b, versions[1]) {
			t.Errorf("%d bytes that were never put, %v", len(b), err)
			break
		}
	}
	wg.Wait()
}

func empty(t *testing.T, s blob.Store) {
	put(t, s, "a/b", nil)
	want(t, s, "a/b", nil)
}

func large(t *testing.T, s blob.Store) {
	var b bytes.Buffer
	for i := range 700_000 { // over the 5 MiB from which object stores cut in parts
		fmt.Fprintf(&b, "%08d", i)
	}
	put(t, s, "a/large", b.Bytes())
	want(t, s, "a/large", b.Bytes())
}

func beginnings(t *testing.T, s blob.Store) {
	put(t, s, "log/0a/tile/0/001", []byte("full"))
	put(t, s, "log/0a/tile/0/001.p/7", []byte("part"))
	want(t, s, "log/0a/tile/0/001", []byte("full"))
	want(t, s, "log/0a/tile/0/001.p/7", []byte("part"))
}
