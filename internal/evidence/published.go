// SPDX-License-Identifier: Apache-2.0

package evidence

import (
	"crypto/sha256"
	"encoding/hex"
	"path"
	"strings"
	"time"

	"klatch/internal/livepatch"
	"klatch/internal/trust"
)

// NewestPolicy is the one that counts among published targets, or "". A key
// that was taken out of the policy counts no longer, for no livepatch.
func NewestPolicy(targets []string) string {
	newest := ""
	for _, t := range targets {
		if PolicyVersion(t) > PolicyVersion(newest) {
			newest = t
		}
	}
	return newest
}

// OpenPolicy reads a published policy and looks that it is the one that its
// path names.
func OpenPolicy(target string, content []byte, profile trust.Profile) (Policy, error) {
	p, err := ParsePolicy(content, profile)
	if err == nil && p.TargetPath() != target {
		err = refuse("policy_malformed", "%s holds policy %d", target, p.Version)
	}
	return p, err
}

// Published is a livepatch as it is published, verified by its own
// signatures before.
type Published struct {
	Manifest livepatch.Manifest
	// Module is without its module signature: what builders make alike.
	Module []byte
	// File is what lies beside the bundle.
	File []byte
	// Targets are the published paths among which lower sequences of the same
	// kernel are looked for: machines may have them.
	Targets []string
	Now     time.Time
}

// Judge decides whether what lies beside a published livepatch is enough
// evidence for it. Signed is when it passed the signing gate.
func Judge(p Policy, l Published) (r Report, signed time.Time, err error) {
	f, err := ParseFile(l.File)
	if err != nil {
		return r, signed, err
	}
	sum := sha256.Sum256(l.Module)
	m := l.Manifest
	about := About{Module: Module{Name: m.Module.Name, SHA256: hex.EncodeToString(sum[:])}, Kernel: m.Kernel, Sequence: m.Sequence}
	if f.About != about {
		return r, f.Signed, refuse("other_module", "the evidence is about %s for %s, sequence %d", f.About.Module.Name, f.About.Kernel, f.About.Sequence)
	}
	r, err = Check(p, Facts{About: about, Signed: f.Signed, Now: l.Now, Earlier: earlier(l.Targets, m), Manifest: &m}, f.Statements)
	return r, f.Signed, err
}

func earlier(targets []string, m livepatch.Manifest) []livepatch.Sequence {
	var out []livepatch.Sequence
	for _, t := range targets {
		if s, ok := SequenceOf(t); ok && path.Dir(t) == path.Dir(m.TargetPath()) && s < m.Sequence {
			out = append(out, s)
		}
	}
	return out
}

// SequenceOf reads the sequence out of a bundle's path.
func SequenceOf(target string) (livepatch.Sequence, bool) {
	name, ok := strings.CutSuffix(path.Base(target), bundleSuffix)
	if !ok {
		return 0, false
	}
	return livepatch.SequenceOf(name)
}
