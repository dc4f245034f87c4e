// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"fmt"
	"sync/atomic"
	"testing"

	"klatch/internal/testkit"
)

// TestKilledAtEveryStep kills a real klatchd with SIGKILL at each call that
// changes something: what is made durable, what is renamed, what is said to
// the loader. After a restart the journey must end as if nothing had happened.
func TestKilledAtEveryStep(t *testing.T) {
	testkit.Need(t, "strace")
	for _, call := range []string{"fsync", "renameat", "sendmsg", "unlinkat"} {
		var last atomic.Int64
		t.Run(call, func(t *testing.T) {
			t.Parallel()
			for n := 1; n <= 80; n++ {
				t.Run(fmt.Sprint(n), func(t *testing.T) {
					if killedAt(t, call, n) {
						last.Store(int64(n))
					}
				})
				if int64(n) > last.Load() {
					return // the journey has no more of these calls
				}
			}
			t.Errorf("no end of %s calls", call)
		})
	}
}
