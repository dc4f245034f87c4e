// SPDX-License-Identifier: Apache-2.0

package repo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/obs"
	"klatch/internal/server/blob"
	"klatch/internal/tufclient"
)

// Load reads the catalog from the files, as after a restart or when another
// process has synced. Metadata that has expired is still read: the machines
// refuse it by themselves, and a page must be able to say so.
func (r *Repo) Load(ctx context.Context, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.load(ctx, now)
}

func (r *Repo) load(ctx context.Context, now time.Time) error {
	left, leftSum, err := r.readLeftOut(ctx)
	if err != nil {
		return fmt.Errorf("read repository %s: %w", r.files.Place(), err)
	}
	snapshot, expires, err := r.look(ctx, now)
	if fault.CodeOf(err) == codeEmpty {
		r.install(&Catalog{Publisher: r.anchor.Publisher})
		return nil
	}
	if err != nil {
		return err
	}
	c := &Catalog{Publisher: r.anchor.Publisher, Version: snapshot.Timestamp, Expires: expires, leftSum: leftSum}
	var take []tufclient.Target
	var out []LeftOut
	listed := map[string]livepatch.Listed{}
	for _, t := range snapshot.Targets() {
		if l, ok := livepatch.ParseListed(t.Custom); ok {
			listed[t.Path] = l
		}
	}
	for _, t := range snapshot.Targets() {
		if l, ok := left[t.Path]; ok {
			full := about(t, listed)
			full.Why, full.Until = l.Why, l.Until
			out = append(out, full)
			continue
		}
		take = append(take, t)
		content, err := r.readTarget(ctx, t)
		var entry *Entry
		if err == nil {
			entry, err = r.open(t, content)
		}
		if err != nil {
			if ctx.Err() != nil {
				return err
			}
			r.log.LogAttrs(ctx, slog.LevelError, "file of the repository is broken", slog.String("target", t.Path), obs.Err(err))
			c.Problems = append(c.Problems, fmt.Sprintf("%s: %s", t.Path, err))
			continue
		}
		if entry != nil {
			c.Entries = append(c.Entries, *entry)
		}
	}
	c.LeftOut, c.chosen = bundlesOf(out), fingerprint(take, out)
	if err := r.withdrawn(ctx, c, snapshot.Targets()); err != nil {
		return fmt.Errorf("read repository %s: %w", r.files.Place(), err)
	}
	r.install(c)
	return nil
}

const codeEmpty fault.Code = "repository_empty"

// look verifies the metadata of the copy as a stranger would, at a time at
// which it had not expired.
func (r *Repo) look(ctx context.Context, now time.Time) (snapshot *tufclient.Snapshot, expires time.Time, err error) {
	expires, err = r.firstExpiry(ctx)
	if fault.KindOf(err) == fault.NotFound {
		return nil, expires, fault.New(fault.NotFound, codeEmpty, "%s holds no repository", r.files.Place()).WithHint("copy one first: klatch-server sync")
	}
	if err != nil {
		return nil, expires, err
	}
	if !now.Before(expires) {
		now = expires.Add(-time.Second)
	}
	scratch, err := os.MkdirTemp("", "klatch-catalog-")
	if err != nil {
		return nil, expires, err
	}
	defer os.RemoveAll(scratch) //nolint:errcheck // scratch
	snapshot, err = tufclient.Refresh(ctx, tufclient.Config{
		Root: r.anchor.Root, Dir: scratch, Now: now,
		BaseURL: "file://localhost", Client: &http.Client{Transport: storeTransport{r.files}},
	})
	if err != nil {
		err = fmt.Errorf("read repository %s: %w", r.files.Place(), err)
	}
	return snapshot, expires, err
}

func (r *Repo) install(c *Catalog) {
	slices.SortFunc(c.Entries, func(a, b Entry) int {
		return cmp.Or(strings.Compare(string(a.Kernel.Distro), string(b.Kernel.Distro)), strings.Compare(string(a.Kernel.Release), string(b.Kernel.Release)), cmp.Compare(b.Sequence, a.Sequence))
	})
	r.catalog.Store(c)
}

// Changed says whether the files are of another moment than the catalog.
func (r *Repo) Changed(ctx context.Context) bool {
	version, _, err := r.peek(ctx, "timestamp.json")
	if err != nil {
		return false
	}
	c := r.Catalog()
	if version != c.Version {
		return true
	}
	_, sum, err := r.readLeftOut(ctx)
	return err == nil && sum != c.leftSum
}

// firstExpiry is when the first of the metadata files runs out. Nothing is
// verified here; Load verifies the same files at the time that this gives.
func (r *Repo) firstExpiry(ctx context.Context) (time.Time, error) {
	_, first, err := r.peek(ctx, "timestamp.json")
	if err != nil {
		return first, err
	}
	names, err := r.files.List(ctx, "metadata/")
	if err != nil {
		return first, err
	}
	type last struct {
		version int64
		name    string
	}
	newest := map[string]last{}
	for _, n := range names {
		n = strings.TrimPrefix(n, "metadata/")
		number, role, ok := strings.Cut(n, ".")
		var version int64
		if _, err := fmt.Sscanf(number, "%d", &version); err != nil || !ok {
			continue // timestamp.json
		}
		if version > newest[role].version {
			newest[role] = last{version, n}
		}
	}
	for _, l := range newest {
		_, at, err := r.peek(ctx, l.name)
		if err != nil {
			return first, err
		}
		if at.Before(first) {
			first = at
		}
	}
	return first, nil
}

func (r *Repo) peek(ctx context.Context, name string) (version int64, expires time.Time, err error) {
	b, err := blob.Read(ctx, r.files, "metadata/"+name, maxMetadata)
	if err != nil {
		return 0, time.Time{}, err
	}
	var m struct {
		Signed struct {
			Version int64     `json:"version"`
			Expires time.Time `json:"expires"`
		} `json:"signed"`
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return 0, time.Time{}, fmt.Errorf("read %s: %w", name, err)
	}
	return m.Signed.Version, m.Signed.Expires, nil
}

// storeTransport reads the store as if it were a web server.
type storeTransport struct{ files blob.Store }

func (s storeTransport) RoundTrip(q *http.Request) (*http.Response, error) {
	answer := &http.Response{Status: "200 OK", StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Request: q}
	f, err := s.files.Open(q.Context(), strings.TrimPrefix(q.URL.Path, "/"))
	if k := fault.KindOf(err); k == fault.NotFound || k == fault.Invalid {
		answer.Status, answer.StatusCode, answer.Body = "404 Not Found", http.StatusNotFound, http.NoBody
		return answer, nil
	}
	if err != nil {
		return nil, errors.Join(err)
	}
	answer.Body, answer.ContentLength = f, f.Size()
	return answer, nil
}
