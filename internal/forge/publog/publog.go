// SPDX-License-Identifier: Apache-2.0

// Package publog is the publisher's transparency log: it holds the log key,
// appends an entry for every file before the file is published, waits until
// the log's checkpoint covers it, collects the witnesses' cosignatures, and
// makes the proof that travels beside each bundle. The log itself is static
// files in the repository folder, written by Tessera. Reading a log is package
// translog; witnesses are package witness.
//
// Start with Add. It may die anywhere: an entry that is in the log is found
// there by the next run and not added twice.
package publog

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/note"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/witness"
	"klatch/internal/translog"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
	"klatch/internal/tufrepo"
)

// KeyFile holds the log key, a note signer key.
func KeyFile(d datadir.Dir) string { return filepath.Join(d.Keys(), "log.key") }

// PolicyFile is reviewed text: the log, its witnesses and their quorum (C2SP
// tlog-policy).
func PolicyFile(d datadir.Dir) string { return filepath.Join(d.Path, "log.policy") }

// Origin names a publisher's log.
func Origin(d datadir.Dir) string { return d.Policy.Publisher + "/log" }

// Witnesses are verifier key and address of each witness, and how many must
// cosign; 0 takes the least that the profile asks for.
type Witnesses struct {
	Keys []string // "VKEY URL"
	Need int
}

// Init makes what is missing of a log: its key, its policy, and the policy's
// place in the trust anchor. Repeated after the policy file was edited, it
// puts the new policy into the anchor. Machines ask for proofs from the moment
// their owner installs that anchor.
func Init(d datadir.Dir, w Witnesses) (*translog.Policy, error) {
	secret, err := makeKey(d)
	if err != nil {
		return nil, err
	}
	text, err := durable.ReadFile(PolicyFile(d), translog.MaxPolicy)
	switch {
	case err == nil && len(w.Keys) > 0:
		return nil, fault.New(fault.Conflict, "log_policy_exists", "log policy %s exists", PolicyFile(d)).
			WithHint("edit that file, then: klatch-forge log init")
	case errors.Is(err, fs.ErrNotExist):
		if text, err = newPolicy(d, secret, w); err == nil {
			err = durable.WriteFile(PolicyFile(d), text, 0o644)
		}
	}
	if err != nil {
		return nil, err
	}
	policy, err := translog.Require(string(text), string(d.Policy.Profile))
	if err != nil {
		return nil, err
	}
	if own := policy.Log(secret.Log().Name()); own == nil || own.String() != secret.Log().String() {
		return nil, fault.New(fault.Conflict, translog.CodePolicy, "log policy %s does not list this folder's own log", PolicyFile(d)).
			WithHint("add the line: log %s", secret.Log())
	}
	return policy, intoAnchor(d, string(text))
}

func makeKey(d datadir.Dir) (translog.Secret, error) {
	b, err := durable.ReadFile(KeyFile(d), 4<<10)
	if errors.Is(err, fs.ErrNotExist) {
		var s string
		if s, _, err = note.GenerateKey(rand.Reader, Origin(d)); err == nil {
			b = []byte(s + "\n")
			err = durable.WriteFile(KeyFile(d), b, 0o600)
		}
	}
	if err != nil {
		return translog.Secret{}, err
	}
	return translog.ParseSecret(string(b))
}

func newPolicy(d datadir.Dir, log translog.Secret, w Witnesses) ([]byte, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "# Who keeps the log of %s honest: C2SP tlog-policy.\n# After a change: klatch-forge log init\nlog %s\n", d.Policy.Publisher, log.Log())
	var names []string
	for _, k := range w.Keys {
		words := strings.Fields(k)
		if len(words) != 2 {
			return nil, fault.New(fault.Invalid, translog.CodePolicy, "witness %.120q is not a verifier key and an address", k).
				WithHint(`--witness "NAME+ID+KEY https://witness.example.org"`)
		}
		v, err := translog.ParseWitnessKey(words[0])
		if err != nil {
			return nil, err
		}
		names = append(names, v.Name())
		fmt.Fprintf(&b, "witness %s %s %s\n", v.Name(), v, words[1])
	}
	need := w.Need
	if need == 0 {
		need = translog.ProfileLeast(string(d.Policy.Profile))
	}
	if len(names) < need {
		return nil, fault.New(fault.Invalid, translog.CodePolicy, "%d witnesses must cosign, %d are named", need, len(names)).
			WithHint(`name them, with addresses: --witness "VKEY URL"; a witness is made by klatch-forge log witness init`)
	}
	if need == 0 {
		b.WriteString("quorum none\n")
	} else {
		fmt.Fprintf(&b, "group witnesses %d %s\nquorum witnesses\n", need, strings.Join(names, " "))
	}
	return []byte(b.String()), nil
}

