// SPDX-License-Identifier: Apache-2.0

package kernel

// Blocker is a task that keeps a transition from finishing: its
// /proc/<pid>/task/<tid>/patch_state is not the target. Package stall reads it.
type Blocker struct {
	PID   int      `json:"pid"`
	TID   int      `json:"tid"`
	Stat  string   `json:"stat"`  // as in /proc
	Stack []string `json:"stack"` // as in /proc, innermost first; may be empty
}
