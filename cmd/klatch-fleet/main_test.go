// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"klatch/internal/server/adminapi"
	"klatch/internal/wire"
)

// A machine names itself; the operator's terminal must not obey it.
func TestRowIsOneLineWithoutControls(t *testing.T) {
	m := adminapi.Machine{ID: "mch_1", Facts: &wire.Facts{Hostname: "a\x1b]0;owned\a\nb\tc"}, State: &wire.State{State: "confirmed\r", Advice: "none\u009b2J"}}
	if text := strings.Join(row(m), " "); strings.ContainsAny(text, "\x1b\a\n\t\r\u009b") {
		t.Errorf("row %q", text)
	}
}
