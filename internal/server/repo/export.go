// SPDX-License-Identifier: Apache-2.0

package repo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/server/archive"
	"klatch/internal/server/blob"
	"klatch/internal/tufclient"
)

// maxLogFile limits a file of the log, in bytes: 256 entries.
const maxLogFile = 1 << 20

// Export writes what this copy holds into one file: all metadata, logs,
// policies and recalls, and the livepatches that the filter lets through. It
// reads its own files as a stranger would and exports nothing that does not
// verify. What the copy itself leaves out, or what is damaged here, is not in
// the file; left says which. More are files of the operator's repository, which
// were verified by who gives them.
func (r *Repo) Export(ctx context.Context, w io.Writer, filter Filter, more map[string][]byte, now time.Time) (m archive.Manifest, left []LeftOut, err error) {
	if err := (Rules{Filter: filter}).Validate(); err != nil {
		return m, nil, err
	}
	held, targets, m, left, err := r.gather(ctx, filter, now)
	if err != nil {
		return m, nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(more)) {
		held[name] = more[name]
		m.Files = append(m.Files, entry(name, more[name]))
	}
	return m, left, archive.Write(ctx, w, m, func(ctx context.Context, name string) ([]byte, error) {
		if b, ok := held[name]; ok {
			return b, nil
		}
		return r.readTarget(ctx, targets[name])
	})
}

// gather reads metadata and logs into memory, under the lock, so that they are
// of one moment. Targets never change and are read later.
func (r *Repo) gather(ctx context.Context, filter Filter, now time.Time) (held map[string][]byte, targets map[string]tufclient.Target, m archive.Manifest, left []LeftOut, err error) {
	if err = os.MkdirAll(r.memory, 0o700); err != nil {
		return
	}
	unlock, err := r.lock(ctx)
	if err != nil {
		return
	}
	defer func() { err = errors.Join(err, unlock()) }()
	snapshot, expires, err := r.look(ctx, now)
	if err != nil {
		return
	}
	ours, _, err := r.readLeftOut(ctx)
	if err != nil {
		return
	}
	take, left := choose(snapshot.Targets(), Rules{Filter: filter}, func(t tufclient.Target) (Why, bool) { l, ok := ours[t.Path]; return l.Why, ok }, now)
	m = archive.Manifest{Publisher: r.anchor.Publisher, Created: now.UTC().Truncate(time.Second), Filter: filter.String(), Metadata: snapshot.Timestamp, Expires: expires.UTC()}
	held, targets = map[string][]byte{}, map[string]tufclient.Target{}
	add := func(name string, b []byte) {
		if _, twice := held[name]; twice {
			return
		}
		held[name] = b
		m.Files = append(m.Files, entry(name, b))
	}
	names, err := r.files.List(ctx, "")
	if err != nil {
		return
	}
	for _, n := range names {
		limit := int64(0)
		switch {
		case rootVersion(n) > 0: // older roots too: the reader may have stayed there
			limit = maxMetadata
		case strings.HasPrefix(n, "log/") && Servable(n):
			limit = maxLogFile
		}
		if limit == 0 {
			continue
		}
		var b []byte
		if b, err = blob.Read(ctx, r.files, n, limit); err != nil {
			return
		}
		add(n, b)
	}
	for _, f := range snapshot.Files() {
		add("metadata/"+f.Name, f.Content)
	}
	for _, t := range take {
		targets[targetName(t)] = t
		m.Files = append(m.Files, archive.File{Name: targetName(t), Bytes: t.Bytes, SHA256: t.SHA256})
		m.Recalls = max(m.Recalls, livepatch.RecallsVersion(t.Path))
	}
	return held, targets, m, bundlesOf(left), nil
}

func entry(name string, b []byte) archive.File {
	sum := sha256.Sum256(b)
	return archive.File{Name: name, Bytes: int64(len(b)), SHA256: hex.EncodeToString(sum[:])}
}

