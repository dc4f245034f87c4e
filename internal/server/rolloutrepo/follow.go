// SPDX-License-Identifier: Apache-2.0

package rolloutrepo

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/rollout"
	"klatch/internal/server/audit"
	"klatch/internal/tufclient"
	"klatch/internal/tufrepo"
)

// followed are the places of a copy: all but the audit file in one folder.
func followed(data string) (p files, memory string) {
	dir := filepath.Join(data, "rollout-upstream")
	return files{dir: filepath.Join(dir, "repository"), anchor: filepath.Join(dir, "rollout.json"), audit: filepath.Join(data, "audit.log")}, filepath.Join(dir, "memory")
}

// Adopt says whose tiers this server is to follow. Another operator than
// before begins with an empty copy. A server that has an operator's repository
// of its own is refused: its machines believe that one.
func Adopt(ctx context.Context, data string, anchor []byte) (*rollout.Anchor, error) {
	a, err := rollout.ParseAnchor(anchor, true)
	if err != nil {
		return nil, err
	}
	own := paths(data)
	for _, f := range []string{own.anchor, filepath.Join(own.dir, "metadata", "timestamp.json")} {
		if _, err := os.Lstat(f); !errors.Is(err, fs.ErrNotExist) {
			return nil, errors.Join(err, fault.New(fault.Conflict, "rollout_exists", "%s has an operator's repository of its own", data).
				WithHint("its machines follow that one; to give it up move rollout, rollout-keys, rollout.json and rollout-state.json away first"))
		}
	}
	p, memory := followed(data)
	if err := os.MkdirAll(memory, 0o700); err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, memory)
	if err != nil {
		return nil, err
	}
	old, err := durable.ReadFile(p.anchor, rollout.MaxAnchor)
	if err == nil && bytes.Equal(old, anchor) {
		return a, unlock()
	}
	// The copy goes before the anchor: what lies there is always of the anchor.
	return a, errors.Join(os.RemoveAll(p.dir), durable.WriteFile(p.anchor, anchor, 0o644), unlock())
}

// Follow opens the copy of an operator's repository that a server above
// serves. It is read and brought up to date (Fetch), and every change by
// people is refused: they are made above. Above names that server to them.
func Follow(data, above string, log *slog.Logger) (*Repo, error) {
	p, memory := followed(data)
	r := &Repo{files: p, log: log, record: audit.Open(p.audit), followMemory: memory, above: cmp.Or(above, "the server that this one copies from")}
	b, err := durable.ReadFile(p.anchor, rollout.MaxAnchor)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "rollout_anchor_lost", "%s is to follow the tiers of the server above, without the operator's anchor %s", data, p.anchor).
			WithHint("get rollout.json from whoever runs that server, then: klatch-server configure --rollout upstream --rollout-anchor FILE")
	}
	if err != nil {
		return nil, err
	}
	if r.anchor, err = rollout.ParseAnchor(b, true); err != nil {
		return nil, err
	}
	r.selected.Store(&[]rollout.Selection{})
	_, err = r.reread()
	if fault.CodeOf(err) == notCopied {
		err = nil
	}
	return r, err
}

const notCopied fault.Code = "rollout_not_copied"

// Above names the server whose tiers are followed; empty where the operator's
// repository is this server's own.
func (r *Repo) Above() string { return r.above }

// Local refuses a change where the tiers are those of a server above.
func (r *Repo) Local() error {
	if r.above == "" {
		return nil
	}
	return fault.New(fault.Conflict, "rollout_upstream", "this server follows the tiers of operator %s and changes none", r.anchor.Operator).
		WithHint("promote, hold and change tiers at %s; what is decided there arrives here by itself", r.above)
}

// reread takes what the copy holds now, if it is not what was read last.
func (r *Repo) reread() (bool, error) {
	b, err := durable.ReadFile(filepath.Join(r.dir, "metadata", "timestamp.json"), rollout.MaxAnchor)
	if errors.Is(err, fs.ErrNotExist) {
		return false, fault.New(fault.NotFound, notCopied, "the tiers of operator %s are not copied yet", r.anchor.Operator).
			WithHint("copy them: klatch-server sync; what came of it: klatch-server status")
	}
	if err != nil || bytes.Equal(b, r.seen) {
		return false, err
	}
	s, err := r.read()
	if err != nil {
		return false, err
	}
	r.seen = b
	r.selected.Store(&s.Selections)
	return true, nil
}

// Fetched is a verified state of the server above, not yet in force here.
type Fetched struct {
	r        *Repo
	anchor   []byte // that it was verified with
	snapshot *tufclient.Snapshot
}

