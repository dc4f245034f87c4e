// SPDX-License-Identifier: Apache-2.0

// Package repo keeps the server's copy of the publisher's repository: it
// verifies and copies (Sync), knows what is published (Catalog) and serves the
// files (Handler). It holds no key and can sign nothing; what it serves, every
// machine verifies again. The catalog is read from the files at each start and
// is never a truth of its own. Start with Sync.
package repo

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/fleet"
	"klatch/internal/livepatch"
	"klatch/internal/obs"
	"klatch/internal/trust"
	"klatch/internal/tufclient"
)

// maxOther limits targets that are no livepatch, in bytes: policies and lists
// of later versions, which this one copies without reading.
const maxOther = 4 << 20

// maxMetadata limits one metadata file, in bytes (go-tuf's own for targets).
const maxMetadata = 5_000_000

// Entry is one published livepatch.
type Entry struct {
	fleet.Published
	Bytes     int64
	SHA256    string // of the bundle
	Functions int
}

// Catalog is what the repository offers at one moment. It does not change.
type Catalog struct {
	Publisher string
	Entries   []Entry   // by kernel release, then newest sequence first
	Version   int64     // of the timestamp; 0 if nothing is published
	Expires   time.Time // of the metadata that runs out first
	Recalls   int64     // version of the publisher's recalls; 0 for none
	Problems  []string  // files that are signed and not whole here
}

// Published is the list that fleet.Decide chooses from.
func (c *Catalog) Published() []fleet.Published {
	list := make([]fleet.Published, len(c.Entries))
	for i, e := range c.Entries {
		list[i] = e.Published
	}
	return list
}

// Repo is the copy in a folder.
type Repo struct {
	dir    string // metadata/ and targets/
	memory string // what was accepted from upstream (package tufclient)
	anchor *trust.Anchor
	log    *slog.Logger

	catalog atomic.Pointer[Catalog]

	mu    sync.Mutex       // one Sync or Load at a time
	known map[string]Entry // opened bundles by digest
}

// New names the folders. Load or Sync fills the catalog.
func New(dir, memory string, anchor *trust.Anchor, log *slog.Logger) *Repo {
	r := &Repo{dir: dir, memory: memory, anchor: anchor, log: log, known: map[string]Entry{}}
	r.catalog.Store(&Catalog{Publisher: anchor.Publisher})
	return r
}

// Catalog is what is published now.
func (r *Repo) Catalog() *Catalog { return r.catalog.Load() }

// Result says what a Sync did.
type Result struct {
	Changed      bool
	Copied, Kept int
	Livepatches  int
	Version      int64
	Expires      time.Time
	Broken       []string // nothing was switched because of these
}

// Sync brings the copy to the publisher's newest state: verify the metadata
// against the anchor, copy and open each file, then replace the metadata with
// the timestamp last. A file that is broken is reported, the others are still
// copied, and nothing is switched: the machines keep seeing the old state. Any
// failed run is completed by the next one.
func (r *Repo) Sync(ctx context.Context, baseURL string, client *http.Client, now time.Time) (Result, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, dir := range []string{"metadata", "targets"} {
		if err := os.MkdirAll(filepath.Join(r.dir, dir), 0o755); err != nil {
			return Result{}, err
		}
	}
	unlock, err := r.lock(ctx)
	if err != nil {
		return Result{}, err
	}
	res, err := r.sync(ctx, baseURL, client, now)
	return res, errors.Join(err, unlock())
}

// lockWait is how long another process, a sync by hand beside serve, is waited
// for.
const lockWait = 30 * time.Second

func (r *Repo) lock(ctx context.Context) (func() error, error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for {
		unlock, err := durable.Lock(filepath.Join(r.dir, ".lock"))
		if fault.CodeOf(err) != "locked" {
			return unlock, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-again.C:
		}
	}
}

