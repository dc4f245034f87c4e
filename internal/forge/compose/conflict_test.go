// SPDX-License-Identifier: Apache-2.0

package compose_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
)

func at(name, file string, line int) queue.Patch {
	return queue.Patch{Name: name, Files: []string{file}, Diff: fmt.Appendf(nil,
		"--- a/%[1]s\n+++ b/%[1]s\n@@ -%[2]d,1 +%[2]d,1 @@\n-old\n+new\n", file, line)}
}

func TestWhoStandsInTheWay(t *testing.T) {
	earlier := []queue.Patch{at("same", "a.c", 100), at("context", "a.c", 103), at("far", "a.c", 110), at("other", "b.c", 100)}
	if who := compose.InTheWay(earlier, at("p", "a.c", 100)); !slices.Equal(who, []string{"same", "context"}) {
		t.Errorf("in the way: %q", who)
	}
	if s := compose.Conflict(earlier, at("p", "a.c", 100), []byte("said\n"), []byte("-old\n")); s != "in the way: same, context\nsaid\n-old" {
		t.Errorf("conflict %q", s)
	}
	if s := compose.Conflict(nil, at("p", "a.c", 100), []byte("said"), nil); strings.Contains(s, "way") {
		t.Errorf("nobody is in the way: %q", s)
	}
}
