// SPDX-License-Identifier: Apache-2.0

package remote

import (
	"context"
	"time"

	"klatch/internal/machine/agent"
	"klatch/internal/trust"
	"klatch/internal/tufclient"
)

// Repository reads the signed metadata from the enrollment's server. Dir is
// its memory.
type Repository struct {
	Client *Client
	Dir    string
}

// Refresh verifies the newest metadata.
func (r Repository) Refresh(ctx context.Context, anchor *trust.Anchor, now time.Time) (agent.Snapshot, error) {
	base, client, err := r.Client.connection()
	if err != nil {
		return nil, err
	}
	s, err := tufclient.Refresh(ctx, tufclient.Config{Root: anchor.Root, Dir: r.Dir, BaseURL: base, Client: client, Now: now})
	if err != nil {
		return nil, err
	}
	return snapshot{s}, nil
}

type snapshot struct{ *tufclient.Snapshot }

// Fetch gets the bytes of a signed target.
func (s snapshot) Fetch(ctx context.Context, target string, limit int64) ([]byte, error) {
	t, err := s.Target(target)
	if err != nil {
		return nil, err
	}
	return s.Download(ctx, t, limit)
}
