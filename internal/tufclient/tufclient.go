// SPDX-License-Identifier: Apache-2.0

// Package tufclient reads a TUF repository that somebody else serves, and
// believes none of it before it is verified. It owns the client's memory: the
// newest metadata it ever accepted and the latest time it trusted, in one
// folder that survives a crash at any moment. It must not know what a target
// means. Writing a repository is package tufrepo.
//
// Start with Refresh: one call is one look, with a fresh updater, because
// go-tuf reads the clock once and never checks a delegation twice. Delegations
// are not followed: all targets are in the top role.
//
// The steps are those of the TUF specification, section 5; what this package
// adds to go-tuf: a context and deadlines, files synced to disk, a clock that
// may not go back, one digest per target, codes that say what was wrong.
package tufclient

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	tufconfig "github.com/theupdateframework/go-tuf/v2/metadata/config"
	"github.com/theupdateframework/go-tuf/v2/metadata/updater"

	"klatch/internal/durable"
	"klatch/internal/fault"
)

// The codes. Nothing changes on any of them: what was loaded stays loaded.
const (
	codeExpired     fault.Code = "metadata_expired"     // freshness: withheld news, or a publisher asleep
	codeRollback    fault.Code = "metadata_rollback"    // older than what we have seen
	codeUntrusted   fault.Code = "metadata_untrusted"   // signature, threshold or digest
	codeMalformed   fault.Code = "metadata_malformed"   // not TUF metadata, or too long
	codeUnavailable fault.Code = "metadata_unavailable" // network
	codeClockBack   fault.Code = "clock_back"           // our own clock
	codeDigest      fault.Code = "target_digest"
	codeMissing     fault.Code = "target_missing"
)

// Limits. A refresh that takes longer than refreshTimeout in all is given up;
// maxState bounds the files of our own folder.
const (
	refreshTimeout = 10 * time.Minute
	maxState       = 8 << 20
)

// clockSlack is how far the clock may go back without being called wrong:
// time daemons step by seconds.
const clockSlack = 2 * time.Minute

// Config says which repository, from where, and where the memory is.
type Config struct {
	Root    []byte        // first root, from the trust anchor
	Dir     string        // memory; one process at a time
	BaseURL string        // metadata/ and targets/ are below it
	Client  *http.Client  // nil: a plain one
	Now     time.Time     // of this look
	Timeout time.Duration // for one file; 0: a minute and the file's size at 64 KiB a second
}

// Target is one file that the verified metadata names.
type Target struct {
	Path   string
	Bytes  int64
	SHA256 string // lower-case hexadecimal
	Custom json.RawMessage
}

// Snapshot is one verified, consistent state of the repository.
type Snapshot struct {
	cfg     Config
	targets []Target
	files   []File

	// Versions of the accepted metadata, for logs.
	Root, Timestamp, Snapshot, TargetsVersion int64
	// Expires is when the timestamp does.
	Expires time.Time
}

// memory is our own file beside the metadata.
type memory struct {
	Format string    `json:"format"`
	Anchor string    `json:"anchor"` // SHA-256 of Config.Root that the metadata grew from
	Time   time.Time `json:"time"`   // latest time at which a refresh succeeded
}

const memoryFormat = "klatch-tufclient/1"

// files is the metadata in the memory, in the order in which it may be
// replaced: each is verified with those before it.
var files = []string{"root.json", "timestamp.json", "snapshot.json", "targets.json"}

// Refresh brings the memory up to date and returns what the repository holds.
// What was verified before an error is kept, as the specification asks: a
// repository that showed a newer state may not go back to an older one.
func Refresh(ctx context.Context, cfg Config) (*Snapshot, error) {
	return refresh(ctx, cfg, durable.WriteFile)
}

