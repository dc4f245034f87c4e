// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"sync"
	"time"
)

// An emulated machine's time stamp counter is that of the host (QEMU,
// cpu_get_ticks). Its kernel finds out the frequency as it boots, against an
// emulated timer; on a busy host it is wrong now and then, by a factor of four
// once (40 s counted in 9), and keeps the wrong clock for good. So it is told.

// Limits of a frequency that we believe, in kHz.
const (
	minTSC = 500_000
	maxTSC = 10_000_000
)

// tscKHz is the frequency of the host's counter, or 0 where it is not known:
// the two measurements must agree to a thousandth.
var tscKHz = sync.OnceValue(func() uint64 {
	if !haveTSC {
		return 0
	}
	const long = 50 * time.Millisecond
	first, second := measureTSC(long), measureTSC(long)
	low, high := min(first, second), max(first, second)
	if low < minTSC || high > maxTSC || (high-low)*1000 > high {
		return 0
	}
	return (low + high) / 2
})

// measureTSC counts ticks for at least so long, in kHz.
func measureTSC(long time.Duration) uint64 {
	t0, c0 := readTSC()
	<-time.After(long)
	t1, c1 := readTSC()
	if c1 <= c0 {
		return 0
	}
	return uint64(float64(c1-c0) / float64(t1.Sub(t0).Nanoseconds()) * 1e6)
}

// readTSC reads both clocks at once: of several tries the one that took
// least, because we may lose the processor in between.
func readTSC() (at time.Time, ticks uint64) {
	best := time.Hour
	for range 20 {
		before := time.Now()
		c := rdtsc()
		if took := time.Since(before); took < best {
			best, at, ticks = took, before.Add(took/2), c
		}
	}
	return at, ticks
}

// tscArgs tell an emulated kernel its frequency (Documentation/admin-guide/
// kernel-parameters.txt, tsc_early_khz).
func tscArgs() []string {
	if khz := tscKHz(); khz != 0 {
		return []string{fmt.Sprintf("tsc_early_khz=%d", khz)}
	}
	return nil
}
