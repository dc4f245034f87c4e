// SPDX-License-Identifier: Apache-2.0

package publog

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/translog"
	"klatch/internal/trust"
	"klatch/internal/tufclient"
)

// Question is what an auditor asks: it needs the published files and the
// public trust anchor, and holds no key.
type Question struct {
	Anchor *trust.Anchor
	From   string       // a folder, or an address
	Client *http.Client // for addresses
	Now    time.Time
	// Kept is a checkpoint that the auditor has seen before, and knows to be
	// the log's own; nil at the first time.
	Kept []byte
	// Withdrawn are targets that the publisher says it no longer offers.
	Withdrawn []string
}

// Report is what an audit found.
type Report struct {
	Logs     []LogReport `json:"logs"`
	Targets  int         `json:"targets"` // in the signed list, proofs not counted
	Proofs   int         `json:"proofs"`  // that hold
	Findings []Finding   `json:"findings"`
}

// LogReport is one log of the policy.
type LogReport struct {
	Origin     string   `json:"origin"`
	Size       int64    `json:"size"`
	Root       string   `json:"root"`
	Cosigners  []string `json:"cosigners"` // of the newest cosigned checkpoint
	Checkpoint []byte   `json:"checkpoint"`
	KeptSize   int64    `json:"kept_size,omitempty"` // it continues the kept checkpoint of that size
}

// Finding is one thing that an honest publisher's repository does not show.
type Finding struct {
	Code   fault.Code `json:"code"`
	Target string     `json:"target,omitempty"`
	Text   string     `json:"text"`
}

// The findings that only a whole look can make.
const (
	CodeNotLogged   fault.Code = "not_logged"   // offered, and not in the log
	CodeUnknown     fault.Code = "log_unknown"  // a livepatch in the log that is not offered
	CodeTwoContents fault.Code = "two_contents" // one name, two files
)

// Audit compares a whole repository with its whole log: each file is logged,
// each livepatch in the log is known, each bundle's proof holds, the log's files follow from
// its entries, and the log continues what the auditor has kept. An error means
// that it could not be done.
func Audit(ctx context.Context, q Question) (Report, error) {
	r := Report{Logs: []LogReport{}, Findings: []Finding{}}
	policy, err := translog.Require(q.Anchor.LogPolicy, string(q.Anchor.Profile))
	if err != nil {
		return r, err
	}
	if policy == nil {
		return r, fault.New(fault.Invalid, "no_log", "the trust anchor of %s asks for no log", q.Anchor.Publisher).
			WithHint("if its publisher keeps one, get the new anchor")
	}
	s, done, err := snapshot(ctx, q)
	if err != nil {
		return r, err
	}
	defer done()
	find := func(code fault.Code, target, text string) {
		r.Findings = append(r.Findings, Finding{code, target, text})
	}
	var entries []translog.Entry
	wholes := map[string]*translog.Log{} // by origin
	kept := q.Kept == nil
	for _, v := range policy.Logs {
		whole, err := auditLog(ctx, s, policy, v, q.Kept, &r)
		if whole == nil && err == nil {
			continue // of this log nothing was ever published
		}
		if err != nil && fault.KindOf(err) != fault.Untrusted {
			return r, err
		}
		if err != nil {
			find(fault.CodeOf(err), "", err.Error())
		}
		if whole != nil {
			entries = append(entries, whole.Entries...)
			wholes[whole.Checkpoint.Origin] = whole
			kept = kept || r.Logs[len(r.Logs)-1].KeptSize > 0
		}
	}
	if !kept {
		find(translog.CodeRollback, "", "the kept checkpoint is continued by no log of this repository")
	}
	compare(s.Targets(), entries, q.Withdrawn, &r)
	for _, t := range s.Targets() {
		if !strings.HasSuffix(t.Path, livepatch.BundleSuffix) {
			continue
		}
		err := checkProof(ctx, s, policy, wholes, t)
		if err != nil && fault.KindOf(err) != fault.Untrusted {
			return r, err
		}
		if err != nil {
			find(fault.CodeOf(err), t.Path, err.Error())
			continue
		}
		r.Proofs++
	}
	return r, nil
}

func snapshot(ctx context.Context, q Question) (*tufclient.Snapshot, func(), error) {
	base, client, err := tufclient.Source(q.From, q.Client)
	if err != nil {
		return nil, nil, err
	}
	scratch, err := os.MkdirTemp("", "klatch-audit-")
	if err != nil {
		return nil, nil, err
	}
	done := func() { _ = os.RemoveAll(scratch) } // scratch
	s, err := tufclient.Refresh(ctx, tufclient.Config{Root: q.Anchor.Root, Dir: scratch, BaseURL: base, Client: client, Now: q.Now})
	if err != nil {
		done()
		return nil, nil, err
	}
	return s, done, nil
}

