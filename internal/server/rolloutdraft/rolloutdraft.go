// SPDX-License-Identifier: Apache-2.0

// Package rolloutdraft is what people sign for an operator's repository:
// metadata that waits for signatures (package tufrepo), the files that it
// names anew, and the roots that lead to it from the anchor. It travels as one
// file between the server and the approvers. It must not write a repository;
// that is package rolloutrepo.
//
// Whoever holds a key believes nothing of a draft but what Words reads out of
// the parts that would be signed. Start with Parse, which refuses a draft
// whose files are not the ones that it names.
package rolloutdraft

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/rollout"
	"klatch/internal/tufrepo"
)

// Format is the version word of the file.
const Format = "klatch-rollout-draft/1"

// Max limits the file, in bytes.
const Max = tufrepo.MaxDraft

// Draft is the file.
type Draft struct {
	Format   string            `json:"format"`
	Operator string            `json:"operator"`
	Roots    []json.RawMessage `json:"roots"`
	Metadata *tufrepo.Draft    `json:"draft"`
	Files    map[string][]byte `json:"files"` // content of what is new, by path
}

func bad(format string, args ...any) error {
	return fault.New(fault.Invalid, "bad_draft", "draft: "+format, args...).
		WithHint("a draft is the file that klatch-fleet promote or klatch-fleet tier wrote")
}

// Parse reads a draft's file.
func Parse(b []byte) (*Draft, error) {
	if len(b) > Max {
		return nil, bad("%d bytes, limit %d", len(b), Max)
	}
	var raw struct {
		Draft
		Metadata json.RawMessage `json:"draft"`
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&raw); err != nil {
		return nil, bad("%w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, bad("bytes after the end")
	}
	d := raw.Draft
	if d.Format != Format || rollout.CheckOperator(d.Operator) != nil {
		return nil, bad("format %.40q of operator %.80q, want %q", d.Format, d.Operator, Format)
	}
	var err error
	if d.Metadata, err = tufrepo.ParseDraft(raw.Metadata); err != nil {
		return nil, err
	}
	return &d, d.check()
}

// Encode writes the file.
func (d *Draft) Encode() ([]byte, error) {
	b, err := json.MarshalIndent(d, "", " ")
	return append(b, '\n'), err
}

// check holds the draft to what people sign here: keys, tiers and promotions.
// The server's list may come along unchanged, where its keys change. Each file that is new is in it, with its digest, and means what its path
// says; other files there are none.
func (d *Draft) check() error {
	for _, role := range d.Metadata.Roles() {
		if role != "root" && role != rollout.RoleTargets && role != rollout.RolePromotion && role != rollout.RoleSelect {
			return bad("it would sign for role %.80q, which people do not", role)
		}
	}
	files, err := d.Metadata.Files()
	if err != nil {
		return err
	}
	left := maps.Clone(d.Files)
	for _, f := range files {
		content, there := left[f.Path]
		delete(left, f.Path)
		if !f.New && !there {
			continue
		}
		sum := sha256.Sum256(content)
		if int64(len(content)) != f.Bytes || hex.EncodeToString(sum[:]) != f.SHA256 {
			return bad("the content of %.160q is not there or not what would be signed", f.Path)
		}
		if _, err := say(f.Role, f.Path, content); err != nil {
			return err
		}
	}
	if len(left) > 0 {
		return bad("it holds %d files that it does not name", len(left))
	}
	return nil
}

// say puts one file into words, and refuses one that does not mean what its
// path says.
func say(role, path string, content []byte) ([]string, error) {
	switch {
	case role == rollout.RoleTargets && path == rollout.TiersPath:
		t, err := rollout.ParseTiers(content)
		if err != nil {
			return nil, err
		}
		var out []string
		for i, x := range t.Tiers {
			out = append(out, fmt.Sprintf("tier %d: %s, opened after %d hours in the tier before", i+1, x.Name, x.SoakHours))
		}
		out[0] = "tier 1: " + t.Tiers[0].Name + ", gets new livepatches AT ONCE"
		return out, nil
	case role == rollout.RolePromotion:
		p, err := rollout.ParsePromotion(content)
		if err != nil {
			return nil, err
		}
		if path != rollout.PromotionPath(p.Tier, p.SHA256) {
			return nil, bad("%.160q holds the promotion of %s to tier %s", path, p.Target, p.Tier)
		}
		soak := "after the tier's soak, counted from " + stamp(p.Since)
		if p.Urgent {
			soak = "URGENT: does not wait for the soak (in the tier before since " + stamp(p.Since) + ")"
		}
		return []string{
			fmt.Sprintf("OPENS tier %s for %s", p.Tier, p.Target),
			"    sha256 " + p.SHA256,
			"    from " + stamp(p.PromotedAt) + " on, " + soak,
			"    reason: " + p.Reason,
		}, nil
	}
	return nil, bad("%.160q of role %s is no file that people sign", path, role)
}

func stamp(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 MST") }

// Words says what the draft means: the metadata's own words, then each new
// file's.
func (d *Draft) Words() ([]string, error) {
	words, err := d.Metadata.Words()
	if err != nil {
		return nil, err
	}
	files, err := d.Metadata.Files()
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		content, there := d.Files[f.Path]
		if !there {
			continue
		}
		lines, err := say(f.Role, f.Path, content)
		if err != nil {
			return nil, err
		}
		words = append(words, lines...)
	}
	return words, nil
}

// Promotions and Tiers are what the draft says anew, for the record.
func (d *Draft) Promotions() []rollout.Promotion {
	var out []rollout.Promotion
	for _, path := range slices.Sorted(maps.Keys(d.Files)) {
		if p, err := rollout.ParsePromotion(d.Files[path]); err == nil && strings.HasPrefix(path, rollout.RolePromotion+"/") {
			out = append(out, p)
		}
	}
	return out
}

// Tiers is the new list of tiers; ok is false where the draft has none.
func (d *Draft) Tiers() (t rollout.Tiers, ok bool) {
	t, err := rollout.ParseTiers(d.Files[rollout.TiersPath])
	return t, err == nil
}

// Sign adds signatures of a person's keys, if the draft follows from the
// person's own anchor.
func (d *Draft) Sign(a *rollout.Anchor, signers ...crypto.Signer) ([]string, error) {
	if a.Operator != d.Operator {
		return nil, fault.New(fault.Untrusted, "draft_of_another", "draft of operator %s, your anchor is of %s", d.Operator, a.Operator).
			WithHint("is this the anchor of the operator whose draft you were given?")
	}
	if err := d.Metadata.Grew(a.Root, d.Roots); err != nil {
		return nil, err
	}
	if err := d.check(); err != nil {
		return nil, err
	}
	return d.Metadata.Sign(signers...)
}

// Merge takes the signatures of copies over.
func (d *Draft) Merge(copies ...*Draft) error {
	for _, c := range copies {
		if err := d.Metadata.Merge(c.Metadata); err != nil {
			return err
		}
	}
	return nil
}
