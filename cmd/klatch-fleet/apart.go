// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"klatch/internal/server/adminapi"
	"klatch/internal/wire"
)

// apart keeps the machines that were shown another world than the others, and
// says of each why. What they say is not trusted: one that lies can only draw
// attention to itself, or to those that share its checkpoint's size.
func apart(list []adminapi.Machine) (odd []adminapi.Machine, why []string) {
	odd = []adminapi.Machine{}
	for _, m := range list {
		said := lags(m, list)
		if said == "" {
			said = forked(m, list)
		}
		if said != "" {
			odd = append(odd, m)
			why = append(why, fmt.Sprintf("%s: %s\n", m.ID, said))
		}
	}
	return odd, why
}

// lags says that others had accepted newer metadata well before this machine
// was last heard of: its words of that day are older than theirs.
func lags(m adminapi.Machine, list []adminapi.Machine) string {
	if m.State == nil || m.State.Seen == nil {
		return ""
	}
	for _, x := range list {
		if x.State == nil || x.State.Seen == nil || m.LastSeen.Sub(x.LastSeen) < adminapi.StaleAfter {
			continue
		}
		for _, r := range []struct {
			name       string
			mine, that *wire.Versions
		}{{"publisher's", m.State.Seen.Patches, x.State.Seen.Patches}, {"operator's", m.State.Seen.Rollout, x.State.Seen.Rollout}} {
			if r.mine != nil && r.that != nil && r.mine.Timestamp < r.that.Timestamp {
				return fmt.Sprintf("has version %d of the %s metadata; %s had %d before", r.mine.Timestamp, r.name, x.ID, r.that.Timestamp)
			}
		}
	}
	return ""
}

// forked says that two machines have checkpoints of one log and one size with
// two roots. Nobody can tell from here which of them was lied to.
func forked(m adminapi.Machine, list []adminapi.Machine) string {
	if m.State == nil || m.State.Seen == nil {
		return ""
	}
	for _, mine := range m.State.Seen.Logs {
		for _, x := range list {
			if x.State == nil || x.State.Seen == nil {
				continue
			}
			for _, that := range x.State.Seen.Logs {
				if that.Log == mine.Log && that.Size == mine.Size && that.Root != mine.Root {
					return fmt.Sprintf("log %s of %d entries has another root here than on %s: two histories", oneWord(mine.Log), mine.Size, x.ID)
				}
			}
		}
	}
	return ""
}
