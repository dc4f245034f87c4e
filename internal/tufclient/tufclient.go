// SPDX-License-Identifier: Apache-2.0

// Package tufclient reads a TUF repository that somebody else serves, and
// believes none of it before it is verified. It owns the client's memory: the
// newest metadata it ever accepted and the latest time it trusted, in one
// folder that survives a crash at any moment. It must not know what a target
// means. Writing a repository is package tufrepo.
//
// Start with Refresh: one call is one look, with a fresh updater, because
// go-tuf reads the clock once. Delegations are followed one level deep and in
// one form only (delegation.go).
//
// The steps are those of the TUF specification, section 5; what this package
// adds to go-tuf: a context and deadlines, files synced to disk, a clock that
// may not go back, one digest per target, codes that say what was wrong.
package tufclient

import (
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
	codeDelegation  fault.Code = "delegation_refused" // a tree of roles that we do not follow
	codeJump        fault.Code = "metadata_jump"      // versions that no honest publisher reaches
)

// Limits. A refresh that takes longer than refreshTimeout in all is given up;
// maxState bounds the files of our own folder.
const (
	refreshTimeout = 10 * time.Minute
	maxState       = 8 << 20
)

// maxJump is how much higher than the one before a version may be. A thief of
// the online keys could otherwise raise versions to the highest number, and no
// honest metadata would be newer until those keys are replaced in the root. A
// publisher that signs every minute needs two years for so many.
const maxJump = 1_000_000

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
	// Lazy leaves a release role's list alone until a target of it is asked
	// for. A machine needs one role of many; who copies needs all.
	Lazy bool
	// Operator is for the operator's repository, whose top list delegates to
	// select and promotion and to nothing else; nil for a publisher's.
	Operator *Operator
}

// Target is one file that the verified metadata names.
type Target struct {
	Path   string
	Role   string // who signed for it: "targets", or a release role
	Bytes  int64
	SHA256 string // lower-case hexadecimal
	Custom json.RawMessage
	Until  time.Time // when the list that names it expires
}

// Snapshot is one verified, consistent state of the repository.
type Snapshot struct {
	cfg     Config
	targets []Target
	files   []File
	tree    *tree
	open    []releaseRole // not loaded yet

	// Versions of the accepted metadata, for logs.
	Root, Timestamp, Snapshot, TargetsVersion int64
	// Expires is when the timestamp does.
	Expires time.Time
	// Signed is when it was signed, as the publisher said under the signature;
	// zero where it did not say.
	Signed time.Time
}

// Refresh brings the memory up to date and returns what the repository holds.
// What was verified before an error is kept, as the specification asks: a
// repository that showed a newer state may not go back to an older one.
func Refresh(ctx context.Context, cfg Config) (*Snapshot, error) {
	s, err := refresh(ctx, cfg, durable.WriteFile)
	if err != nil && cfg.Operator != nil {
		return nil, ofOperator(err)
	}
	return s, err
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
	if err := notBefore(cfg.Now, mem.Time, "metadata that was accepted before was signed"); err != nil {
		return nil, err
	}
	staging, err := stage(cfg)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(staging) //nolint:errcheck // the next refresh clears it

	limited, cancel := context.WithTimeout(ctx, refreshTimeout)
	defer cancel()
	f := &fetcher{ctx: limited, client: cfg.Client, timeout: cfg.Timeout, roots: map[string][]byte{}}
	u, err := update(cfg, staging, f)
	if err := errors.Join(err, keep(cfg.Dir, staging, f.roots, write)); err != nil {
		return nil, err
	}
	s, err := newSnapshot(cfg, u, f, write)
	if err != nil {
		return nil, err
	}
	if !cfg.Lazy {
		if err := s.loadAll(); err != nil {
			return nil, err
		}
		if s.files, err = accepted(cfg.Dir, s); err != nil {
			return nil, err
		}
	}
	f.ctx = ctx // of lists that are asked for later
	if err := notBefore(cfg.Now, s.Signed, "the newest metadata was signed"); err != nil {
		return nil, err
	}
	// Only what was signed raises it: a clock that was wrong once must not make
	// the right time wrong.
	if s.Signed.After(mem.Time) {
		mem.Time = s.Signed
	}
	return s, writeMemory(cfg, mem, write)
}

// notBefore refuses a clock that is before a time that was signed. Metadata
// from the future is refused with it, so nobody can sign one.
func notBefore(now, floor time.Time, what string) error {
	if floor.Sub(now) <= clockSlack {
		return nil
	}
	return fault.New(fault.Unavailable, codeClockBack, "the clock says %s; %s at %s", now.UTC().Format(time.RFC3339), what, floor.UTC().Format(time.RFC3339)).
		WithHint("set the machine's clock; nothing is believed until it has passed %s", floor.UTC().Format(time.RFC3339))
}

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

