// SPDX-License-Identifier: Apache-2.0

package tufclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/fault"
)

// A file must arrive at this rate at least, after a grace time for slow
// starts. A server that drips bytes can so waste minutes, not hours.
const (
	slowest = 64 << 10 // bytes a second
	grace   = time.Minute
)

// fetcher is what go-tuf downloads with. It lives for one refresh, so that it
// can carry its context, which go-tuf's interface has no room for.
type fetcher struct {
	ctx     context.Context
	client  *http.Client
	timeout time.Duration // for one file; 0: from the file's size

	// roots collects the root files that were downloaded, by name. Only those
	// up to the version that was accepted in the end are verified.
	roots map[string][]byte

	resumed bool // the last file began with what an earlier transfer left
}

// DownloadFile gets one file of at most limit bytes.
func (f *fetcher) DownloadFile(address string, limit int64, _ time.Duration) ([]byte, error) {
	timeout := f.timeout
	if timeout == 0 {
		timeout = grace + time.Duration(limit/slowest)*time.Second
	}
	ctx, cancel := context.WithTimeout(f.ctx, timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_url", "get %s: %w", address, err)
	}
	unavailable := func(err error) error {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) && f.ctx.Err() == nil {
			err = fmt.Errorf("not complete after %s: %w", timeout, err)
		}
		return fault.New(fault.Unavailable, codeUnavailable, "get %s: %w", address, err).
			WithHint("check the network and the address; it is tried again later")
	}
	answer, err := f.client.Do(req)
	if err != nil {
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err // the address is in the text already
		}
		if f, ok := errors.AsType[*fault.Error](err); ok {
			return nil, f // of the caller's own client, which knows more
		}
		return nil, unavailable(err)
	}
	defer answer.Body.Close() //nolint:errcheck // read only
	if answer.StatusCode != http.StatusOK {
		return nil, &metadata.ErrDownloadHTTP{StatusCode: answer.StatusCode, URL: address}
	}
	f.resumed = answer.Header.Get(resumedHeader) != ""
	b, err := io.ReadAll(io.LimitReader(answer.Body, limit+1))
	if err != nil {
		return nil, unavailable(err)
	}
	if int64(len(b)) > limit {
		return nil, fault.New(fault.Untrusted, codeMalformed, "get %s: over the limit of %d bytes", address, limit)
	}
	if name := path.Base(req.URL.Path); f.roots != nil && strings.HasSuffix(name, ".root.json") {
		f.roots[name] = b
	}
	return b, nil
}

// DirTransport serves a folder with a repository in it as if it were a web
// server. No path leads out of the folder, through symbolic links either.
func DirTransport(dir string) http.RoundTripper { return dirTransport(dir) }

type dirTransport string

func (d dirTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	root, err := os.OpenRoot(string(d))
	if err != nil {
		return nil, err
	}
	defer root.Close() //nolint:errcheck // read only
	name := strings.TrimPrefix(path.Clean("/"+r.URL.Path), "/")
	answer := &http.Response{Status: "200 OK", StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Request: r, ContentLength: -1}
	f, err := root.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		answer.Status, answer.StatusCode, answer.Body = "404 Not Found", http.StatusNotFound, http.NoBody
		return answer, nil
	}
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("open %s: not a regular file", name), err, f.Close())
	}
	answer.Body = f
	return answer, nil
}

// Source makes base address and client of what a person wrote: an http or
// https address, a file:// address, or a folder's path. The client is used
// for addresses on the network.
func Source(from string, client *http.Client) (baseURL string, c *http.Client, err error) {
	u, err := url.Parse(from)
	switch {
	case err == nil && (u.Scheme == "http" || u.Scheme == "https"):
		if u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return "", nil, fault.New(fault.Invalid, "bad_url", "%q is not a plain address", u.Redacted())
		}
		return strings.TrimSuffix(from, "/"), client, nil
	case err == nil && u.Scheme == "file":
		from = u.Path
	case err == nil && strings.Contains(from, "://"):
		return "", nil, fault.New(fault.Invalid, "bad_url", "scheme of %q is not http, https or file", u.Redacted())
	}
	dir, err := filepath.Abs(from)
	if err != nil {
		return "", nil, err
	}
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return "", nil, fault.New(fault.NotFound, "source_missing", "repository %s is not a folder", dir)
	}
	return "file://localhost", &http.Client{Transport: DirTransport(dir)}, nil
}
