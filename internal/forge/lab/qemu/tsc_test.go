// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"testing"
	"time"
)

func TestTheCounterIsMeasured(t *testing.T) {
	if !haveTSC {
		t.Log("no counter on this processor")
		return
	}
	a, b := measureTSC(20*time.Millisecond), measureTSC(100*time.Millisecond)
	low, high := min(a, b), max(a, b)
	if low < minTSC || high > maxTSC || (high-low)*500 > high {
		t.Errorf("%d and %d kHz", a, b)
	}
	if got := tscKHz(); got < low-low/200 || got > high+high/200 {
		t.Errorf("tscKHz says %d, measured %d to %d", got, low, high)
	}
}
