// SPDX-License-Identifier: Apache-2.0

package repo

import (
	"context"
	"slices"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/trust"
	"klatch/internal/tufclient"
)

// withdrawn leaves out of a catalog what the publisher recalled: a machine
// would refuse it, and nobody should wait for it. Only recalls in the top list
// count; the newest holds all of the older ones.
func (r *Repo) withdrawn(ctx context.Context, c *Catalog, targets []tufclient.Target) error {
	recalls, err := Recalls(r.anchor, targets, func(t tufclient.Target) ([]byte, error) { return r.readTarget(ctx, t) })
	if err != nil || recalls.Version == 0 {
		return err
	}
	c.Recalls = recalls.Version
	c.Entries = slices.DeleteFunc(c.Entries, func(e Entry) bool { return recalls.Check(e.Kernel.ID, e.Sequence) != nil })
	return nil
}

// Recalls opens the newest recalls of the top list; version 0 if there are
// none.
func Recalls(anchor *trust.Anchor, targets []tufclient.Target, read func(tufclient.Target) ([]byte, error)) (livepatch.Recalls, error) {
	var newest tufclient.Target
	for _, t := range targets {
		if v := livepatch.RecallsVersion(t.Path); t.Role == "targets" && v > livepatch.RecallsVersion(newest.Path) {
			newest = t
		}
	}
	if newest.Path == "" {
		return livepatch.Recalls{}, nil
	}
	signed, err := read(newest)
	if err != nil {
		return livepatch.Recalls{}, err
	}
	recalls, err := anchor.OpenRecalls(signed)
	if err != nil {
		return livepatch.Recalls{}, err
	}
	if recalls.Version != livepatch.RecallsVersion(newest.Path) {
		return livepatch.Recalls{}, fault.New(fault.Untrusted, "wrong_target", "target %s holds recalls %d", newest.Path, recalls.Version)
	}
	return recalls, nil
}
