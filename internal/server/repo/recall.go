// SPDX-License-Identifier: Apache-2.0

package repo

import (
	"context"
	"slices"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/tufclient"
)

// withdrawn leaves out of a catalog what the publisher recalled: a machine
// would refuse it, and nobody should wait for it. Only recalls in the top list
// count; the newest holds all of the older ones.
func (r *Repo) withdrawn(ctx context.Context, c *Catalog, targets []tufclient.Target) error {
	var newest tufclient.Target
	for _, t := range targets {
		if v := livepatch.RecallsVersion(t.Path); t.Role == "targets" && v > livepatch.RecallsVersion(newest.Path) {
			newest = t
		}
	}
	if newest.Path == "" {
		return nil
	}
	signed, err := r.readTarget(ctx, newest)
	if err != nil {
		return err
	}
	recalls, err := r.anchor.OpenRecalls(signed)
	if err != nil {
		return err
	}
	if recalls.Version != livepatch.RecallsVersion(newest.Path) {
		return fault.New(fault.Untrusted, "wrong_target", "target %s holds recalls %d", newest.Path, recalls.Version)
	}
	c.Recalls = recalls.Version
	c.Entries = slices.DeleteFunc(c.Entries, func(e Entry) bool { return recalls.Check(e.Kernel.ID, e.Sequence) != nil })
	return nil
}
