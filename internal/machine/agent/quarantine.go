// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"slices"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

// Quarantined is a livepatch whose signed bytes were refused on this kernel
// build. The same bytes are not fetched and tried again.
type Quarantined struct {
	At       time.Time          `json:"at"`
	Kernel   kernel.BuildID     `json:"build_id"`
	Target   string             `json:"target"`
	Sequence livepatch.Sequence `json:"sequence"`
	digests
	Basis string     `json:"basis"` // digest of the anchor by which it was refused
	Step  Step       `json:"step"`
	Code  fault.Code `json:"code"`
	Text  string     `json:"text"`
}

// maxQuarantine limits the list; the oldest go first.
const maxQuarantine = 50

// inQuarantine finds the record that speaks of exactly these bytes.
func (j journal) inQuarantine(basis string, id kernel.BuildID, target string, d digests) (Quarantined, bool) {
	i := slices.IndexFunc(j.Quarantine, func(q Quarantined) bool {
		return q.Kernel == id && q.Target == target && q.digests == d && q.Basis == basis
	})
	if i < 0 {
		return Quarantined{}, false
	}
	return j.Quarantine[i], true
}

// quarantine adds a record. One of other bytes under the same name, or by
// another anchor, says nothing any more.
func (j *journal) quarantine(q Quarantined) {
	j.Quarantine = slices.DeleteFunc(j.Quarantine, func(old Quarantined) bool {
		return old.Kernel == q.Kernel && old.Target == q.Target || old.Basis != q.Basis
	})
	j.Quarantine = tail(append(j.Quarantine, q), maxQuarantine)
}
