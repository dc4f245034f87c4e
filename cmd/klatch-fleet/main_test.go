// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"klatch/internal/server/adminapi"
	"klatch/internal/wire"
)

// A machine names itself; the operator's terminal must not obey it.
func TestRowIsOneLineWithoutControls(t *testing.T) {
	m := adminapi.Machine{ID: "mch_1", Facts: &wire.Facts{Hostname: "a\x1b]0;owned\a\nb\tc"}, State: &wire.State{State: "confirmed\r", Advice: "none\u009b2J"}}
	var cells []string
	for _, c := range row(m) {
		cells = append(cells, fmt.Sprint(c))
	}
	if text := strings.Join(cells, " "); strings.ContainsAny(text, "\x1b\a\n\t\r\u009b") {
		t.Errorf("row %q", text)
	}
}

// Nor may a server speak to the terminal of those who approve.
func TestACellStaysInItsPlace(t *testing.T) {
	var b strings.Builder
	w := newTable(&b, "TIER", "IS")
	w.row("stable\ncanary\tselected", "a\x1b[2J\u202eb")
	w.row(7, quoted("two words\n"))
	if err := w.end(); err != nil {
		t.Fatal(err)
	}
	want := "TIER                    IS\nstable?canary?selected  a?[2J?b\n7                       \"two words\\n\"\n"
	if b.String() != want {
		t.Errorf("%q\nwant %q", b.String(), want)
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

func TestMachinesThatWereShownAnotherWorld(t *testing.T) {
	noon := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	says := func(id string, at time.Time, s *wire.Seen) adminapi.Machine {
		return adminapi.Machine{ID: id, LastSeen: at, State: &wire.State{Seen: s}}
	}
	at := func(patches, rollout int64, size int64, root string) *wire.Seen {
		return &wire.Seen{Patches: &wire.Versions{Timestamp: patches}, Rollout: &wire.Versions{Timestamp: rollout},
			Logs: []wire.Checkpoint{{Log: "acme/log", Size: size, Root: root}}}
	}
	list := []adminapi.Machine{
		{ID: "never checked"}, says("an old version", noon, nil),
		says("fine", noon, at(9, 9, 50, "a")), says("a while ago", noon.Add(-4*time.Hour), at(8, 8, 40, "b")),
		says("checks next", noon, at(8, 8, 50, "a")), // others went on only now
		says("kept back", noon, at(7, 8, 30, "x")), says("kept back by the operator's", noon, at(9, 3, 50, "a")),
		says("another history", noon, at(9, 9, 40, "c")), says("no operator", noon, &wire.Seen{Patches: &wire.Versions{Timestamp: 8}}),
	}
	odd, why := apart(list)
	var ids []string
	for _, m := range odd {
		ids = append(ids, m.ID)
	}
	if got, want := strings.Join(ids, ", "), "a while ago, kept back, kept back by the operator's, another history"; got != want {
		t.Errorf("apart: %s\nwant: %s\n%s", got, want, strings.Join(why, ""))
	}
	if strings.Count(strings.Join(why, ""), "two histories") != 2 {
		t.Errorf("why: %q", why)
	}
}