// Fetch verifies what the server above has, as a machine does, and brings its
// files here beside those in force. It refuses what this server cannot read:
// it could not say what a tier runs.
func (r *Repo) Fetch(ctx context.Context, baseURL string, client *http.Client, now time.Time) (*Fetched, error) {
	f, err := r.fetch(ctx, baseURL, client, now)
	if err != nil && ctx.Err() == nil {
		hint := fault.HintOf(err)
		if fault.KindOf(err) == fault.Unavailable {
			hint = "check the network, and that the server above has an operator's repository or follows one: klatch-server rollout status there"
		}
		err = fault.New(fault.KindOf(err), fault.CodeOf(err), "tiers of %s were not taken, the old ones stay: %w", r.above, err).WithHint("%s", hint)
	}
	return f, err
}

func (r *Repo) fetch(ctx context.Context, baseURL string, client *http.Client, now time.Time) (f *Fetched, err error) {
	unlock, err := lock(ctx, r.followMemory)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	f = &Fetched{r: r}
	if f.anchor, err = durable.ReadFile(r.files.anchor, rollout.MaxAnchor); err != nil {
		return nil, err
	}
	base, err := url.JoinPath(baseURL, "rollout")
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_url", "repository address: %w", err)
	}
	f.snapshot, err = tufclient.Refresh(ctx, tufclient.Config{Root: r.anchor.Root, Dir: r.followMemory, BaseURL: base, Client: client, Now: now,
		Operator: &tufclient.Operator{Approvers: r.anchor.Profile.Approvers()}})
	if err != nil {
		return nil, err
	}
	for _, t := range f.snapshot.Targets() {
		path := filepath.Join(r.dir, "targets", filepath.FromSlash(tufclient.BlobPath(t)))
		b, err := durable.ReadFile(path, rollout.MaxTiersFile)
		if fresh := err != nil || !t.Is(b); fresh {
			if b, err = f.snapshot.Download(ctx, t, rollout.MaxTiersFile); err != nil {
				return nil, err
			}
		}
		if err := readable(t.Path, b); err != nil {
			return nil, err
		}
		if err := put(r.dir, path, b); err != nil {
			return nil, err
		}
	}
	if _, err := f.snapshot.Target(rollout.TiersPath); err != nil {
		return nil, err
	}
	return f, nil
}

// readable refuses a target that is not what its path says.
func readable(path string, b []byte) error {
	belongs := path
	switch role, _, _ := strings.Cut(path, "/"); role {
	case rollout.RoleSelect:
		s, err := rollout.ParseSelection(b)
		if err != nil {
			return err
		}
		belongs = rollout.SelectPath(s.Tier, s.Kernel.ID)
	case rollout.RolePromotion:
		p, err := rollout.ParsePromotion(b)
		if err != nil {
			return err
		}
		belongs = rollout.PromotionPath(p.Tier, p.SHA256)
	default:
		if path == rollout.TiersPath {
			_, err := rollout.ParseTiers(b)
			return err
		}
	}
	if belongs != path {
		return fault.New(fault.Untrusted, "target_path", "file %.160q belongs at %s", path, belongs)
	}
	return nil
}

// Install brings what was fetched into force, timestamp.json last: whoever
// reads the copy, also after a crash, sees the old state or the new one. What
// another process has brought here meanwhile, or an anchor that was replaced,
// is not undone.
func (f *Fetched) Install(ctx context.Context) (changed bool, err error) {
	r := f.r
	unlock, err := lock(ctx, r.followMemory)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if b, err := durable.ReadFile(r.files.anchor, rollout.MaxAnchor); err != nil || !bytes.Equal(b, f.anchor) {
		return false, err
	}
	if s, err := tufrepo.Look(r.dir); err == nil { // one that cannot be read is written anew
		if t := s.Role("timestamp"); t != nil && t.Version > f.snapshot.Timestamp {
			return false, nil
		}
	}
	for _, m := range f.snapshot.Files() {
		if err := put(r.dir, filepath.Join(r.dir, "metadata", m.Name), m.Content); err != nil {
			return false, err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reread()
}

// put writes a file below dir durably, with its folders, unless it is there.
func put(dir, path string, content []byte) error {
	if old, err := durable.ReadFile(path, int64(len(content))); err == nil && bytes.Equal(old, content) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := durable.WriteFile(path, content, 0o644); err != nil {
		return err
	}
	for d := filepath.Dir(path); len(d) >= len(dir); d = filepath.Dir(d) {
		if err := durable.SyncDir(filepath.Dir(d)); err != nil {
			return err
		}
	}
	return nil
}

// lockWait is how long another process, a sync by hand beside serve, is waited
// for.
const lockWait = 30 * time.Second

func lock(ctx context.Context, memory string) (func() error, error) {
	if err := os.MkdirAll(memory, 0o700); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for {
		unlock, err := durable.Lock(filepath.Join(memory, ".lock"))
		if fault.CodeOf(err) != "locked" {
			return unlock, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-again.C:
		}
	}
}