func refresh(ctx context.Context, cfg Config, write func(string, []byte, fs.FileMode) error) (*Snapshot, error) {
	if cfg.Client == nil {
		cfg.Client = &http.Client{}
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	mem, err := readMemory(cfg)
	if err != nil {
		return nil, err
	}
	if back := mem.Time.Sub(cfg.Now); back > clockSlack {
		return nil, fault.New(fault.Unavailable, codeClockBack, "clock says %s, %s before a time that was right", cfg.Now.UTC().Format(time.RFC3339), back.Round(time.Second)).
			WithHint("set the machine's clock; nothing is fetched until it has passed %s", mem.Time.UTC().Format(time.RFC3339))
	}
	staging, err := stage(cfg)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(staging) //nolint:errcheck // the next refresh clears it

	ctx, cancel := context.WithTimeout(ctx, refreshTimeout)
	defer cancel()
	f := &fetcher{ctx: ctx, client: cfg.Client, timeout: cfg.Timeout, roots: map[string][]byte{}}
	u, err := update(cfg, staging, f)
	if err := errors.Join(err, keep(cfg.Dir, staging, f.roots, write)); err != nil {
		return nil, err
	}
	s, err := newSnapshot(cfg, u)
	if err != nil {
		return nil, err
	}
	if s.files, err = accepted(cfg.Dir, s); err != nil {
		return nil, err
	}
	if cfg.Now.After(mem.Time) {
		mem.Time = cfg.Now.UTC()
	}
	return s, writeMemory(cfg, mem, write)
}

// readMemory also notices a new anchor: the machine's owner has decided anew
// whom to believe, so the old metadata counts no longer.
func readMemory(cfg Config) (memory, error) {
	anchor := sha256.Sum256(cfg.Root)
	fresh := memory{Format: memoryFormat, Anchor: hex.EncodeToString(anchor[:])}
	b, err := durable.ReadFile(filepath.Join(cfg.Dir, "memory.json"), maxState)
	if errors.Is(err, fs.ErrNotExist) {
		return fresh, nil
	}
	if err != nil {
		return fresh, err
	}
	var m memory
	if err := json.Unmarshal(b, &m); err != nil || m.Format != memoryFormat {
		return fresh, damaged(cfg.Dir, "memory.json", err)
	}
	if m.Anchor == fresh.Anchor {
		return m, nil
	}
	fresh.Time = m.Time
	roots, err := filepath.Glob(filepath.Join(cfg.Dir, "*.root.json"))
	if err != nil {
		return fresh, err
	}
	for _, name := range files {
		roots = append(roots, filepath.Join(cfg.Dir, name))
	}
	for _, name := range roots {
		if err := durable.Remove(name); err != nil {
			return fresh, err
		}
	}
	return fresh, writeMemory(cfg, fresh, durable.WriteFile)
}

func writeMemory(cfg Config, m memory, write func(string, []byte, fs.FileMode) error) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return write(filepath.Join(cfg.Dir, "memory.json"), append(b, '\n'), 0o600)
}

func damaged(dir, name string, cause error) error {
	return fault.New(fault.Internal, "state_malformed", "read %s: not what was written there: %w", filepath.Join(dir, name), cause).
		WithHint("remove the folder %s; the next look begins at the trust anchor again", dir)
}

// stage copies the memory to where go-tuf may write without syncing. A file
// that does not parse would make go-tuf fail for ever, so it is named here.
func stage(cfg Config) (string, error) {
	left, err := filepath.Glob(filepath.Join(cfg.Dir, ".staging-*"))
	if err != nil {
		return "", err
	}
	for _, l := range left {
		if err := os.RemoveAll(l); err != nil {
			return "", err
		}
	}
	if err := durable.RemoveTemp(cfg.Dir); err != nil {
		return "", err
	}
	staging, err := os.MkdirTemp(cfg.Dir, ".staging-")
	if err != nil {
		return "", err
	}
	for _, name := range files {
		b, err := durable.ReadFile(filepath.Join(cfg.Dir, name), maxState)
		if errors.Is(err, fs.ErrNotExist) {
			if name != "root.json" {
				continue
			}
			b, err = cfg.Root, nil
		}
		if err != nil {
			return "", err
		}
		if !json.Valid(b) {
			return "", damaged(cfg.Dir, name, nil)
		}
		// The staging folder is thrown away; a torn file in it harms nobody.
		if err := os.WriteFile(filepath.Join(staging, name), b, 0o600); err != nil { //nolint:forbidigo // see above
			return "", err
		}
	}
	return staging, nil
}

