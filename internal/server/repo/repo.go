// SPDX-License-Identifier: Apache-2.0

// Package repo keeps the server's copy of the publisher's repository: it
// verifies and copies (Sync), knows what is published (Catalog) and serves the
// files (Handler). It holds no key and can sign nothing; what it serves, every
// machine verifies again. The catalog is read from the files at each start and
// is never a truth of its own. Start with Sync.
package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"klatch/internal/fault"
	"klatch/internal/fleet"
	"klatch/internal/livepatch"
	"klatch/internal/server/blob"
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
	LeftOut   []LeftOut // livepatches that are not here on purpose

	chosen  string // fingerprint of what was chosen
	leftSum string // digest of left-out.json
}

// Published is the list that fleet.Decide chooses from.
func (c *Catalog) Published() []fleet.Published {
	list := make([]fleet.Published, len(c.Entries))
	for i, e := range c.Entries {
		list[i] = e.Published
	}
	return list
}

// Repo is the copy: metadata/, targets/ and log/ in a store.
type Repo struct {
	files  blob.Store
	memory string // folder of what was accepted from upstream (package tufclient)
	anchor *trust.Anchor
	log    *slog.Logger

	catalog atomic.Pointer[Catalog]

	mu    sync.Mutex       // one Sync or Load at a time
	known map[string]Entry // opened bundles by digest
}

// New says where the copy and the memory are. Load or Sync fills the catalog.
func New(files blob.Store, memory string, anchor *trust.Anchor, log *slog.Logger) *Repo {
	r := &Repo{files: files, memory: memory, anchor: anchor, log: log, known: map[string]Entry{}}
	r.catalog.Store(&Catalog{Publisher: anchor.Publisher})
	return r
}

// Catalog is what is published now.
func (r *Repo) Catalog() *Catalog { return r.catalog.Load() }

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
	e, err := Verify(r.anchor, t, content)
	if err != nil {
		return nil, err
	}
	r.known[t.Path+t.SHA256] = e
	return &e, nil
}

// Verify opens a livepatch that the signed list names.
func Verify(anchor *trust.Anchor, t tufclient.Target, content []byte) (Entry, error) {
	b, err := livepatch.ParseBundle(content)
	if err != nil {
		return Entry{}, err
	}
	m, err := anchor.OpenManifest(b.Manifest)
	if err != nil {
		return Entry{}, err
	}
	sum := sha256.Sum256(b.Module)
	switch {
	case m.TargetPath() != t.Path:
		return Entry{}, fault.New(fault.Untrusted, "target_path", "manifest belongs at %s", m.TargetPath())
	case m.Module.Bytes != int64(len(b.Module)) || m.Module.SHA256 != hex.EncodeToString(sum[:]):
		return Entry{}, fault.New(fault.Untrusted, "module_digest", "module is not the one in its manifest")
	}
	if _, err := anchor.VerifyModule(b.Module); err != nil {
		return Entry{}, err
	}
	return Entry{
		Published: fleet.Published{Target: t.Path, Kernel: m.Kernel, Sequence: m.Sequence, Fixes: m.Fixes},
		Bytes:     t.Bytes, SHA256: t.SHA256, Functions: len(m.Functions),
	}, nil
}

func targetName(t tufclient.Target) string { return "targets/" + tufclient.BlobPath(t) }

// readTarget reads a target that is here and whole.
func (r *Repo) readTarget(ctx context.Context, t tufclient.Target) ([]byte, error) {
	b, err := blob.Read(ctx, r.files, targetName(t), limitOf(t))
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != t.SHA256 {
		return nil, fault.New(fault.Untrusted, "target_digest", "file %s has another digest than the signed one", targetName(t))
	}
	return b, nil
}

// putFile writes a file unless it is there with that content.
func (r *Repo) putFile(ctx context.Context, name string, content []byte) error {
	if old, err := blob.Read(ctx, r.files, name, int64(len(content))); err == nil && bytes.Equal(old, content) {
		return nil
	}
	return r.files.Put(ctx, name, content, HeaderOf(name))
}
