// SPDX-License-Identifier: Apache-2.0

// Package audit is the stranger: it has the published files and the public
// trust anchor, nothing else, and says of each livepatch whether its evidence
// suffices. It holds no key, starts nothing and, given a folder, needs no
// network. Start with Repository.
package audit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/trust"
	"klatch/internal/tufclient"
)

// Question says what is looked at.
type Question struct {
	Anchor *trust.Anchor
	From   string       // a folder, or an address
	Client *http.Client // for addresses
	Now    time.Time
	// Kernel and Sequence limit it; empty and 0 mean all.
	Kernel   kernel.Release
	Sequence livepatch.Sequence
}

// Answer is what was found.
type Answer struct {
	Publisher   string        `json:"publisher"`
	Profile     trust.Profile `json:"profile"`
	Expires     time.Time     `json:"expires"` // of the metadata
	Policy      int           `json:"policy"`  // version of the evidence policy
	Livepatches []Livepatch   `json:"livepatches"`
}

// Livepatch is the verdict on one.
type Livepatch struct {
	Target   string             `json:"target"`
	Kernel   *kernel.Build      `json:"kernel,omitempty"` // by its manifest, once that is verified
	Sequence livepatch.Sequence `json:"sequence,omitempty"`
	Accepted bool               `json:"accepted"`
	Code     fault.Code         `json:"code,omitempty"` // why not
	Why      string             `json:"why,omitempty"`
	Next     string             `json:"next,omitempty"`
	Signed   time.Time          `json:"signed,omitzero"`
	Evidence *evidence.Report   `json:"evidence,omitempty"`
}

// Refused lists those that are not accepted.
func (a Answer) Refused() []Livepatch {
	return slices.DeleteFunc(slices.Clone(a.Livepatches), func(l Livepatch) bool { return l.Accepted })
}

// Repository verifies metadata from the anchor on, then each livepatch in
// question and its evidence. An error means that nothing can be said of any.
func Repository(ctx context.Context, q Question) (Answer, error) {
	a := Answer{Publisher: q.Anchor.Publisher, Profile: q.Anchor.Profile, Livepatches: []Livepatch{}}
	base, client, err := tufclient.Source(q.From, q.Client)
	if err != nil {
		return a, err
	}
	memory, err := os.MkdirTemp("", "klatch-audit-")
	if err != nil {
		return a, err
	}
	defer os.RemoveAll(memory) //nolint:errcheck // scratch
	snap, err := tufclient.Refresh(ctx, tufclient.Config{Root: q.Anchor.Root, Dir: memory, BaseURL: base, Client: client, Now: q.Now})
	if err != nil {
		return a, err
	}
	a.Expires = snap.Expires
	r := reader{ctx: ctx, q: q, snap: snap}
	if err := r.readRecalls(); err != nil {
		return a, err
	}
	if r.policy, err = r.readPolicy(); err != nil {
		return a, err
	}
	a.Policy = r.policy.Version
	for _, t := range snap.Targets() {
		if _, ok := evidence.TargetPath(t.Path); !ok {
			continue
		}
		l, wanted, err := r.livepatch(t)
		if !wanted {
			continue
		}
		if err != nil {
			if fault.KindOf(err) == fault.Unavailable || fault.KindOf(err) == fault.Internal {
				return a, err
			}
			l.Code, l.Why, l.Next = fault.CodeOf(err), err.Error(), fault.HintOf(err)
		}
		l.Accepted = err == nil
		a.Livepatches = append(a.Livepatches, l)
	}
	if len(a.Livepatches) == 0 {
		return a, fault.New(fault.NotFound, "no_livepatch", "nothing in question is published").
			WithHint("leave out --kernel and --sequence to check all")
	}
	return a, nil
}

type reader struct {
	ctx    context.Context
	q      Question
	snap   *tufclient.Snapshot
	policy evidence.Policy

	recalls livepatch.Recalls
}

