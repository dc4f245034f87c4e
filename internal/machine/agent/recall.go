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

// takeRecalls brings the publisher's newest recalls here, and to root where it
// has older ones: root asks them at each load and at boot.
func (a *Agent) takeRecalls(ctx context.Context, s Snapshot, anchor *trust.Anchor, o observation) (livepatch.Recalls, error) {
	var r livepatch.Recalls
	path := s.Recalls()
	version := livepatch.RecallsVersion(path)
	if version == 0 {
		return r, nil
	}
	kept := filepath.Join(a.cfg.Dir, "recalls.note")
	signed, err := durable.ReadFile(kept, livepatch.MaxRecalls)
	if err == nil {
		r, err = anchor.OpenRecalls(signed)
	}
	if err != nil || r.Version != version {
		if signed, err = s.Fetch(ctx, path, livepatch.MaxRecalls); err != nil {
			return r, err
		}
		if r, err = anchor.OpenRecalls(signed); err != nil {
			return r, err
		}
		if r.Version != version {
			return r, fault.New(fault.Untrusted, "wrong_target", "target %s holds recalls %d", path, r.Version)
		}
		if err := durable.WriteFile(kept, signed, 0o600); err != nil {
			return r, err
		}
	}
	if o.Loader.Recalls < version {
		f, err := os.Open(kept)
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
