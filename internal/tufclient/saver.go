// SPDX-License-Identifier: Apache-2.0

package tufclient

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"klatch/internal/durable"
)

// Saver saves bytes: a file that changes under its name is asked for with "only
// if it is another one" (RFC 9110, section 13), and a target whose transfer
// broke off is asked for from there on (section 14). What it hands over is
// verified like everything from a server. So is what lies in its folder: who
// puts lies into it, or answers with lies, costs bytes and nothing else.
//
// One process at a time may use a folder.
type Saver struct {
	Next http.RoundTripper
	Dir  string
}

// Limits of the folder: how many answers and how many begun transfers are
// kept, and how long an answer may be.
const (
	maxKept   = 32
	maxBegun  = 8
	maxAnswer = 8 << 20

	// minResumed is from which length on a transfer is worth a file.
	minResumed = 256 << 10

	// resumedHeader marks an answer that began in the folder.
	resumedHeader = "Klatch-Resumed"
)

// lengthKey is for the signed length of the target that a request is for.
type lengthKey struct{}

var (
	changingPath = regexp.MustCompile(`/(metadata/timestamp\.json|left-out\.json|log/[0-9a-f]{8}/(checkpoint|cosigned))$`)
	targetPath   = regexp.MustCompile(`/targets/(?:[^/]+/)*([0-9a-f]{64})\.[^/]+$`)
)

// RoundTrip sends one request.
func (s Saver) RoundTrip(q *http.Request) (*http.Response, error) {
	if q.Method != http.MethodGet || q.Header.Get("Range") != "" {
		return s.Next.RoundTrip(q)
	}
	if changingPath.MatchString(q.URL.Path) {
		return s.revalidate(q)
	}
	length, _ := q.Context().Value(lengthKey{}).(int64)
	if m := targetPath.FindStringSubmatch(q.URL.Path); m != nil && length >= minResumed {
		return s.resume(q, m[1], length)
	}
	return s.Next.RoundTrip(q)
}