// readRecalls takes the newest, as machines do: keys that the publisher
// revoked count no longer.
func (r *reader) readRecalls() error {
	var newest tufclient.Target
	for _, t := range r.snap.Targets() {
		if livepatch.RecallsVersion(t.Path) > livepatch.RecallsVersion(newest.Path) {
			newest = t
		}
	}
	if newest.Path == "" {
		return nil // nothing was ever taken back
	}
	b, err := r.snap.Download(r.ctx, newest, livepatch.MaxRecalls)
	if err != nil {
		return err
	}
	if r.recalls, err = r.q.Anchor.OpenRecalls(b); err != nil {
		return err
	}
	anchor := *r.q.Anchor
	anchor.Manifest.Keys, anchor.ModuleKeys = slices.Clone(anchor.Manifest.Keys), slices.Clone(anchor.ModuleKeys)
	anchor.Revoke(r.recalls)
	r.q.Anchor = &anchor
	return nil
}

// readPolicy takes the highest version: a key that was taken out of the policy
// counts no longer, for no livepatch.
func (r reader) readPolicy() (evidence.Policy, error) {
	newest := evidence.NewestPolicy(r.paths())
	if newest == "" {
		return evidence.Policy{}, evidence.Refuse("no_policy", "the repository has no evidence policy")
	}
	t, err := r.snap.Target(newest)
	if err != nil {
		return evidence.Policy{}, err
	}
	b, err := r.snap.Download(r.ctx, t, evidence.MaxPolicy)
	if err != nil {
		return evidence.Policy{}, err
	}
	return evidence.OpenPolicy(newest, b, r.q.Anchor.Profile)
}

// paths are those of all published targets.
func (r reader) paths() []string {
	var all []string
	for _, t := range r.snap.Targets() {
		all = append(all, t.Path)
	}
	return all
}

// livepatch verifies one bundle as a machine would, then its evidence.
func (r reader) livepatch(t tufclient.Target) (l Livepatch, wanted bool, err error) {
	l.Target = t.Path
	if release, seq, ok := named(t.Path); ok && (r.q.Kernel != "" && release != r.q.Kernel || r.q.Sequence != 0 && seq != r.q.Sequence) {
		return l, false, nil
	}
	content, err := r.snap.Download(r.ctx, t, livepatch.MaxBundle)
	if err != nil {
		return l, true, err
	}
	m, module, err := r.open(content)
	if err != nil {
		return l, true, err
	}
	l.Kernel, l.Sequence = &m.Kernel, m.Sequence
	if err := r.recalls.Check(m.Kernel.ID, m.Sequence); err != nil {
		return l, true, err
	}
	if m.TargetPath() != t.Path {
		return l, true, evidence.Refuse("bundle_differs", "%s holds the livepatch for %s", t.Path, m.TargetPath())
	}
	path, _ := evidence.TargetPath(t.Path)
	et, err := r.snap.Target(path)
	if fault.CodeOf(err) == "target_missing" {
		return l, true, evidence.Refuse("no_evidence", "no evidence lies beside %s", t.Path)
	}
	if err != nil {
		return l, true, err
	}
	if content, err = r.snap.Download(r.ctx, et, evidence.MaxFile); err != nil {
		return l, true, err
	}
	rep, signed, err := evidence.Judge(r.policy, evidence.Published{Manifest: m, Module: module, File: content, Targets: r.paths(), Now: r.q.Now})
	if l.Signed = signed; err != nil {
		return l, true, err
	}
	l.Evidence = &rep
	return l, true, nil
}

// open checks manifest and module signature and gives the module as it was
// built.
func (r reader) open(content []byte) (livepatch.Manifest, []byte, error) {
	b, err := livepatch.ParseBundle(content)
	if err != nil {
		return livepatch.Manifest{}, nil, err
	}
	m, err := r.q.Anchor.OpenManifest(b.Manifest)
	if err != nil {
		return m, nil, err
	}
	if sum := sha256.Sum256(b.Module); hex.EncodeToString(sum[:]) != m.Module.SHA256 {
		return m, nil, evidence.Refuse("bundle_differs", "the module of sequence %d is not the one of its manifest", m.Sequence)
	}
	module, err := r.q.Anchor.VerifyModule(b.Module)
	return m, module, err
}

// named reads kernel release and sequence out of a bundle's path.
func named(path string) (kernel.Release, livepatch.Sequence, bool) {
	parts := strings.Split(path, "/")
	if len(parts) != 4 {
		return "", 0, false
	}
	name, ok := strings.CutSuffix(parts[3], ".lpb")
	seq, ok2 := livepatch.SequenceOf(name)
	return kernel.Release(parts[2]), seq, ok && ok2
}