// auditLog reads one log whole. It returns the log even where something about
// it is wrong, as far as it could be read.
func auditLog(ctx context.Context, s *tufclient.Snapshot, policy *translog.Policy, v *translog.Verifier, kept []byte, r *Report) (*translog.Log, error) {
	read := func(ctx context.Context, name string, limit int64) ([]byte, error) {
		return s.Static(ctx, path.Join(translog.Folder(v), name), limit)
	}
	signed, err := read(ctx, translog.CheckpointFile, translog.MaxCheckpoint)
	if fault.KindOf(err) == fault.NotFound {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	head, err := policy.OpenUnwitnessed(signed)
	if err == nil && head.Log != v {
		err = fault.New(fault.Untrusted, translog.CodeOrigin, "the folder of log %s holds the checkpoint of log %s", v.Name(), head.Origin)
	}
	if err != nil {
		return nil, err
	}
	l := LogReport{Origin: head.Origin, Size: head.Size, Root: head.Root.String(), Checkpoint: signed, Cosigners: []string{}}
	whole, err := translog.ReadLog(ctx, read, head)
	if err != nil {
		return nil, untrusted(err)
	}
	err = whole.CheckFiles(ctx, read)
	if err == nil {
		l.Cosigners, err = cosigners(ctx, whole, policy, read)
	}
	if kept != nil && err == nil {
		l.KeptSize, err = continuesKept(whole, policy, kept)
	}
	r.Logs = append(r.Logs, l)
	return whole, untrusted(err)
}

// untrusted makes a finding of a file that is not there: a log that cannot be
// read is not public.
func untrusted(err error) error {
	if fault.KindOf(err) != fault.NotFound {
		return err
	}
	return fault.New(fault.Untrusted, translog.CodeTiles, "%w", err)
}

// cosigners are those of the newest cosigned checkpoint, which must be of the
// history that was read: a signature under another one says nothing of this.
func cosigners(ctx context.Context, whole *translog.Log, policy *translog.Policy, read translog.Read) ([]string, error) {
	signed, err := read(ctx, translog.CosignedFile, translog.MaxCheckpoint)
	if fault.KindOf(err) == fault.NotFound {
		return []string{}, nil // nobody was asked yet
	}
	if err != nil {
		return []string{}, err
	}
	c, err := policy.OpenUnwitnessed(signed)
	if err == nil && c.Log != whole.Checkpoint.Log {
		err = fault.New(fault.Untrusted, translog.CodeOrigin, "it is of log %s", c.Origin)
	}
	if err == nil {
		err = translog.ExtendsWhole(whole, c)
	}
	if err != nil {
		return []string{}, fmt.Errorf("cosigned checkpoint of log %s: %w", whole.Checkpoint.Origin, err)
	}
	return append([]string{}, policy.Cosigners(signed)...), nil
}

func continuesKept(whole *translog.Log, policy *translog.Policy, kept []byte) (int64, error) {
	old, err := policy.OpenUnwitnessed(kept)
	if err != nil {
		return 0, fault.New(fault.Invalid, "bad_checkpoint", "kept checkpoint: %w", err).
			WithHint("name the file that an earlier audit wrote, or leave --kept out to begin anew")
	}
	if old.Origin != whole.Checkpoint.Origin {
		return 0, nil
	}
	return old.Size, translog.ExtendsWhole(whole, old)
}

func compare(targets []tufclient.Target, entries []translog.Entry, withdrawn []string, r *Report) {
	logged := map[translog.Entry]bool{}
	last := map[string]translog.Entry{}
	for _, e := range entries {
		logged[e] = true
		if old, ok := last[e.Target]; ok && old != e && strings.HasSuffix(e.Target, livepatch.BundleSuffix) {
			r.Findings = append(r.Findings, Finding{CodeTwoContents, e.Target, "the log has two files of this name: " + old.SHA256 + " and " + e.SHA256})
		}
		last[e.Target] = e
	}
	for _, w := range withdrawn {
		delete(last, w)
	}
	for _, t := range targets {
		if strings.HasSuffix(t.Path, translog.ProofSuffix) {
			continue
		}
		r.Targets++
		if !logged[translog.Entry{Target: t.Path, Bytes: t.Bytes, SHA256: t.SHA256}] {
			r.Findings = append(r.Findings, Finding{CodeNotLogged, t.Path, "it is offered, and the log does not have it"})
		}
		delete(last, t.Path)
	}
	for _, e := range entries {
		// What is said anew, such as a notice, may also be taken back.
		if _, unknown := last[e.Target]; unknown && strings.HasSuffix(e.Target, livepatch.BundleSuffix) {
			r.Findings = append(r.Findings, Finding{CodeUnknown, e.Target, "it was released, SHA-256 " + e.SHA256 + ", and is not offered here: withdrawn, or meant for somebody else"})
			delete(last, e.Target)
		}
	}
}

// checkProof verifies a bundle's proof, and that its checkpoint is of the
// history that was read: the log's key could have signed another one.
func checkProof(ctx context.Context, s *tufclient.Snapshot, policy *translog.Policy, wholes map[string]*translog.Log, t tufclient.Target) error {
	target, err := s.Target(translog.ProofPath(t.Path))
	if err != nil {
		return fault.New(fault.Untrusted, translog.CodeNoProof, "no proof is published")
	}
	proof, err := s.Download(ctx, target, translog.MaxProof)
	if err != nil {
		return err
	}
	c, err := policy.Verify(proof, translog.Entry{Target: t.Path, Bytes: t.Bytes, SHA256: t.SHA256})
	if err != nil {
		return err
	}
	whole := wholes[c.Origin]
	if whole == nil {
		return fault.New(fault.Untrusted, CodeNotLogged, "its proof is of log %s, which could not be read here", c.Origin)
	}
	return translog.ExtendsWhole(whole, c)
}