// keep writes what changed back, each file whole and synced; first the roots
// that were walked, under their versions, for those who copy the repository.
func keep(dir, staging string, walked map[string][]byte, write func(string, []byte, fs.FileMode) error) error {
	put := func(name string, b []byte) error {
		old, err := durable.ReadFile(filepath.Join(dir, name), maxState)
		if err == nil && bytes.Equal(old, b) {
			return nil
		}
		return write(filepath.Join(dir, name), b, 0o600)
	}
	for _, name := range files {
		b, err := durable.ReadFile(filepath.Join(staging, name), maxState)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if name == "root.json" {
			trusted, err := metadata.Root().FromBytes(b)
			if err != nil {
				return damaged(dir, name, err)
			}
			for v := trusted.Signed.Version; ; v-- {
				r, ok := walked[rootName(v)]
				if !ok && v == trusted.Signed.Version {
					r, ok = b, true
				}
				if !ok {
					break
				}
				if err := put(rootName(v), r); err != nil {
					return err
				}
			}
		}
		if err := put(name, b); err != nil {
			return err
		}
	}
	return nil
}

func rootName(version int64) string { return fmt.Sprintf("%d.root.json", version) }

// File is one accepted metadata file under its public name.
type File struct {
	Name    string
	Content []byte
}

// accepted reads the metadata back in the order in which a copy must be
// written: timestamp.json last.
func accepted(dir string, s *Snapshot) ([]File, error) {
	var list []File
	for v := int64(1); v <= s.Root; v++ {
		b, err := durable.ReadFile(filepath.Join(dir, rootName(v)), maxState)
		if errors.Is(err, fs.ErrNotExist) {
			list = nil // the anchor begins later than at the first root
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, File{rootName(v), b})
	}
	for _, f := range []struct{ memory, public string }{
		{"targets.json", fmt.Sprintf("%d.targets.json", s.TargetsVersion)},
		{"snapshot.json", fmt.Sprintf("%d.snapshot.json", s.Snapshot)},
		{"timestamp.json", "timestamp.json"},
	} {
		b, err := durable.ReadFile(filepath.Join(dir, f.memory), maxState)
		if err != nil {
			return nil, err
		}
		list = append(list, File{f.public, b})
	}
	return list, nil
}

// Files is the accepted metadata, byte for byte, in the order in which a copy
// of the repository must be written.
func (s *Snapshot) Files() []File { return slices.Clone(s.files) }

func update(cfg Config, staging string, f *fetcher) (u *updater.Updater, err error) {
	// go-tuf follows absent members of signed metadata without looking (seen
	// with a timestamp that names no snapshot). Only the publisher can sign
	// such a thing, but it must not end the daemon.
	defer func() {
		if p := recover(); p != nil {
			u, err = nil, fault.New(fault.Untrusted, codeMalformed, "metadata lacks a member: %v", p)
		}
	}()
	root, err := durable.ReadFile(filepath.Join(staging, "root.json"), maxState)
	if err != nil {
		return nil, err
	}
	c, err := tufconfig.New(cfg.BaseURL+"/metadata", root)
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_url", "repository address: %w", err)
	}
	c.LocalMetadataDir, c.LocalTargetsDir = staging, staging
	c.Fetcher = f
	if u, err = updater.New(c); err != nil {
		return nil, explain(err)
	}
	u.UnsafeSetRefTime(cfg.Now)
	if err := u.Refresh(); err != nil {
		return nil, explain(err)
	}
	return u, nil
}

// explain gives go-tuf's errors a kind and a code.
func explain(err error) error {
	if _, ours := errors.AsType[*fault.Error](err); ours {
		return err
	}
	switch {
	case errors.Is(err, &metadata.ErrDownload{}):
		return fault.New(fault.Unavailable, codeUnavailable, "%w", err).
			WithHint("check the network and the address; it is tried again later")
	case errors.Is(err, &metadata.ErrExpiredMetadata{}):
		return fault.New(fault.Untrusted, codeExpired, "%w", err).
			WithHint("the publisher must sign again (klatch-forge publish --refresh), or this machine's clock is wrong")
	case errors.Is(err, &metadata.ErrBadVersionNumber{}):
		return fault.New(fault.Untrusted, codeRollback, "%w", err).
			WithHint("the server shows an older state than before; tell whoever runs it")
	case errors.Is(err, &metadata.ErrRepository{}):
		return fault.New(fault.Untrusted, codeUntrusted, "%w", err).
			WithHint("check that the trust anchor and the server's address belong to the same publisher")
	}
	return fault.New(fault.Untrusted, codeMalformed, "metadata: %w", err)
}

