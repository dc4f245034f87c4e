// SPDX-License-Identifier: Apache-2.0

package rolloutrepo

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"klatch/internal/durable"
	"klatch/internal/rollout"
	"klatch/internal/tufclient"
)

// Files are those of the repository in force, by their names below rollout/ as
// they are served, for who carries them elsewhere. They are read as a stranger
// would: what does not verify is not carried. All roots are among them, also
// those before the anchor's: the reader may have stayed there.
func (r *Repo) Files(ctx context.Context, now time.Time) (map[string][]byte, error) {
	memory, err := os.MkdirTemp("", "klatch-rollout-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(memory) //nolint:errcheck // scratch
	s, err := tufclient.Refresh(ctx, tufclient.Config{
		Root: r.anchor.Root, Dir: memory, Now: now, Operator: &tufclient.Operator{Approvers: r.anchor.Profile.Approvers()},
		BaseURL: "file://localhost", Client: &http.Client{Transport: tufclient.DirTransport(r.dir)},
	})
	if err != nil {
		return nil, err
	}
	out := map[string][]byte{}
	roots, err := filepath.Glob(filepath.Join(r.dir, "metadata", "*.root.json"))
	if err != nil {
		return nil, err
	}
	for _, path := range roots {
		if out["rollout/metadata/"+filepath.Base(path)], err = durable.ReadFile(path, rollout.MaxAnchor); err != nil {
			return nil, err
		}
	}
	for _, f := range s.Files() {
		out["rollout/metadata/"+f.Name] = f.Content
	}
	for _, t := range s.Targets() {
		b, err := s.Download(ctx, t, rollout.MaxTiersFile)
		if err != nil {
			return nil, err
		}
		out["rollout/targets/"+tufclient.BlobPath(t)] = b
	}
	return out, nil
}
