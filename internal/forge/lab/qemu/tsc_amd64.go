// SPDX-License-Identifier: Apache-2.0

package qemu

// rdtsc reads the processor's time stamp counter.
func rdtsc() uint64

const haveTSC = true
