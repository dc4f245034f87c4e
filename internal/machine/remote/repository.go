// SPDX-License-Identifier: Apache-2.0

package remote

import (
	"context"
	"path"
	"path/filepath"
	"time"

	"klatch/internal/evidence"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/rollout"
	"klatch/internal/trust"
	"klatch/internal/tufclient"
	"klatch/internal/wire"
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
	saving := *client
	saving.Transport = tufclient.Saver{Next: client.Transport, Dir: filepath.Join(r.Dir, "transfer")}
	client = &saving
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

// EvidencePolicy names the newest one of the top list: a release role may not
// say who vouches for its livepatches.
func (s snapshot) EvidencePolicy() string {
	var top []string
	for _, t := range s.Targets() {
		if t.Role == "targets" {
			top = append(top, t.Path)
		}
	}
	return evidence.NewestPolicy(top)
}

// Beside lists the signed targets in the folder of one of them.
func (s snapshot) Beside(target string) []string {
	var all []string
	for _, t := range s.Targets() {
		if path.Dir(t.Path) == path.Dir(target) {
			all = append(all, t.Path)
		}
	}
	return all
}

// Named is a target by the signed list.
func (s snapshot) Named(target string) (agent.Listed, error) {
	t, err := s.Target(target)
	return agent.Listed{Target: rollout.Target{Path: t.Path, Bytes: t.Bytes, SHA256: t.SHA256}, Until: t.Until}, err
}

// Metadata says which state this is.
func (s snapshot) Metadata() (wire.Versions, time.Time) { return versions(s.Snapshot) }

func versions(s *tufclient.Snapshot) (wire.Versions, time.Time) {
	return wire.Versions{Root: s.Root, Timestamp: s.Timestamp, Snapshot: s.Snapshot, Targets: s.TargetsVersion}, s.Signed
}

// Fetch gets the bytes of a signed target.
func (s snapshot) Fetch(ctx context.Context, target string, limit int64) ([]byte, error) {
	t, err := s.Target(target)
	if err != nil {
		return nil, err
	}
	return s.Download(ctx, t, limit)
}

// Rollout reads the operator's signed metadata from the enrollment's server. Dir
// is its memory, apart from the publisher's.
type Rollout struct {
	Client *Client
	Dir    string
}

// Refresh verifies the newest metadata.
func (r Rollout) Refresh(ctx context.Context, anchor *rollout.Anchor, now time.Time) (agent.RolloutSnapshot, error) {
	base, client, err := r.Client.connection()
	if err != nil {
		return nil, err
	}
	s, err := tufclient.Refresh(ctx, tufclient.Config{
		Root: anchor.Root, Dir: r.Dir, BaseURL: base + "/rollout", Client: client, Now: now, Lazy: true,
		Operator: &tufclient.Operator{Approvers: anchor.Profile.Approvers()},
	})
	if err != nil {
		return nil, err
	}
	return rolloutSnapshot{s}, nil
}

type rolloutSnapshot struct{ s *tufclient.Snapshot }

// Metadata says which state this is.
func (s rolloutSnapshot) Metadata() (wire.Versions, time.Time) { return versions(s.s) }

// Read gets a signed file and the role that named it.
func (s rolloutSnapshot) Read(ctx context.Context, path string, limit int64) (rollout.File, error) {
	t, err := s.s.Target(path)
	if err != nil {
		return rollout.File{}, err
	}
	b, err := s.s.Download(ctx, t, limit)
	return rollout.File{Role: t.Role, Content: b}, err
}
