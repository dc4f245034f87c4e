// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/trust"
)

const codeRecallsBack fault.Code = "recalls_rollback"

func (a *Agent) recallsPath() string { return filepath.Join(a.cfg.Dir, "recalls.note") }

// keptRecalls are the newest that were accepted here, as far as this anchor
// believes them: of another publisher, or damaged, they are as good as none.
func (a *Agent) keptRecalls(anchor *trust.Anchor) livepatch.Recalls {
	var r livepatch.Recalls
	signed, err := durable.ReadFile(a.recallsPath(), livepatch.MaxRecalls)
	if err == nil {
		r, err = anchor.OpenRecalls(signed)
	}
	if err != nil {
		return livepatch.Recalls{}
	}
	return r
}

// takeRecalls brings the publisher's newest recalls here, and to root where it
// has older ones: root asks them at each load and at boot. They only grow. Fewer
// than before can only be the work of those who hold the publisher's keys.
func (a *Agent) takeRecalls(ctx context.Context, s Snapshot, anchor *trust.Anchor, o observation) (livepatch.Recalls, error) {
	r := a.keptRecalls(anchor)
	path := s.Recalls()
	version := livepatch.RecallsVersion(path)
	switch {
	case version < r.Version:
		return r, fault.New(fault.Untrusted, codeRecallsBack, "the signed list names recalls %d; recalls %d were accepted before", version, r.Version).
			WithHint("ask the publisher, by another way than the server, why recalls were taken back; then as root: klatch resume")
	case version < o.Loader.Recalls:
		return r, stays(fault.New(fault.Untrusted, codeRecallsBack, "the signed list names recalls %d; root has recalls %d", version, o.Loader.Recalls))
	case version == 0:
		return r, nil
	case version > r.Version:
		signed, err := s.Fetch(ctx, path, livepatch.MaxRecalls)
		if err != nil {
			return r, err
		}
		next, err := anchor.OpenRecalls(signed)
		if err != nil {
			return r, err
		}
		if next.Version != version {
			return r, fault.New(fault.Untrusted, "wrong_target", "target %s holds recalls %d", path, next.Version)
		}
		if !next.Holds(r) {
			return r, fault.New(fault.Untrusted, codeRecallsBack, "recalls %d lack some of recalls %d", next.Version, r.Version).
				WithHint("ask the publisher, by another way than the server, why recalls were taken back; then as root: klatch resume")
		}
		if err := durable.WriteFile(a.recallsPath(), signed, 0o600); err != nil {
			return r, err
		}
		r = next
	}
	if o.Loader.Recalls < version {
		f, err := os.Open(a.recallsPath())
		if err != nil {
			return r, err
		}
		defer f.Close() //nolint:errcheck // opened for reading only
		if _, err := a.cfg.Loader.Recall(ctx, f); err != nil {
			return r, err
		}
		a.log.LogAttrs(ctx, slog.LevelInfo, "recalls taken", slog.Int64("version", version), slog.Int("entries", len(r.Entries)))
	}
	return r, nil
}

// without is the anchor without the keys that recalls name.
func without(anchor *trust.Anchor, r livepatch.Recalls) *trust.Anchor {
	own := *anchor
	own.Manifest.Keys, own.ModuleKeys = slices.Clone(own.Manifest.Keys), slices.Clone(own.ModuleKeys)
	own.Revoke(r)
	return &own
}
