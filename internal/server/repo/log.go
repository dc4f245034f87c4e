// SPDX-License-Identifier: Apache-2.0

package repo

import (
	"context"
	"path"
	"strings"

	"klatch/internal/fault"
	"klatch/internal/server/blob"
	"klatch/internal/translog"
	"klatch/internal/tufclient"
)

// syncLogs copies the publisher's transparency logs: every log of the anchor's
// policy that the source has. Only entries are copied; the hashes are computed
// from them again, so a source cannot plant any. A log that no longer
// continues the copy is refused, and the copy stays.
func (r *Repo) syncLogs(ctx context.Context, s *tufclient.Snapshot) error {
	policy, err := translog.Require(r.anchor.LogPolicy, string(r.anchor.Profile))
	if policy == nil || err != nil {
		return err
	}
	for _, log := range policy.Logs {
		if err := r.syncLog(ctx, s, policy, log); err != nil {
			return err
		}
	}
	return nil
}

func (r *Repo) syncLog(ctx context.Context, s *tufclient.Snapshot, policy *translog.Policy, log *translog.Verifier) error {
	folder := translog.Folder(log)
	upstream := func(ctx context.Context, name string, limit int64) ([]byte, error) {
		return s.Static(ctx, path.Join(folder, name), limit)
	}
	here := func(ctx context.Context, name string, limit int64) ([]byte, error) {
		return blob.Read(ctx, r.files, path.Join(folder, name), limit)
	}
	signed, err := upstream(ctx, translog.CheckpointFile, translog.MaxCheckpoint)
	if fault.KindOf(err) == fault.NotFound {
		return nil // a log that is not used any more, or not yet
	}
	if err != nil {
		return err
	}
	head, err := policy.OpenUnwitnessed(signed)
	if err != nil {
		return err
	}
	old, err := here(ctx, translog.CheckpointFile, translog.MaxCheckpoint)
	if err == nil && string(old) != string(signed) {
		var had translog.Checkpoint
		if had, err = policy.OpenUnwitnessed(old); err == nil {
			err = translog.Extends(ctx, upstream, head, had)
		}
	}
	if err != nil && fault.KindOf(err) != fault.NotFound {
		return err
	}
	whole, err := translog.ReadLog(ctx, first(here, upstream), head)
	if fault.CodeOf(err) == translog.CodeTiles || fault.CodeOf(err) == translog.CodeMalformed {
		whole, err = translog.ReadLog(ctx, upstream, head) // the copy here is damaged
	}
	if err != nil {
		return err
	}
	files, err := whole.Files()
	if err != nil {
		return err
	}
	if cosigned, err := upstream(ctx, translog.CosignedFile, translog.MaxCheckpoint); err == nil {
		if _, err := policy.Open(cosigned); err == nil {
			files = append(files, translog.File{Name: translog.CosignedFile, Content: cosigned})
		}
	}
	for _, f := range files {
		if err := r.putFile(ctx, path.Join(folder, f.Name), f.Content); err != nil {
			return err
		}
	}
	return r.pruneLog(ctx, folder, head.Size)
}

// pruneLog deletes the partial tiles whose full tile is here.
func (r *Repo) pruneLog(ctx context.Context, folder string, size int64) error {
	names, err := r.files.List(ctx, folder+"/")
	if err != nil {
		return err
	}
	for i, n := range names {
		names[i] = strings.TrimPrefix(n, folder+"/")
	}
	for _, n := range translog.Obsolete(names, size) {
		if err := r.files.Delete(ctx, path.Join(folder, n)); err != nil {
			return err
		}
	}
	return nil
}

// first reads here what is here already; checkpoints are the source's.
func first(here, upstream translog.Read) translog.Read {
	return func(ctx context.Context, name string, limit int64) ([]byte, error) {
		if b, err := here(ctx, name, limit); err == nil {
			return b, nil
		}
		return upstream(ctx, name, limit)
	}
}
