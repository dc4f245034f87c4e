// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"os"
	"testing"

	"klatch/internal/fault"
)

// TestAMainWithoutChildDoesNotStartItself: such a program would be its own
// child, and that one's child, until nothing else runs on the machine.
func TestAMainWithoutChildDoesNotStartItself(t *testing.T) {
	name := os.Args[0]
	t.Cleanup(func() { os.Args[0] = name })
	os.Args[0] = Argv0
	if _, err := Run(t.Context(), Command{Argv: []string{"true"}}); fault.CodeOf(err) != "no_child" {
		t.Errorf("error %v", err)
	}
}
