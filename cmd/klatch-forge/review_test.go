// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"

	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
)

// TestAReviewerIsWarnedOfWhatATerminalHides: text that turns its direction
// reads otherwise than it compiles.
func TestAReviewerIsWarnedOfWhatATerminalHides(t *testing.T) {
	for diff, want := range map[string]bool{
		"+\tif (a)\n": false, "+/* Jörg */\n": false,
		"+/* \u202e } \u2066 if (a) */\n": true, "+a\u200bb\n": true, "+a\rb\n": true, "+\x1b[2J\n": true, "+\xff\n": true,
	} {
		p := compose.Plan{Patches: []queue.Patch{{Name: "other"}, {Name: "p", Diff: []byte(diff)}}}
		if got := hides(p, "p"); got != want {
			t.Errorf("%q: %v", diff, got)
		}
		if hides(p, "other") {
			t.Errorf("%q: said of another source patch", diff)
		}
	}
}