func readAnchor(d datadir.Dir) (*trust.Anchor, error) {
	raw, err := durable.ReadFile(d.Anchor(), trust.MaxAnchor)
	if err != nil {
		return nil, err
	}
	return trust.ParseAnchor(raw, true)
}

func intoAnchor(d datadir.Dir, policy string) error {
	anchor, err := readAnchor(d)
	if err != nil || anchor.LogPolicy == policy {
		return err
	}
	anchor.LogPolicy = policy
	b, err := trustsign.Anchor(*anchor)
	if err != nil {
		return err
	}
	return durable.WriteFile(d.Anchor(), b, 0o644)
}

// Log is a publisher's log, opened.
type Log struct {
	Policy *translog.Policy
	Dir    string // of its files
	secret string
	own    *translog.Verifier
	repo   string
}

// Open reads policy and key; nil means that this publisher keeps no log.
func Open(d datadir.Dir) (*Log, error) {
	anchor, err := readAnchor(d)
	if err != nil {
		return nil, err
	}
	policy, err := translog.Require(anchor.LogPolicy, string(anchor.Profile))
	if policy == nil || err != nil {
		return nil, err
	}
	b, err := durable.ReadFile(KeyFile(d), 4<<10)
	if err != nil {
		return nil, fault.New(fault.NotFound, "no_key", "log key: %w", err).WithHint("is this the host that holds the publisher's log key?")
	}
	secret, err := translog.ParseSecret(string(b))
	if err != nil {
		return nil, err
	}
	own := secret.Log()
	if v := policy.Log(own.Name()); v == nil || v.String() != own.String() {
		return nil, fault.New(fault.Conflict, translog.CodePolicy, "the trust anchor does not know this folder's log %s", own.Name()).
			WithHint("add it to %s, then: klatch-forge log init", PolicyFile(d))
	}
	return &Log{policy, filepath.Join(d.Repository(), filepath.FromSlash(translog.Folder(own))), strings.TrimSpace(string(b)), own, d.Repository()}, nil
}

// Key is the log's verifier key.
func (l *Log) Key() *translog.Verifier { return l.own }

// ReadDir reads the files of a log from a folder.
func ReadDir(dir string) translog.Read {
	return func(_ context.Context, name string, limit int64) ([]byte, error) {
		b, err := durable.ReadFile(filepath.Join(dir, filepath.FromSlash(name)), limit)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fault.New(fault.NotFound, "log_file_missing", "%w", err)
		}
		return b, err
	}
}

// Read reads the log whole, as its newest checkpoint says. A log that was
// never written is empty.
func (l *Log) Read(ctx context.Context) (*translog.Log, error) {
	read := ReadDir(l.Dir)
	signed, err := read(ctx, translog.CheckpointFile, translog.MaxCheckpoint)
	if fault.KindOf(err) == fault.NotFound {
		return &translog.Log{}, nil
	}
	if err != nil {
		return nil, err
	}
	c, err := l.Policy.OpenUnwitnessed(signed)
	if err != nil {
		return nil, err
	}
	return translog.ReadLog(ctx, read, c)
}

// Add logs every target of a publication and adds the proofs of its bundles,
// those with the given suffix. On return the publication may be published:
// each entry is in the log, the log's checkpoint covers it, and the witnesses'
// quorum has cosigned that checkpoint. Nothing of it is done twice.
func (l *Log) Add(ctx context.Context, p tufrepo.Publication, suffix string, client *http.Client) (tufrepo.Publication, error) {
	if err := os.MkdirAll(l.Dir, 0o755); err != nil {
		return p, err
	}
	unlock, err := durable.Lock(filepath.Join(l.Dir, ".lock"))
	if err != nil {
		return p, err
	}
	p, err = l.add(ctx, p, suffix, client)
	return p, errors.Join(err, unlock())
}