func newSnapshot(cfg Config, u *updater.Updater, f *fetcher, write func(string, []byte, fs.FileMode) error) (*Snapshot, error) {
	trusted := u.GetTrustedMetadataSet()
	top := trusted.Targets[metadata.TARGETS]
	s := &Snapshot{
		cfg: cfg, Root: trusted.Root.Signed.Version, Timestamp: trusted.Timestamp.Signed.Version,
		Snapshot: trusted.Snapshot.Signed.Version, TargetsVersion: top.Signed.Version,
		Expires: trusted.Timestamp.Signed.Expires, Signed: signedTime(trusted.Timestamp.Signed.UnrecognizedFields),
		tree: &tree{cfg: cfg, trusted: trusted, fetch: f, write: write},
	}
	var err error
	if cfg.Operator != nil {
		s.tree.roles, err = cfg.Operator.roles(top.Signed.Delegations, trusted.Root.Signed)
	} else {
		s.tree.roles, err = roles(top.Signed.Delegations)
	}
	if err != nil {
		return nil, err
	}
	s.open = slices.Clone(s.tree.roles)
	for name, f := range top.Signed.Targets {
		t, err := target(name, f, top.Signed.Expires)
		if err != nil {
			return nil, err
		}
		s.targets = append(s.targets, t)
	}
	s.sort()
	return s, nil
}

// signedTime reads our own member of a signed timestamp (package tufrepo).
func signedTime(members map[string]any) time.Time {
	text, _ := members["klatch_signed_at"].(string)
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return time.Time{} // not said, or not by us
	}
	return t.UTC()
}

func (s *Snapshot) sort() {
	slices.SortFunc(s.targets, func(a, b Target) int { return strings.Compare(a.Path, b.Path) })
}

func (s *Snapshot) loadAll() error {
	for len(s.open) > 0 {
		if err := s.loadRole(0); err != nil {
			return err
		}
	}
	return nil
}

// loadRole adds the targets of one release role. The top list comes first: what
// it names itself no role may name otherwise.
func (s *Snapshot) loadRole(i int) error {
	own, err := s.tree.load(s.open[i])
	if err != nil {
		return err
	}
	own = slices.DeleteFunc(own, func(t Target) bool {
		_, there := s.find(t.Path)
		return there
	})
	s.targets = append(s.targets, own...)
	s.open = slices.Delete(s.open, i, i+1)
	s.sort()
	return nil
}

// Targets lists what the repository offers, by path.
func (s *Snapshot) Targets() []Target { return slices.Clone(s.targets) }

func (s *Snapshot) find(name string) (Target, bool) {
	i, ok := slices.BinarySearchFunc(s.targets, name, func(t Target, n string) int { return strings.Compare(t.Path, n) })
	if !ok {
		return Target{}, false
	}
	return s.targets[i], true
}

// Target finds one target by its path, and for that loads the list of the
// release role that it belongs to.
func (s *Snapshot) Target(name string) (Target, error) {
	if t, ok := s.find(name); ok {
		return t, nil
	}
	if i := slices.IndexFunc(s.open, func(r releaseRole) bool { return r.matches(name) }); i >= 0 {
		if err := s.loadRole(i); err != nil {
			return Target{}, err
		}
		if t, ok := s.find(name); ok {
			return t, nil
		}
	}
	return Target{}, fault.New(fault.NotFound, codeMissing, "target %.200q is not in the signed list", name)
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
	f := fetcher{ctx: context.WithValue(ctx, lengthKey{}, t.Bytes), client: s.cfg.Client, timeout: s.cfg.Timeout}
	b, err := f.DownloadFile(address, t.Bytes, 0)
	if f.resumed && (fault.CodeOf(err) == codeMalformed || err == nil && !t.Is(b)) {
		// What an earlier transfer left was not the beginning. It is gone now.
		b, err = f.DownloadFile(address, t.Bytes, 0)
	}
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
	if !t.Is(b) {
		return nil, fault.New(fault.Untrusted, codeDigest, "target %s: %d bytes with another digest than the signed one", t.Path, len(b)).
			WithHint("the server's copy is damaged or was changed; nothing of it is used")
	}
	return b, nil
}

// Is says whether bytes are those that were signed.
func (t Target) Is(b []byte) bool {
	sum := sha256.Sum256(b)
	return int64(len(b)) == t.Bytes && hex.EncodeToString(sum[:]) == t.SHA256
}

// BlobPath is where a target's bytes lie below targets/.
func BlobPath(t Target) string {
	return path.Join(path.Dir(t.Path), fmt.Sprintf("%s.%s", t.SHA256, path.Base(t.Path)))
}
