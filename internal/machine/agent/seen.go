// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/json"

	"klatch/internal/translog"
	"klatch/internal/wire"
)

// sawVersions keeps which signed state was accepted last. Machines tell it with
// all that they say, so that one that is kept back, or shown another history
// than the others, is seen by whoever looks at all of them.
func (a *Agent) sawVersions(change func(*wire.Seen)) error {
	var next wire.Seen
	was := a.journal().Accepted
	if was != nil {
		next = *was
	}
	change(&next)
	if same(was, &next) {
		return nil
	}
	return a.update(func(j *journal) { j.Accepted = &next })
}

func same(a, b *wire.Seen) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && string(x) == string(y)
}

// sawCheckpoint keeps the largest checkpoint of a log.
func (a *Agent) sawCheckpoint(c translog.Checkpoint) error {
	return a.sawVersions(func(s *wire.Seen) {
		logs := []wire.Checkpoint{{Log: c.Origin, Size: c.Size, Root: c.Root.String()}}
		for _, l := range s.Logs {
			if l.Log != c.Origin && len(logs) < wire.MaxSeenLogs {
				logs = append(logs, l)
			}
		}
		s.Logs = logs
	})
}
