// SPDX-License-Identifier: Apache-2.0

package publog

import (
	"context"

	"klatch/internal/translog"
	"klatch/internal/tufrepo"
)

// AppendForTest logs targets without publishing them.
func AppendForTest(ctx context.Context, l *Log, targets []tufrepo.Target) error {
	var entries []translog.Entry
	for _, t := range targets {
		entries = append(entries, translog.EntryOf(t.Path, t.Content))
	}
	_, err := l.append(ctx, entries)
	return err
}
