// SPDX-License-Identifier: Apache-2.0

// Package ceremony takes a change of keys, or a publication that this host
// cannot sign alone, from its preparation to its effect: a draft in pending/,
// signatures by several people, a rehearsal with the real client on a copy,
// completion, and a record in ceremonies/. What the metadata says is package
// tufrepo's; this one owns the files and their order.
//
// Start with Begin and Complete. The draft is on disk before anything changes,
// so a run that dies is completed by the next one.
package ceremony

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/sign"
	"klatch/internal/trust"
	"klatch/internal/tufclient"
	"klatch/internal/tufrepo"
)

// Begin prepares a change and signs it with the keys of this host. Nothing is
// written.
func Begin(ctx context.Context, d datadir.Dir, c tufrepo.Change, keys tufrepo.Keys, now time.Time) (*tufrepo.Draft, error) {
	c.AtLeast = 2
	if d.Policy.Profile == trust.Lab {
		c.AtLeast = 1
	}
	draft, err := tufrepo.Prepare(ctx, d.Repository(), c, now)
	if err != nil {
		return nil, err
	}
	for _, r := range []tufrepo.Role{keys.Root, keys.Targets, keys.Release} {
		if _, err := draft.Sign(r.Signers...); err != nil {
			return nil, err
		}
	}
	return draft, nil
}

var unsafe = regexp.MustCompile(`[^a-z0-9]+`)

// Save writes a draft into pending/ and returns its path.
func Save(d datadir.Dir, draft *tufrepo.Draft) (string, error) {
	if err := os.MkdirAll(d.Pending(), 0o755); err != nil {
		return "", err
	}
	path := filepath.Join(d.Pending(), fileName(draft))
	return path, Write(path, draft)
}

func fileName(draft *tufrepo.Draft) string {
	reason := strings.Trim(unsafe.ReplaceAllString(strings.ToLower(draft.Reason), "-"), "-")
	return fmt.Sprintf("%s-%.60s.json", draft.Prepared.UTC().Format("20060102T150405Z"), reason)
}

// Write writes a draft's file.
func Write(path string, draft *tufrepo.Draft) error {
	b, err := draft.Encode()
	if err != nil {
		return err
	}
	return durable.WriteFile(path, b, 0o644)
}

// Read reads a draft's file.
func Read(path string) (*tufrepo.Draft, error) {
	b, err := durable.ReadFile(path, tufrepo.MaxDraft)
	if err != nil {
		return nil, err
	}
	draft, err := tufrepo.ParseDraft(b)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return draft, nil
}

// Pending lists the drafts that wait.
func Pending(d datadir.Dir) ([]string, error) {
	names, err := filepath.Glob(filepath.Join(d.Pending(), "*.json"))
	slices.Sort(names)
	return names, err
}

// Complete brings a draft into force: first the draft with all its signatures
// into pending/, then the repository, then the record, then pending/ is
// cleared. Each step may be repeated.
func Complete(ctx context.Context, d datadir.Dir, draft *tufrepo.Draft, keys tufrepo.Keys, now time.Time) (tufrepo.Result, error) {
	pending, err := Save(d, draft)
	if err != nil {
		return tufrepo.Result{}, err
	}
	res, err := tufrepo.Complete(ctx, d.Repository(), draft, keys, now)
	if err != nil {
		return res, err
	}
	if err := os.MkdirAll(d.Ceremonies(), 0o755); err != nil {
		return res, err
	}
	if err := Write(filepath.Join(d.Ceremonies(), filepath.Base(pending)), draft); err != nil {
		return res, err
	}
	return res, durable.Remove(pending)
}

// Verdict is what one client said of a rehearsal.
type Verdict struct {
	Client string `json:"client"`
	Error  string `json:"error,omitempty"` // empty: accepted
}

// Rehearse brings a draft into force in a copy of the repository's metadata
// and lets the real client judge: one that has seen everything until now, and
// one that begins at the anchor. The repository itself is only read.
func Rehearse(ctx context.Context, d datadir.Dir, draft *tufrepo.Draft, keys tufrepo.Keys, now time.Time) ([]Verdict, error) {
	dir, err := os.MkdirTemp("", "klatch-rehearsal-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // scratch
	repo := filepath.Join(dir, "repository")
	if err := copyMetadata(d.Repository(), repo); err != nil {
		return nil, err
	}
	raw, err := durable.ReadFile(d.Anchor(), trust.MaxAnchor)
	if err != nil {
		return nil, err
	}
	anchor, err := trust.ParseAnchor(raw, true)
	if err != nil {
		return nil, err
	}
	base, client, err := tufclient.Source(repo, nil)
	if err != nil {
		return nil, err
	}
	look := func(memory string, at time.Time) error {
		_, err := tufclient.Refresh(ctx, tufclient.Config{Root: anchor.Root, Dir: filepath.Join(dir, memory), BaseURL: base, Client: client, Now: at})
		return err
	}
	before := look("seen", now)
	if _, err := tufrepo.Complete(ctx, repo, draft, keys, now); err != nil {
		return nil, err
	}
	var out []Verdict
	judge := func(name, memory string) {
		v := Verdict{Client: name}
		if err := look(memory, now); err != nil {
			v.Error = err.Error()
		}
		out = append(out, v)
	}
	name := "a machine that is up to date"
	if before != nil {
		name += fmt.Sprintf(" (what is published now it refuses: %s)", fault.CodeOf(before))
	}
	judge(name, "seen")
	judge("a new machine that begins at the anchor", "new")
	return out, nil
}

func copyMetadata(from, to string) error {
	if err := os.MkdirAll(filepath.Join(to, "metadata"), 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(filepath.Join(from, "metadata"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() || !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		b, err := durable.ReadFile(filepath.Join(from, "metadata", e.Name()), tufrepo.MaxDraft)
		if err != nil {
			return err
		}
		if err := durable.WriteFile(filepath.Join(to, "metadata", e.Name()), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Resolve makes a whole key id of its beginning, among the keys of a role.
func Resolve(s tufrepo.State, role, prefix string) (string, error) {
	r := s.Role(role)
	if r == nil {
		return "", fault.New(fault.NotFound, "no_role", "role %.80q is not in the repository", role).WithHint("klatch-forge keys list")
	}
	var found []string
	for _, k := range r.Keys {
		if len(prefix) >= 6 && strings.HasPrefix(k.ID, prefix) {
			found = append(found, k.ID)
		}
	}
	if len(found) != 1 {
		return "", fault.New(fault.NotFound, "no_such_key", "%d keys of role %s begin with %.80q", len(found), role, prefix).
			WithHint("give at least six digits of a key id from klatch-forge keys list")
	}
	return found[0], nil
}

// Files maps the ids of all keys that are on this host to their files.
func Files(d datadir.Dir, public func(path string) (string, error)) (map[string]string, error) {
	names, err := filepath.Glob(filepath.Join(d.Keys(), "*.key"))
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, n := range names {
		id, err := public(n)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			out[id] = n
		}
	}
	return out, nil
}

// Keys reads every key of this host, those of the root too.
func Keys(d datadir.Dir) (tufrepo.Keys, error) { return sign.RepositoryKeys(d, sign.Root) }
