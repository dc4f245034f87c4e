// SPDX-License-Identifier: Apache-2.0

package publish

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/datadir"
	"klatch/internal/forge/sign"
	"klatch/internal/livepatch"
	"klatch/internal/notice"
	"klatch/internal/tufrepo"
)

// recallsFile is the publisher's own text of recalls, reviewed like all else
// in the data folder.
func recallsFile(d datadir.Dir) string { return filepath.Join(d.Path, "recalls.json") }

// Recalls reads what the publisher has taken back so far.
func Recalls(d datadir.Dir) (livepatch.Recalls, error) {
	b, err := durable.ReadFile(recallsFile(d), livepatch.MaxRecalls)
	if errors.Is(err, fs.ErrNotExist) {
		return livepatch.Recalls{Format: livepatch.RecallsFormat, Entries: []livepatch.Recall{}, Floors: []livepatch.Floor{}, Keys: []string{}}, nil
	}
	if err != nil {
		return livepatch.Recalls{}, err
	}
	return livepatch.ParseRecalls(b)
}

// Recall takes more back: it writes the text, signs it with the manifest keys
// and puts it into the top list, in place of the one before, together with the
// withdrawal of the livepatches that it names. What is published comes from
// the text alone, so after a crash, or with add changing nothing, the same call
// completes the work.
func Recall(ctx context.Context, d datadir.Dir, add func(*livepatch.Recalls), now time.Time) (livepatch.Recalls, tufrepo.Result, error) {
	old, err := Recalls(d)
	if err != nil {
		return old, tufrepo.Result{}, err
	}
	r := clone(old)
	add(&r)
	if !same(r, old) {
		r.Version, r.Issued = old.Version+1, now.UTC().Truncate(time.Second)
		if !r.Holds(old) {
			return old, tufrepo.Result{}, fault.New(fault.Conflict, "recalls_shrink", "recalls only grow: what machines were told cannot be unsaid").
				WithHint("publish a higher sequence instead")
		}
		b, err := r.Encode()
		if err != nil {
			return old, tufrepo.Result{}, err
		}
		if err := durable.WriteFile(recallsFile(d), b, 0o644); err != nil {
			return old, tufrepo.Result{}, err
		}
	}
	if r.Version == 0 {
		return r, tufrepo.Result{}, fault.New(fault.Invalid, "nothing_recalled", "nothing is recalled").WithHint("klatch-forge recall --kernel RELEASE --sequence N --reason TEXT")
	}
	p, err := recallPublication(d, r)
	if err != nil {
		return r, tufrepo.Result{}, err
	}
	keys, err := sign.RepositoryKeys(d, sign.All)
	if err != nil {
		return r, tufrepo.Result{}, err
	}
	// Logged like all else: one machine cannot be told of a recall that nobody
	// else sees. It needs no proof, so it waits for no witness.
	if p, err = logged(ctx, d, p); err != nil {
		return r, tufrepo.Result{}, err
	}
	res, err := tufrepo.Publish(ctx, d.Repository(), p, keys, now)
	return r, res, err
}

func clone(r livepatch.Recalls) livepatch.Recalls {
	r.Entries, r.Floors, r.Keys = slices.Clone(r.Entries), slices.Clone(r.Floors), slices.Clone(r.Keys)
	return r
}

func same(a, b livepatch.Recalls) bool {
	return slices.Equal(a.Entries, b.Entries) && slices.Equal(a.Floors, b.Floors) && slices.Equal(a.Keys, b.Keys)
}

func recallPublication(d datadir.Dir, r livepatch.Recalls) (tufrepo.Publication, error) {
	var p tufrepo.Publication
	signed, err := sign.Recalls(d, r)
	if err != nil {
		return p, err
	}
	p.Targets = []tufrepo.Target{{Path: livepatch.RecallsPath(r.Version), Content: signed}}
	state, err := tufrepo.Look(d.Repository())
	if err != nil {
		return p, err
	}
	for _, role := range state.Roles {
		for _, t := range role.Targets {
			c, err := tufrepo.Custom(d.Repository(), role.Name, t)
			if err != nil {
				return p, err
			}
			taken, err := recalled(r, c)
			if err != nil {
				return p, fmt.Errorf("published target %s of role %s: %w", t, role.Name, err)
			}
			if v := livepatch.RecallsVersion(t); v > 0 && v != r.Version || taken {
				p.Withdraw = append(p.Withdraw, t)
			}
		}
	}
	return p, nil
}

// recalled asks about a published target by what its own custom part says.
// What is not about a livepatch has another format there, or no such part.
func recalled(r livepatch.Recalls, raw json.RawMessage) (bool, error) {
	if raw == nil {
		return false, nil
	}
	var kind struct {
		Format string `json:"format"`
	}
	err := json.Unmarshal(raw, &kind)
	if err == nil && kind.Format == notice.Format {
		return false, nil
	}
	var c livepatch.Listed
	if err == nil {
		err = json.Unmarshal(raw, &c)
	}
	if err == nil && (c.Format != livepatch.ListedFormat || c.Kernel.ID.IsZero() || c.Sequence == 0) {
		err = fmt.Errorf("format %.40q, kernel build %s, sequence %d", c.Format, c.Kernel.ID, c.Sequence)
	}
	if err != nil {
		return false, fault.New(fault.Invalid, "custom_unreadable", "whether it is recalled cannot be said, its custom part is not one of ours: %w", err).
			WithHint("a newer klatch-forge may have published it: use that one")
	}
	return r.Check(c.Kernel.ID, c.Sequence) != nil, nil
}