var segment = regexp.MustCompile(`^[0-9A-Za-z_][0-9A-Za-z.+~_-]{0,127}$`)

func newSnapshot(cfg Config, u *updater.Updater) (*Snapshot, error) {
	trusted := u.GetTrustedMetadataSet()
	s := &Snapshot{
		cfg: cfg, Root: trusted.Root.Signed.Version, Timestamp: trusted.Timestamp.Signed.Version,
		Snapshot: trusted.Snapshot.Signed.Version, TargetsVersion: trusted.Targets[metadata.TARGETS].Signed.Version,
		Expires: trusted.Timestamp.Signed.Expires,
	}
	for name, f := range u.GetTopLevelTargets() {
		parts := strings.Split(name, "/")
		if len(name) > 512 || slices.ContainsFunc(parts, func(p string) bool { return !segment.MatchString(p) }) {
			return nil, fault.New(fault.Untrusted, codeMalformed, "target path %.160q is not allowed", name)
		}
		if f == nil || f.Length < 0 || len(f.Hashes) != 1 || len(f.Hashes["sha256"]) != sha256.Size {
			return nil, fault.New(fault.Untrusted, codeMalformed, "target %s has no length or not exactly one SHA-256", name)
		}
		t := Target{Path: name, Bytes: f.Length, SHA256: hex.EncodeToString(f.Hashes["sha256"])}
		if f.Custom != nil {
			t.Custom = *f.Custom
		}
		s.targets = append(s.targets, t)
	}
	slices.SortFunc(s.targets, func(a, b Target) int { return strings.Compare(a.Path, b.Path) })
	return s, nil
}

// Targets lists what the repository offers, by path.
func (s *Snapshot) Targets() []Target { return slices.Clone(s.targets) }

// Target finds one target by its path.
func (s *Snapshot) Target(name string) (Target, error) {
	i, ok := slices.BinarySearchFunc(s.targets, name, func(t Target, n string) int { return strings.Compare(t.Path, n) })
	if !ok {
		return Target{}, fault.New(fault.NotFound, codeMissing, "target %.200q is not in the signed list", name)
	}
	return s.targets[i], nil
}

// Download gets a target of the signed list. The bytes are those that were
// signed, or there is an error; limit is the caller's own.
func (s *Snapshot) Download(ctx context.Context, t Target, limit int64) ([]byte, error) {
	signed, err := s.Target(t.Path)
	if err != nil {
		return nil, err
	}
	if signed.SHA256 != t.SHA256 || signed.Bytes != t.Bytes {
		return nil, fault.New(fault.Untrusted, codeDigest, "target %s is not the one in the signed list", t.Path)
	}
	if t.Bytes > limit {
		return nil, fault.New(fault.Untrusted, codeMalformed, "target %s has %d bytes, limit %d", t.Path, t.Bytes, limit)
	}
	address, err := url.JoinPath(s.cfg.BaseURL, "targets", BlobPath(t))
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_url", "repository address: %w", err)
	}
	f := fetcher{ctx: ctx, client: s.cfg.Client, timeout: s.cfg.Timeout}
	b, err := f.DownloadFile(address, t.Bytes, 0)
	if status, ok := errors.AsType[*metadata.ErrDownloadHTTP](err); ok {
		if status.StatusCode == http.StatusNotFound || status.StatusCode == http.StatusGone {
			return nil, fault.New(fault.Unavailable, codeMissing, "target %s is signed, but the server does not have it", t.Path)
		}
		return nil, explain(err)
	}
	if fault.CodeOf(err) == codeMalformed {
		return nil, fault.New(fault.Untrusted, codeDigest, "target %s: %w", t.Path, err)
	}
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(b)
	if int64(len(b)) != t.Bytes || hex.EncodeToString(sum[:]) != t.SHA256 {
		return nil, fault.New(fault.Untrusted, codeDigest, "target %s: %d bytes with another digest than the signed one", t.Path, len(b)).
			WithHint("the server's copy is damaged or was changed; nothing of it is used")
	}
	return b, nil
}

// BlobPath is where a target's bytes lie below targets/.
func BlobPath(t Target) string {
	return path.Join(path.Dir(t.Path), fmt.Sprintf("%s.%s", t.SHA256, path.Base(t.Path)))
}
