// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
	"time"

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

func TestForecastOfKernelUpgrades(t *testing.T) {
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	told := func(id string, n *wire.Notice) adminapi.Machine {
		return adminapi.Machine{ID: id, State: &wire.State{Notice: n}}
	}
	list := []adminapi.Machine{
		{ID: "never checked"}, told("told nothing", nil), told("no end named", &wire.Notice{Support: "unknown"}), told("lies", &wire.Notice{Until: "soon"}),
		told("dead", &wire.Notice{Support: "ended", Ended: "2026-11-01"}), told("over", &wire.Notice{Support: "ending", Until: "2026-11-24"}),
		told("in ten days", &wire.Notice{Support: "ending", Until: "2026-12-05"}), told("in eleven", &wire.Notice{Support: "ending", Until: "2026-12-06"}),
		told("next year", &wire.Notice{Support: "supported", Until: "2027-12-06"}),
	}
	due, unknown := forecast(list, 10, now)
	var ids []string
	for _, m := range due {
		ids = append(ids, m.ID)
	}
	if strings.Join(ids, ", ") != "dead, over, in ten days" || unknown != 4 {
		t.Errorf("due %q, %d unknown", ids, unknown)
	}
}
