// SPDX-License-Identifier: Apache-2.0

// Package rolloutrepo keeps the operator's repository on the server: it
// selects what each tier runs and signs that with the server's own keys,
// prepares what people must sign, and brings into force what they have signed.
// What the files mean is package rollout's; what travels to people is package
// rolloutdraft's; the order of writes is package tufrepo's.
//
// The server's keys sign select, snapshot and timestamp. They sign no role
// that delegates, so this code, and whoever takes it over, can hold a tier and
// can choose among what was promoted, and can open no tier.
//
// A server may follow the tiers of a server above instead (Follow): it then
// serves a copy, signs nothing and refuses every change.
//
// Start with Update. Every change by a person is in the audit file before it
// is made (package audit).
package rolloutrepo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/obs"
	"klatch/internal/rollout"
	"klatch/internal/server/audit"
	"klatch/internal/tufrepo"
)

// files are the places below the server's data folder.
type files struct {
	dir    string // metadata/ and targets/
	keys   string // the server's private keys
	anchor string // for machines
	state  string
	audit  string
}

func paths(data string) files {
	return files{
		dir: filepath.Join(data, "rollout"), keys: filepath.Join(data, "rollout-keys"), anchor: filepath.Join(data, "rollout.json"),
		state: filepath.Join(data, "rollout-state.json"), audit: filepath.Join(data, "audit.log"),
	}
}

// Repo is the operator's repository.
type Repo struct {
	files
	log    *slog.Logger
	record *audit.Log
	anchor *rollout.Anchor

	mu       sync.Mutex
	memory   memory
	released []rollout.Release // as Update was told last; nil: nothing is known

	selected atomic.Pointer[[]rollout.Selection] // in force, for Offered

	// Of a copy that follows a server above (Follow).
	above        string // names it; empty: this repository is our own
	followMemory string // what was accepted from it (package tufclient)
	seen         []byte // timestamp.json that was read last
}

// memory is what the server was told, and what it published: its file lies
// beside the repository, so that one that was put back from a backup alone is
// noticed.
type memory struct {
	Format    string            `json:"format"`
	Holds     map[string]string `json:"holds"`     // tier to reason
	Published map[string]int64  `json:"published"` // newest version by role
}

const (
	memoryFormat = "klatch-rollout-state/1"
	maxMemory    = 1 << 20
)

// epoch is what the clock's part of a version is counted from, in steps. A
// server that was put back from a backup so takes numbers that it cannot have
// used, unless it published oftener than once in a step ever since the backup.
// A client that has seen nothing takes no version over a million (package
// tufclient): steps of ten minutes reach that in 2045.
var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

const step = 10 * time.Minute

func clock(now time.Time) int64 { return max(int64(now.Sub(epoch)/step), 1) }

// Open reads the repository of a server's data folder. It refuses one that is
// older than what was published from here: its machines have seen more, and
// would refuse it without an end.
func Open(data string, log *slog.Logger) (*Repo, error) {
	r := &Repo{files: paths(data), log: log, memory: memory{Format: memoryFormat, Holds: map[string]string{}, Published: map[string]int64{}}}
	r.record = audit.Open(r.audit)
	b, err := durable.ReadFile(r.files.anchor, rollout.MaxAnchor)
	if _, gone := os.Lstat(filepath.Join(r.dir, "metadata", "timestamp.json")); errors.Is(err, fs.ErrNotExist) && gone == nil {
		// Going on without it would offer everything to every tier.
		return nil, fault.New(fault.Conflict, "rollout_anchor_lost", "%s has an operator's repository without its anchor %s", data, r.files.anchor).
			WithHint("copy the anchor back, from a machine or an approver; or repeat klatch-server rollout init if it was interrupted")
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "no_rollout", "%s has no operator's repository", data).
			WithHint("make one: klatch-server rollout init --operator NAME --profile lab|small|full")
	}
	if err != nil {
		return nil, err
	}
	if r.anchor, err = rollout.ParseAnchor(b, true); err != nil {
		return nil, err
	}
	state, err := r.read()
	if err != nil {
		return nil, err
	}
	r.selected.Store(&state.Selections)
	b, err = durable.ReadFile(r.files.state, maxMemory)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// Lost: the holds are also in what was signed.
		for _, s := range state.Selections {
			if s.Hold {
				r.memory.Holds[s.Tier] = s.Reason
			}
		}
	case err != nil:
		return nil, err
	default:
		if err := json.Unmarshal(b, &r.memory); err != nil || r.memory.Format != memoryFormat || r.memory.Holds == nil || r.memory.Published == nil {
			return nil, fault.New(fault.Internal, "state_malformed", "read %s: not what was written there: %w", r.files.state, err).
				WithHint("move it away; the holds are then read from what was signed last")
		}
	}
	return r, r.behind()
}

