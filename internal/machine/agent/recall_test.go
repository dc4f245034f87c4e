// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"testing"
	"time"

	"klatch/internal/livepatch"
)

// recalls take sequence 5 back.
func recalls(w *world, version int64) livepatch.Recalls {
	return livepatch.Recalls{Format: livepatch.RecallsFormat, Version: version, Issued: time.Now().UTC().Truncate(time.Second),
		Entries: []livepatch.Recall{{Kernel: w.machine.Kernel.ID, Sequence: 5, Reason: "it eats files"}},
		Floors:  []livepatch.Floor{}, Keys: []string{}}
}

// TestRecallsReachRoot: within one check, also when nothing is offered; what
// runs goes on running, and a higher sequence takes its place.
func TestRecallsReachRoot(t *testing.T) {
	inWorld(t, func(w *world) {
		w.publish(5)
		w.start()
		w.within(20*time.Minute, "confirmed")
		w.pub.Recall(recalls(w, 3))
		time.Sleep(3 * time.Hour)
		st, err := w.machine.Status(w.Context())
		if err != nil || st.Recalls != 3 || st.Loaded == nil || st.Loaded.Sequence != 5 {
			w.Errorf("loader: %+v, %v", st, err)
		}
		w.publish(6)
		time.Sleep(3 * time.Hour)
		if s := w.state(); s.State != "confirmed" || s.Sequence != 6 {
			w.Errorf("state %+v", s)
		}
	})
}