// CloseIdleConnections is for http.Client.
func (s Saver) CloseIdleConnections() {
	if c, ok := s.Next.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// kept is an answer that may be used again.
type kept struct {
	URL    string `json:"url"`
	ETag   string `json:"etag"`
	SHA256 string `json:"sha256"`
	Body   []byte `json:"body"`
}

func (s Saver) revalidate(q *http.Request) (*http.Response, error) {
	sum := sha256.Sum256([]byte(q.URL.String()))
	name := filepath.Join(s.Dir, "answer-"+hex.EncodeToString(sum[:12]))
	old, have := readKept(name, q.URL.String())
	if have {
		q = q.Clone(q.Context())
		q.Header.Set("If-None-Match", old.ETag)
	}
	a, err := s.Next.RoundTrip(q)
	if err != nil {
		return a, err
	}
	if have && a.StatusCode == http.StatusNotModified {
		if err := a.Body.Close(); err != nil {
			return nil, err
		}
		a.Status, a.StatusCode = "200 OK", http.StatusOK
		a.Body, a.ContentLength = io.NopCloser(bytes.NewReader(old.Body)), int64(len(old.Body))
		return a, nil
	}
	next := kept{URL: q.URL.String(), ETag: a.Header.Get("ETag")}
	// Times are not used: they have whole seconds, in which two timestamps may
	// be written.
	if a.StatusCode != http.StatusOK || next.ETag == "" {
		return a, nil
	}
	a.Body = &keeping{ReadCloser: a.Body, done: func(body []byte) {
		digest := sha256.Sum256(body)
		next.SHA256, next.Body = hex.EncodeToString(digest[:]), body
		s.keep(name, next)
	}}
	return a, nil
}

// readKept gives a stored answer that is whole and of this address.
func readKept(name, url string) (kept, bool) {
	var k kept
	b, err := durable.ReadFile(name, 2*maxAnswer)
	if err != nil || json.Unmarshal(b, &k) != nil {
		return k, false
	}
	sum := sha256.Sum256(k.Body)
	return k, k.URL == url && k.SHA256 == hex.EncodeToString(sum[:]) && k.ETag != ""
}

// keep stores an answer. If that does not work the next one costs its bytes
// again, and nobody needs to hear of it.
func (s Saver) keep(name string, k kept) {
	b, err := json.Marshal(k)
	if err == nil && os.MkdirAll(s.Dir, 0o700) == nil {
		prune(s.Dir, "answer-", maxKept)
		_ = durable.WriteFile(name, b, 0o600)
	}
}

// keeping remembers a body while it is read, and hands it over at its end.
type keeping struct {
	io.ReadCloser
	body bytes.Buffer
	over bool
	done func([]byte)
}

func (k *keeping) Read(p []byte) (int, error) {
	n, err := k.ReadCloser.Read(p)
	if k.over = k.over || k.body.Len()+n > maxAnswer; !k.over {
		k.body.Write(p[:n])
	}
	if errors.Is(err, io.EOF) && !k.over {
		k.over = true
		k.done(k.body.Bytes())
	}
	return n, err
}

// resume asks for the rest of a target whose beginning is here.
func (s Saver) resume(q *http.Request, digest string, length int64) (*http.Response, error) {
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return nil, err
	}
	name := filepath.Join(s.Dir, "begun-"+digest)
	begun, err := openBegun(name)
	if err != nil {
		return nil, err
	}
	size, err := begun.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, errors.Join(err, begun.Close())
	}
	if size >= length { // whole, and yet not taken: lies
		size = 0
	}
	ask := q
	if size > 0 {
		ask = q.Clone(q.Context())
		ask.Header.Set("Range", fmt.Sprintf("bytes=%d-", size))
	} else {
		prune(s.Dir, "begun-", maxBegun)
	}
	a, err := s.Next.RoundTrip(ask)
	if err != nil {
		return nil, errors.Join(err, begun.Close())
	}
	rest := &transfer{body: a.Body, begun: begun, name: name, left: length}
	switch {
	case size > 0 && a.StatusCode == http.StatusPartialContent && strings.HasPrefix(a.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", size)):
		a.Status, a.StatusCode, a.ContentLength = "200 OK", http.StatusOK, -1
		a.Header.Set(resumedHeader, "yes")
		rest.before, rest.left = io.NewSectionReader(begun, 0, size), length-size
	case a.StatusCode == http.StatusOK: // the whole, whatever was asked
		if err := begun.Truncate(0); err != nil {
			return nil, errors.Join(err, a.Body.Close(), begun.Close())
		}
		if _, err := begun.Seek(0, io.SeekStart); err != nil {
			return nil, errors.Join(err, a.Body.Close(), begun.Close())
		}
	case size > 0: // such as 416: what is here cannot be the beginning
		if err := errors.Join(a.Body.Close(), begun.Close(), os.Remove(name)); err != nil {
			return nil, err
		}
		return s.Next.RoundTrip(q)
	default:
		if err := errors.Join(begun.Close(), os.Remove(name)); err != nil {
			return nil, errors.Join(err, a.Body.Close())
		}
		return a, nil
	}
	a.Body = rest
	return a, nil
}

func openBegun(name string) (*os.File, error) {
	if st, err := os.Lstat(name); err == nil && !st.Mode().IsRegular() {
		if err := os.Remove(name); err != nil {
			return nil, err
		}
	}
	return os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
}

// transfer hands over what is here, then the body, and writes that down. When
// the body has ended as it should the file is removed: the reader has all of
// it, and if it is not what was signed, the next try must not begin with it.
type transfer struct {
	before *io.SectionReader // nil: nothing, or read
	body   io.ReadCloser
	begun  *os.File
	name   string
	left   int64 // of the signed length
	ended  bool
}

func (t *transfer) Read(p []byte) (int, error) {
	if t.before != nil {
		n, err := t.before.Read(p)
		if !errors.Is(err, io.EOF) {
			return n, err
		}
		t.before = nil
		if n > 0 {
			return n, nil
		}
	}
	n, err := t.body.Read(p)
	if _, e := t.begun.Write(p[:n]); e != nil { // a full disk must not keep a livepatch out
		t.ended = true
	}
	if t.left -= int64(n); errors.Is(err, io.EOF) || t.left < 0 {
		t.ended = true
	}
	return n, err
}

func (t *transfer) Close() error {
	err := errors.Join(t.body.Close(), t.begun.Close())
	if t.ended {
		if e := os.Remove(t.name); !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}

// prune removes the oldest files of a sort, so that one more can be added.
func prune(dir, prefix string, most int) {
	found, err := filepath.Glob(filepath.Join(dir, prefix+"*"))
	if err != nil || len(found) < most {
		return
	}
	age := func(name string) int64 {
		st, err := os.Stat(name)
		if err != nil {
			return 0
		}
		return st.ModTime().UnixNano()
	}
	slices.SortFunc(found, func(a, b string) int { return int(min(1, max(-1, age(a)-age(b)))) })
	for _, name := range found[:len(found)-most+1] {
		_ = os.Remove(name) // it will be tried again
	}
}