var rootPattern = regexp.MustCompile(`^metadata/([1-9][0-9]{0,8})\.root\.json$`)

// rootVersion is that of a root's file name, 0 for another file.
func rootVersion(name string) int64 {
	m := rootPattern.FindStringSubmatch(name)
	if m == nil {
		return 0
	}
	v, err := strconv.ParseInt(m[1], 10, 64)
	if err != nil {
		return 0
	}
	return v
}

// Import is Sync from an export: everything in it is verified against the
// anchor before anything is switched, in the same order and with the same
// limits. What is signed and neither in the file nor here is left out, and
// named. A run that was killed is completed by the next one.
func (r *Repo) Import(ctx context.Context, a *archive.Archive, rules Rules, tell func(done, total int, t tufclient.Target), now time.Time) (Result, error) {
	if a.Publisher != r.anchor.Publisher {
		return Result{}, fault.New(fault.Untrusted, "import_foreign", "the export is of publisher %.80q, this server trusts %q", a.Publisher, r.anchor.Publisher).
			WithHint("export at a server with the same trust anchor")
	}
	if err := r.rootGap(a); err != nil {
		return Result{}, err
	}
	res, err := r.Sync(ctx, Source{
		BaseURL: "file://localhost", Client: Reader(a), Rules: rules, Progress: tell,
		Has: func(blobPath string) bool { return a.Has("targets/" + blobPath) },
	}, now)
	switch fault.CodeOf(err) {
	case "metadata_expired":
		err = fault.New(fault.Untrusted, "metadata_expired", "%w", err).
			WithHint("newer metadata is needed: the export was made %s and its metadata lived until %s; copy at the source first, then export again", a.Created.Format(time.RFC3339), a.Expires.Format(time.RFC3339))
	case "metadata_rollback":
		err = fault.New(fault.Untrusted, "metadata_rollback", "%w", err).
			WithHint("the export (metadata %d of %s) is older than what this server has seen; bring a newer one", a.Metadata, a.Created.Format(time.RFC3339))
	}
	return res, err
}

// rootGap names the roots that are missing between the one that this server
// trusts and those in the file. Each root is signed by the keys of the one
// before, so none can be skipped.
func (r *Repo) rootGap(a *archive.Archive) error {
	have, err := tufclient.TrustedRoot(r.memory, r.anchor.Root)
	if err != nil {
		return err
	}
	newest := int64(0)
	for _, f := range a.Files {
		newest = max(newest, rootVersion(f.Name))
	}
	var gap []string
	for v := have + 1; v <= newest && len(gap) < 20; v++ {
		if !a.Has("metadata/" + strconv.FormatInt(v, 10) + ".root.json") {
			gap = append(gap, strconv.FormatInt(v, 10))
		}
	}
	if len(gap) == 0 {
		return nil
	}
	return fault.New(fault.Untrusted, "import_root_gap", "this server trusts root %d, the export leads to root %d, and these are not in it: %s", have, newest, strings.Join(gap, ", ")).
		WithHint("export at a server whose trust anchor is not newer than this one's: it has all roots in between")
}

// Reader reads the files of an export as if file://localhost served them.
func Reader(a *archive.Archive) *http.Client { return &http.Client{Transport: archiveTransport{a}} }

type archiveTransport struct{ a *archive.Archive }

func (t archiveTransport) RoundTrip(q *http.Request) (*http.Response, error) {
	answer := &http.Response{Status: "200 OK", StatusCode: http.StatusOK, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Request: q}
	f, ok := t.a.Read(strings.TrimPrefix(q.URL.Path, "/"))
	if !ok {
		answer.Status, answer.StatusCode, answer.Body = "404 Not Found", http.StatusNotFound, http.NoBody
		return answer, nil
	}
	answer.Body, answer.ContentLength = io.NopCloser(f), f.Size()
	return answer, nil
}
