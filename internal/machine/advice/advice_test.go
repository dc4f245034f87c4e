// SPDX-License-Identifier: Apache-2.0

package advice

import (
	"slices"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/notice"
)

func TestOf(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	told := func(s notice.Support, cves ...notice.CVE) *notice.Notice {
		return &notice.Notice{Support: s, CVEs: cves}
	}
	refused := notice.CVE{ID: "CVE-2026-0001", Code: "layout_changed", Text: "x", Advice: notice.Reboot}
	later := notice.CVE{ID: "CVE-2026-0002", Code: notice.Deferred, Text: "x", Advice: notice.Wait}
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
		{"declared dead, and nothing newer is installed: the update comes first", Facts{Now: now, Notice: told(notice.Support{Ended: "2026-11-25"})}, Advised, 10, []fault.Code{KernelEnded}},
		{"declared dead, and a newer kernel waits", Facts{Now: now, Notice: told(notice.Support{Ended: "2026-11-25"}), Newer: "6.1.0-56-amd64"}, Required, 11, []fault.Code{KernelEnded, NewerKernel}},
		{"support ended yesterday", Facts{Now: now, Notice: told(notice.Support{Until: "2026-11-24"})}, Advised, 10, []fault.Code{KernelEnded}},
		{"support ends next month", Facts{Now: now, Notice: told(notice.Support{Until: "2026-12-24"})}, None, 0, []fault.Code{SupportEnding}},
		{"supported for a year", Facts{Now: now, Notice: told(notice.Support{Until: "2027-11-24"})}, None, 0, nil},
		{"a CVE that cannot be livepatched", Facts{Now: now, Notice: told(notice.Support{}, refused, later)}, Advised, 10, []fault.Code{NoLivepatch}},
		{"a CVE that a person put off", Facts{Now: now, Notice: told(notice.Support{}, later)}, None, 0, nil},
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