func (l *Log) add(ctx context.Context, p tufrepo.Publication, suffix string, client *http.Client) (tufrepo.Publication, error) {
	before, err := l.Read(ctx)
	if err != nil {
		return p, err
	}
	taken := map[string]translog.Entry{}
	for _, e := range before.Entries {
		taken[e.Target] = e
	}
	var entries []translog.Entry
	for _, t := range p.Targets {
		e := translog.EntryOf(t.Path, t.Content)
		// The log forgets nothing: what could not be published is not logged.
		if old, ok := taken[t.Path]; ok && old != e && !t.Replace {
			return p, fault.New(fault.Conflict, "target_exists", "target %s is in the log with other content", t.Path).
				WithHint("a published file never changes; publish a higher sequence")
		}
		entries = append(entries, e)
	}
	whole, err := l.append(ctx, entries)
	if err != nil {
		return p, err
	}
	published, err := tufrepo.Open(l.repo)
	if err != nil {
		return p, err
	}
	out := p
	out.Targets = nil
	var cosigned []byte
	for i, t := range p.Targets {
		if strings.HasSuffix(t.Path, suffix) {
			proof, err := published.Read(translog.ProofPath(t.Path), translog.MaxProof)
			if err != nil && fault.KindOf(err) != fault.NotFound {
				return p, err
			}
			// A proof stays as it is, unless the policy now asks for more.
			if _, err := l.Policy.Verify(proof, entries[i]); err != nil {
				if cosigned == nil {
					if cosigned, err = l.cosigned(ctx, whole, client); err != nil {
						return p, err
					}
				}
				if proof, err = prove(whole, entries[i], cosigned); err != nil {
					return p, err
				}
				// What a machine will refuse is not published.
				if _, err := l.Policy.Verify(proof, entries[i]); err != nil {
					return p, fmt.Errorf("proof of %s: %w", t.Path, err)
				}
			}
			out.Targets = append(out.Targets, tufrepo.Target{Path: translog.ProofPath(t.Path), Content: proof, Replace: true})
		}
		out.Targets = append(out.Targets, t)
	}
	return out, nil
}

func prove(whole *translog.Log, e translog.Entry, signed []byte) ([]byte, error) {
	i, ok := whole.Index(e)
	if !ok {
		return nil, fmt.Errorf("log entry of %s: not in the log after it was added", e.Target)
	}
	proof, err := whole.Prove(i, signed)
	if err != nil {
		return nil, err
	}
	return proof.Encode(), nil
}

// cosigned is the newest checkpoint with the quorum's cosignatures. It is also
// kept beside the log's own, for those who watch.
func (l *Log) cosigned(ctx context.Context, whole *translog.Log, client *http.Client) ([]byte, error) {
	file := filepath.Join(l.Dir, translog.CosignedFile)
	if old, err := durable.ReadFile(file, translog.MaxCheckpoint); err == nil {
		if c, err := l.Policy.Open(old); err == nil && c.Size == whole.Checkpoint.Size && c.Root == whole.Checkpoint.Root {
			return old, nil
		}
	}
	signed, err := witness.Collect(ctx, client, l.Policy, whole)
	if err != nil {
		return nil, err
	}
	return signed, durable.WriteFile(file, signed, 0o644)
}

// append adds the entries that the log does not have, and returns the log with
// all of them.
func (l *Log) append(ctx context.Context, entries []translog.Entry) (*translog.Log, error) {
	whole, err := l.Read(ctx)
	if err != nil {
		return nil, err
	}
	if len(missing(whole, entries)) == 0 && whole.Checkpoint.Size > 0 {
		return whole, nil
	}
	w, err := l.openWriter(ctx)
	if err != nil {
		return nil, err
	}
	defer w.close()
	// A run that died may have left entries that no checkpoint covers yet.
	if err := w.settle(ctx); err != nil {
		return nil, err
	}
	if whole, err = l.Read(ctx); err != nil {
		return nil, err
	}
	if more := missing(whole, entries); len(more) > 0 {
		if err := w.add(ctx, more); err != nil {
			return nil, err
		}
		if whole, err = l.Read(ctx); err != nil {
			return nil, err
		}
	}
	if left := missing(whole, entries); len(left) > 0 {
		return nil, fmt.Errorf("log %s: %d entries are not covered by its checkpoint after they were added", l.own.Name(), len(left))
	}
	return whole, translog.Prune(l.Dir, whole.Checkpoint.Size)
}

// missing are the entries that a log does not hold, each once. Another entry
// under a name that is taken would be a second history of that file.
func missing(whole *translog.Log, entries []translog.Entry) []translog.Entry {
	have := map[translog.Entry]bool{}
	for _, e := range whole.Entries {
		have[e] = true
	}
	var out []translog.Entry
	for _, e := range entries {
		if !have[e] {
			have[e] = true
			out = append(out, e)
		}
	}
	return slices.Clip(out)
}
