// SPDX-License-Identifier: Apache-2.0

package advice

import (
	"slices"
	"testing"

	"klatch/internal/fault"
)

func TestOf(t *testing.T) {
	for _, tt := range []struct {
		name  string
		facts Facts
		want  Level
		exit  int
		codes []fault.Code
	}{
		{"nothing to do", Facts{}, None, 0, nil},
		{"live patched and nothing newer", Facts{Loaded: 3}, None, 0, []fault.Code{LivepatchOn}},
		{"a newer kernel is installed", Facts{Newer: "6.1.0-56-amd64"}, Advised, 10, []fault.Code{NewerKernel}},
		{"a livepatch does not make a newer kernel pointless", Facts{Newer: "6.1.0-56-amd64", Loaded: 3}, Advised, 10, []fault.Code{NewerKernel, LivepatchOn}},
		{"suspect", Facts{Suspect: 3, Loaded: 3}, Required, 11, []fault.Code{Suspect, LivepatchOn}},
		{"taken out by hand", Facts{Disabled: true}, Required, 11, []fault.Code{Disabled}},
		{"nobody knows what is installed", Facts{KernelsUnknown: true}, Unknown, 12, []fault.Code{KernelsUnknown}},
		{"a certain reason beats not knowing", Facts{KernelsUnknown: true, Suspect: 1}, Required, 11, []fault.Code{Suspect, KernelsUnknown}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := Of(tt.facts)
			if a.Level != tt.want || a.Level.ExitStatus() != tt.exit || !slices.Equal(a.Codes(), tt.codes) {
				t.Errorf("Of = %+v, exit %d", a, a.Level.ExitStatus())
			}
		})
	}
}
