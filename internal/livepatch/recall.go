// SPDX-License-Identifier: Apache-2.0

package livepatch

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
)

// RecallsFormat is the version word of recalls.
const RecallsFormat = "klatch-recalls/1"

// MaxRecalls limits signed recalls, in bytes: some thousand entries.
const MaxRecalls = 1 << 20

// Recalls is what a publisher takes back, all of it in one text that only
// grows: livepatches that nobody may load any more, the least sequence of a
// kernel build, and keys that count no more. Nothing that runs is taken out
// because of it.
type Recalls struct {
	Format  string    `json:"format"`
	Version int64     `json:"version"` // only grows
	Issued  time.Time `json:"issued"`
	Entries []Recall  `json:"entries"`
	Floors  []Floor   `json:"floors"`
	// Keys are SHA-256 digests in hexadecimal: of a manifest key's text, or of
	// the modulus of a module key.
	Keys []string `json:"keys"`
}

// Recall is one livepatch that is taken back.
type Recall struct {
	Kernel   kernel.BuildID `json:"build_id"`
	Sequence Sequence       `json:"sequence"`
	Reason   string         `json:"reason"`
}

// Floor is the least sequence that may be loaded on a kernel build.
type Floor struct {
	Kernel   kernel.BuildID `json:"build_id"`
	Sequence Sequence       `json:"sequence"`
}

// ErrForeign is in the error of signed text that none of an anchor's keys
// signed. It adds no words.
var ErrForeign = errors.New("")

// ParseRecalls reads recalls in their one form.
func ParseRecalls(b []byte) (Recalls, error) {
	var r Recalls
	bad := func(format string, args ...any) (Recalls, error) {
		return Recalls{}, fault.New(fault.Untrusted, "recalls_malformed", "recalls: "+format, args...)
	}
	if len(b) > MaxRecalls {
		return bad("%d bytes, limit %d", len(b), MaxRecalls)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return bad("%w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return bad("bytes after the end")
	}
	again, err := r.Encode()
	if err != nil {
		return Recalls{}, err
	}
	if !bytes.Equal(again, b) {
		return bad("not in their canonical form")
	}
	return r, nil
}

// Encode writes the one form.
func (r Recalls) Encode() ([]byte, error) {
	bad := func(format string, args ...any) ([]byte, error) {
		return nil, fault.New(fault.Untrusted, "recalls_malformed", "recalls: "+format, args...)
	}
	if r.Format != RecallsFormat || r.Version < 1 {
		return bad("format %.40q, version %d", r.Format, r.Version)
	}
	for _, e := range r.Entries {
		if e.Kernel.IsZero() || e.Sequence == 0 || e.Reason == "" || len(e.Reason) > 500 || strings.ContainsFunc(e.Reason, func(c rune) bool { return c < ' ' }) {
			return bad("entry without kernel build, sequence or reason")
		}
	}
	for _, f := range r.Floors {
		if f.Kernel.IsZero() || f.Sequence == 0 {
			return bad("floor without kernel build or sequence")
		}
	}
	for _, k := range r.Keys {
		if !hex64.MatchString(k) {
			return bad("key %.80q is not a SHA-256", k)
		}
	}
	b, err := json.MarshalIndent(r, "", " ")
	return append(b, '\n'), err
}

// Check refuses a livepatch that was taken back or is below the floor.
func (r Recalls) Check(k kernel.BuildID, s Sequence) error {
	for _, e := range r.Entries {
		if e.Kernel == k && e.Sequence == s {
			return fault.New(fault.Untrusted, "recalled", "sequence %d was recalled by its publisher: %s", s, e.Reason).
				WithHint("nothing to do here; a higher sequence will take its place")
		}
	}
	for _, f := range r.Floors {
		if f.Kernel == k && s < f.Sequence {
			return fault.New(fault.Untrusted, "below_floor", "sequence %d is below %d, the least that the publisher allows", s, f.Sequence).
				WithHint("nothing to do here; a higher sequence will take its place")
		}
	}
	return nil
}

// Revokes says whether a key counts no more.
func (r Recalls) Revokes(key []byte) bool { return r.RevokesDigest(KeyDigest(key)) }

// RevokesDigest says the same of a key that is known by its digest.
func (r Recalls) RevokesDigest(digest string) bool { return slices.Contains(r.Keys, digest) }

// KeyDigest is how recalls name a key.
func KeyDigest(key []byte) string {
	sum := sha256.Sum256(key)
	return hex.EncodeToString(sum[:])
}

// Holds says whether r still has all that older has: recalls only grow.
func (r Recalls) Holds(older Recalls) bool {
	return r.Version >= older.Version &&
		!slices.ContainsFunc(older.Entries, func(e Recall) bool { return r.Check(e.Kernel, e.Sequence) == nil }) &&
		!slices.ContainsFunc(older.Floors, func(f Floor) bool { return r.Check(f.Kernel, f.Sequence-1) == nil }) &&
		!slices.ContainsFunc(older.Keys, func(k string) bool { return !slices.Contains(r.Keys, k) })
}

// RecallsPath is where recalls lie in the TUF repository.
func RecallsPath(version int64) string { return fmt.Sprintf("policy/recalls-%d.note", version) }

var recallsPath = regexp.MustCompile(`^policy/recalls-([1-9][0-9]{0,17})\.note$`)

// RecallsVersion reads the version out of a path; 0 for any other path.
func RecallsVersion(path string) int64 {
	m := recallsPath.FindStringSubmatch(path)
	if m == nil {
		return 0
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	if err != nil {
		return 0
	}
	return n
}