func (r *Repo) sync(ctx context.Context, baseURL string, client *http.Client, now time.Time) (Result, error) {
	snapshot, err := tufclient.Refresh(ctx, tufclient.Config{Root: r.anchor.Root, Dir: r.memory, BaseURL: baseURL, Client: client, Now: now})
	if err != nil {
		return Result{}, err
	}
	res := Result{Version: snapshot.Timestamp, Expires: snapshot.Expires}
	current := r.Catalog()
	if current.Version == snapshot.Timestamp && len(current.Problems) == 0 {
		res.Livepatches, res.Kept = len(current.Entries), len(snapshot.Targets())
		return res, r.syncLogs(ctx, snapshot) // the anchor may ask for one since
	}

	next := &Catalog{Publisher: r.anchor.Publisher, Version: snapshot.Timestamp, Expires: snapshot.Expires}
	for _, t := range snapshot.Targets() {
		content, err := r.readTarget(t)
		if err == nil {
			res.Kept++
		} else if content, err = snapshot.Download(ctx, t, limitOf(t)); err == nil {
			res.Copied++
		}
		var entry *Entry
		if err == nil {
			entry, err = r.open(t, content)
		}
		if err == nil {
			err = r.writeTarget(t, content)
		}
		if err != nil {
			if ctx.Err() != nil {
				return res, err
			}
			r.log.LogAttrs(ctx, slog.LevelError, "file of the repository is broken", slog.String("target", t.Path), obs.Err(err))
			res.Broken = append(res.Broken, fmt.Sprintf("%s: %s", t.Path, err))
			continue
		}
		if entry != nil {
			next.Entries = append(next.Entries, *entry)
		}
	}
	if len(res.Broken) > 0 {
		return res, fault.New(fault.Untrusted, "sync_broken", "%d of %d files are broken, the old state stays: %s", len(res.Broken), len(snapshot.Targets()), strings.Join(res.Broken, "; ")).
			WithHint("publish again at the source, then repeat; what was copied is kept")
	}
	if err := r.withdrawn(next, snapshot.Targets()); err != nil {
		return res, err
	}
	// The log goes before the metadata: a machine that sees a livepatch must
	// be able to compare the log.
	if err := r.syncLogs(ctx, snapshot); err != nil {
		return res, err
	}
	for _, f := range snapshot.Files() { // timestamp.json is the last one
		if err := r.putFile(filepath.Join(r.dir, "metadata", f.Name), f.Content); err != nil {
			return res, err
		}
	}
	res.Changed, res.Livepatches = true, len(next.Entries)
	r.install(next)
	return res, nil
}

func (r *Repo) install(c *Catalog) {
	slices.SortFunc(c.Entries, func(a, b Entry) int {
		return cmp.Or(strings.Compare(string(a.Kernel.Distro), string(b.Kernel.Distro)), strings.Compare(string(a.Kernel.Release), string(b.Kernel.Release)), cmp.Compare(b.Sequence, a.Sequence))
	})
	r.catalog.Store(c)
}