func (r *Repo) behind() error {
	s, err := tufrepo.Look(r.dir)
	if err != nil {
		return err
	}
	for _, role := range s.Roles {
		if was := r.memory.Published[role.Name]; role.Version < was {
			return fault.New(fault.Conflict, "rollout_behind", "the operator's repository has %s %d, but %d was published from here", role.Name, role.Version, was).
				WithHint("put the newest copy of the folder %s back: docs/howto/tiers-and-promotion.md, \"From a backup\"", r.dir)
		}
	}
	return nil
}

// Anchor is what machines believe of this operator.
func (r *Repo) Anchor() *rollout.Anchor { return r.anchor }

// NewestAnchor begins at the root in force: for people and machines that come
// after a change of keys, so that nobody can show them the time before it.
func (r *Repo) NewestAnchor() (*rollout.Anchor, error) {
	roots, err := tufrepo.Roots(r.dir)
	if err != nil || len(roots) == 0 {
		return nil, errors.Join(err, fault.New(fault.Internal, "no_root", "repository %s has no root", r.dir))
	}
	a := *r.anchor
	a.Root = roots[len(roots)-1]
	return &a, nil
}

// Dir is the folder with metadata/ and targets/, to be served.
func (r *Repo) Dir() string { return r.dir }

// Record is the audit file.
func (r *Repo) Record() *audit.Log { return r.record }

func (r *Repo) repository(now time.Time) tufrepo.Repository {
	return tufrepo.Repository{Dir: r.dir, Least: func(role string) int64 {
		return max(r.memory.Published[role]+1, clock(now))
	}}
}

// read reads what is in force. Holds are not filled in.
func (r *Repo) read() (rollout.State, error) {
	s := rollout.State{Holds: map[string]string{}}
	look, err := tufrepo.Look(r.dir)
	if err != nil {
		return s, err
	}
	contents, err := tufrepo.Open(r.dir)
	if err != nil {
		return s, err
	}
	b, err := contents.Read(rollout.TiersPath, rollout.MaxTiersFile)
	if err != nil {
		return s, err
	}
	if s.Tiers, err = rollout.ParseTiers(b); err != nil {
		return s, err
	}
	list := func(role string, take func([]byte) error) error {
		of := look.Role(role)
		if of == nil {
			return fault.New(fault.Internal, "no_role", "repository %s has no role %s", r.dir, role)
		}
		for _, path := range of.Targets {
			b, err := contents.Read(path, rollout.MaxPromotionFile)
			if err == nil {
				err = take(b)
			}
			if err != nil {
				return fmt.Errorf("read %s of %s: %w", path, r.dir, err)
			}
		}
		return nil
	}
	if err := list(rollout.RoleSelect, func(b []byte) error {
		x, err := rollout.ParseSelection(b)
		s.Selections = append(s.Selections, x)
		return err
	}); err != nil {
		return s, err
	}
	return s, list(rollout.RolePromotion, func(b []byte) error {
		x, err := rollout.ParsePromotion(b)
		s.Promotions = append(s.Promotions, x)
		return err
	})
}

// State is what is in force, and what the server was told.
func (r *Repo) State() (rollout.State, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state()
}

func (r *Repo) state() (rollout.State, error) {
	if r.above != "" {
		if _, err := r.reread(); err != nil {
			return rollout.State{}, err
		}
	}
	s, err := r.read()
	if r.above == "" {
		s.Holds = maps.Clone(r.memory.Holds)
		return s, err
	}
	for _, x := range s.Selections {
		if x.Hold {
			s.Holds[x.Tier] = x.Reason
		}
	}
	return s, err
}

// Update selects what each tier is to run of what the publisher offers now,
// and signs again what has lived through half of its life. With nil nothing
// is known of the publisher, and only the latter is done: a server that cannot
// read its copy takes nothing back. It says whether anything was published. Of
// a server above it only takes what was copied.
func (r *Repo) Update(ctx context.Context, released []rollout.Release, now time.Time) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.above != "" {
		changed, err := r.reread()
		if fault.CodeOf(err) == notCopied {
			err = nil // the sync says why
		}
		return changed, err
	}
	if released != nil {
		r.released = released
	}
	return r.update(ctx, now)
}

