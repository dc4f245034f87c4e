// SPDX-License-Identifier: Apache-2.0

package remote

import (
	"context"
	"time"

	"klatch/internal/livepatch"
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
	s, err := tufclient.Refresh(ctx, tufclient.Config{Root: anchor.Root, Dir: r.Dir, BaseURL: base, Client: client, Now: now, Lazy: true})
	if err != nil {
		return nil, err
	}
	return snapshot{s}, nil
}

type snapshot struct{ *tufclient.Snapshot }

// Recalls names the newest recalls of the top list: a release role may not
// take another one's livepatches back.
func (s snapshot) Recalls() string {
	newest := ""
	for _, t := range s.Targets() {
		if t.Role == "targets" && livepatch.RecallsVersion(t.Path) > livepatch.RecallsVersion(newest) {
			newest = t.Path
		}
	}
	return newest
}

// Digest is the SHA-256 of a target by the signed list.
func (s snapshot) Digest(target string) (string, error) {
	t, err := s.Target(target)
	return t.SHA256, err
}

// Signed is when the newest metadata was signed.
func (s snapshot) Signed() time.Time { return s.Snapshot.Signed }

// Fetch gets the bytes of a signed target.
func (s snapshot) Fetch(ctx context.Context, target string, limit int64) ([]byte, error) {
	t, err := s.Target(target)
	if err != nil {
		return nil, err
	}
	return s.Download(ctx, t, limit)
}