// Load reads the catalog from the files, as after a restart or when another
// process has synced. Metadata that has expired is still read: the machines
// refuse it by themselves, and a page must be able to say so.
func (r *Repo) Load(ctx context.Context, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	expires, err := r.firstExpiry()
	if errors.Is(err, fs.ErrNotExist) {
		r.install(&Catalog{Publisher: r.anchor.Publisher})
		return nil
	}
	if err != nil {
		return err
	}
	if !now.Before(expires) {
		now = expires.Add(-time.Second)
	}
	scratch, err := os.MkdirTemp("", "klatch-catalog-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch) //nolint:errcheck // scratch
	snapshot, err := tufclient.Refresh(ctx, tufclient.Config{
		Root: r.anchor.Root, Dir: scratch, Now: now,
		BaseURL: "file://localhost", Client: &http.Client{Transport: tufclient.DirTransport(r.dir)},
	})
	if err != nil {
		return fmt.Errorf("read repository %s: %w", r.dir, err)
	}
	c := &Catalog{Publisher: r.anchor.Publisher, Version: snapshot.Timestamp, Expires: expires}
	for _, t := range snapshot.Targets() {
		content, err := r.readTarget(t)
		var entry *Entry
		if err == nil {
			entry, err = r.open(t, content)
		}
		if err != nil {
			r.log.LogAttrs(ctx, slog.LevelError, "file of the repository is broken", slog.String("target", t.Path), obs.Err(err))
			c.Problems = append(c.Problems, fmt.Sprintf("%s: %s", t.Path, err))
			continue
		}
		if entry != nil {
			c.Entries = append(c.Entries, *entry)
		}
	}
	if err := r.withdrawn(c, snapshot.Targets()); err != nil {
		return fmt.Errorf("read repository %s: %w", r.dir, err)
	}
	r.install(c)
	return nil
}

// Changed says whether the files are of another moment than the catalog.
func (r *Repo) Changed() bool {
	version, _, err := r.peek("timestamp.json")
	return err == nil && version != r.Catalog().Version
}

// firstExpiry is when the first of the metadata files runs out. Nothing is
// verified here; Load verifies the same files at the time that this gives.
func (r *Repo) firstExpiry() (time.Time, error) {
	_, first, err := r.peek("timestamp.json")
	if err != nil {
		return first, err
	}
	names, err := filepath.Glob(filepath.Join(r.dir, "metadata", "[1-9]*.*.json"))
	if err != nil {
		return first, err
	}
	type last struct {
		version int64
		expires time.Time
	}
	newest := map[string]last{}
	for _, n := range names {
		_, role, _ := strings.Cut(filepath.Base(n), ".")
		version, at, err := r.peek(filepath.Base(n))
		if err != nil {
			return first, err
		}
		if version > newest[role].version {
			newest[role] = last{version, at}
		}
	}
	for _, l := range newest {
		if l.expires.Before(first) {
			first = l.expires
		}
	}
	return first, nil
}

func (r *Repo) peek(name string) (version int64, expires time.Time, err error) {
	b, err := durable.ReadFile(filepath.Join(r.dir, "metadata", name), maxMetadata)
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

const bundleSuffix = ".lpb"

func limitOf(t tufclient.Target) int64 {
	if strings.HasSuffix(t.Path, bundleSuffix) {
		return livepatch.MaxBundle
	}
	return maxOther
}

// open checks a livepatch as the root loader of a machine would, all but the
// running kernel: a publisher's mistake is found here, before any machine
// downloads it. A target of another sort gives nil.
func (r *Repo) open(t tufclient.Target, content []byte) (*Entry, error) {
	if !strings.HasSuffix(t.Path, bundleSuffix) {
		return nil, nil
	}
	if e, ok := r.known[t.Path+t.SHA256]; ok {
		return &e, nil
	}
	b, err := livepatch.ParseBundle(content)
	if err != nil {
		return nil, err
	}
	m, err := r.anchor.OpenManifest(b.Manifest)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(b.Module)
	switch {
	case m.TargetPath() != t.Path:
		return nil, fault.New(fault.Untrusted, "target_path", "manifest belongs at %s", m.TargetPath())
	case m.Module.Bytes != int64(len(b.Module)) || m.Module.SHA256 != hex.EncodeToString(sum[:]):
		return nil, fault.New(fault.Untrusted, "module_digest", "module is not the one in its manifest")
	}
	if _, err := r.anchor.VerifyModule(b.Module); err != nil {
		return nil, err
	}
	e := Entry{
		Published: fleet.Published{Target: t.Path, Kernel: m.Kernel, Sequence: m.Sequence, Fixes: m.Fixes},
		Bytes:     t.Bytes, SHA256: t.SHA256, Functions: len(m.Functions),
	}
	r.known[t.Path+t.SHA256] = e
	return &e, nil
}

func (r *Repo) targetFile(t tufclient.Target) string {
	return filepath.Join(r.dir, "targets", filepath.FromSlash(tufclient.BlobPath(t)))
}

// readTarget reads a target that is here and whole.
func (r *Repo) readTarget(t tufclient.Target) ([]byte, error) {
	b, err := durable.ReadFile(r.targetFile(t), limitOf(t))
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != t.SHA256 {
		return nil, fault.New(fault.Untrusted, "target_digest", "file %s has another digest than the signed one", r.targetFile(t))
	}
	return b, nil
}

func (r *Repo) writeTarget(t tufclient.Target, content []byte) error {
	name := r.targetFile(t)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	if err := r.putFile(name, content); err != nil {
		return err
	}
	for dir := filepath.Dir(name); len(dir) > len(r.dir); dir = filepath.Dir(dir) {
		if err := durable.SyncDir(filepath.Dir(dir)); err != nil {
			return err
		}
	}
	return nil
}

// putFile writes a file unless it is there with that content.
func (r *Repo) putFile(name string, content []byte) error {
	if old, err := durable.ReadFile(name, int64(len(content))); err == nil && bytes.Equal(old, content) {
		return nil
	}
	return durable.WriteFile(name, content, 0o644)
}