func (r *Repo) update(ctx context.Context, now time.Time) (bool, error) {
	s, err := r.state()
	if err != nil {
		return false, err
	}
	var p tufrepo.Publication
	wanted := s.Selections
	if r.released != nil {
		wanted = rollout.Wanted(now, r.released, s)
		p = r.difference(ctx, s.Selections, wanted)
	}
	own, people, err := r.signers()
	if err != nil {
		return false, err
	}
	if r.anchor.Profile == rollout.Lab { // there nobody else renews
		own.Targets.Signers = people
	}
	res, err := r.repository(now).Publish(ctx, p, own, now)
	if err != nil {
		return false, err
	}
	r.selected.Store(&wanted)
	return res.Changed, r.remember(res)
}

// Offered says whether a tier is to run a target now. It is for machines that
// were not given the operator's anchor, and for pages; others ask the
// repository itself.
func (r *Repo) Offered(tier, target string) bool {
	return slices.ContainsFunc(*r.selected.Load(), func(s rollout.Selection) bool {
		return s.Tier == tier && s.Target == target && !s.Hold
	})
}

// difference is what makes wanted of old. One that cannot be written, which no
// verified livepatch should lead to, keeps none of the others back.
func (r *Repo) difference(ctx context.Context, old, wanted []rollout.Selection) (p tufrepo.Publication) {
	keep := map[string]bool{}
	for _, w := range wanted {
		path := rollout.SelectPath(w.Tier, w.Kernel.ID)
		keep[path] = true
		if slices.Contains(old, w) {
			continue
		}
		b, err := w.Encode()
		if err != nil {
			r.log.LogAttrs(ctx, slog.LevelError, "livepatch cannot be selected", slog.String("target", w.Target), obs.Err(err))
			continue
		}
		p.Targets = append(p.Targets, tufrepo.Target{Path: path, Content: b, Replace: true})
	}
	for _, o := range old {
		if path := rollout.SelectPath(o.Tier, o.Kernel.ID); !keep[path] {
			p.Withdraw = append(p.Withdraw, path)
		}
	}
	return p
}

// remember notes the versions that are published.
func (r *Repo) remember(res tufrepo.Result) error {
	now := map[string]int64{"root": res.Root, "targets": res.Targets, "snapshot": res.Snapshot, "timestamp": res.Timestamp}
	maps.Copy(now, res.Release)
	if maps.Equal(now, r.memory.Published) {
		return nil
	}
	next := r.memory
	next.Published = now
	return r.save(next)
}

func (r *Repo) save(m memory) error {
	b, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return err
	}
	if err := durable.WriteFile(r.files.state, append(b, '\n'), 0o600); err != nil {
		return err
	}
	r.memory = m
	return nil
}

// Hold stops a tier where it is, or with an empty reason lets it go on.
func (r *Repo) Hold(ctx context.Context, who, tier, reason string, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.Local(); err != nil {
		return err
	}
	s, err := r.state()
	if err != nil {
		return err
	}
	if s.Tiers.Index(tier) < 0 {
		return fault.New(fault.NotFound, "no_tier", "there is no tier %.60q", tier).WithHint("klatch-fleet tier list")
	}
	before, held := s.Holds[tier]
	what := "hold"
	if reason == "" {
		what = "release"
		if !held {
			return fault.New(fault.Conflict, "not_held", "tier %s is not on hold", tier).WithHint("klatch-fleet tier list")
		}
	} else if err := rollout.CheckReason(reason); err != nil {
		return fault.New(fault.Invalid, "bad_reason", "%w", err).WithHint("say it in one line of printable characters")
	}
	next := memory{memoryFormat, maps.Clone(r.memory.Holds), r.memory.Published}
	if next.Holds[tier] = reason; reason == "" {
		delete(next.Holds, tier)
	}
	return r.audited(audit.Entry{At: now.UTC(), Who: who, What: what, Tier: tier, Before: text(before), After: text(reason), Reason: reason}, func() error {
		if err := r.save(next); err != nil {
			return err
		}
		_, err := r.update(ctx, now)
		return err
	})
}

// audited writes the line, does it, and writes another line if that failed.
func (r *Repo) audited(e audit.Entry, do func() error) error {
	if err := r.record.Append(e); err != nil {
		return err
	}
	err := do()
	if err != nil {
		e.Failed = err.Error()
		return errors.Join(err, r.record.Append(e))
	}
	return nil
}

func text(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil || string(b) == `""` {
		return nil
	}
	return b
}
