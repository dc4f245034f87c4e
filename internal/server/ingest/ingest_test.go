// SPDX-License-Identifier: Apache-2.0

package ingest_test

import (
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/fleet"
	"klatch/internal/livepatch"
	"klatch/internal/server/ingest"
	"klatch/internal/server/store/sqlstore"
	"klatch/internal/server/store/storetest"
	"klatch/internal/stall"
	"klatch/internal/tracer"
	"klatch/internal/wire"
)

func newIngester(t *testing.T, now *time.Time, published ...fleet.Published) (*ingest.Ingester, *sqlstore.DB) {
	t.Helper()
	db, err := sqlstore.Open(t.Context(), filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return &ingest.Ingester{
		Machines: db, Reports: db, Published: func(string) []fleet.Published { return published },
		Now: func() time.Time { return *now }, Log: slog.New(slog.DiscardHandler),
	}, db
}

func TestCheckOffersTheNewestForExactlyThisKernelBuild(t *testing.T) {
	now := time.Now().UTC().Truncate(time.Millisecond)
	facts := storetest.Facts("h")
	neighbor := facts.Kernel
	neighbor.ID[0]++
	in, db := newIngester(t, &now,
		fleet.Published{Target: "one", Kernel: facts.Kernel, Sequence: 1},
		fleet.Published{Target: "two", Kernel: facts.Kernel, Sequence: 2},
		fleet.Published{Target: "nine", Kernel: neighbor, Sequence: 9})
	for _, tt := range []struct {
		loaded livepatch.Sequence
		target string
		reason string
	}{{0, "two", "newest"}, {1, "two", "newest"}, {2, "", "current"}} {
		q := wire.CheckRequest{Facts: facts, Sequence: tt.loaded, State: wire.State{State: "s"}}
		a, err := in.Check(t.Context(), storetest.MachineID(1), q)
		if err != nil {
			t.Fatal(err)
		}
		target := ""
		if a.Offer != nil {
			target = a.Offer.Target
		}
		if target != tt.target || a.Reason != tt.reason {
			t.Errorf("with %d: %q %q", tt.loaded, target, a.Reason)
		}
	}
	m, err := db.Machine(t.Context(), storetest.MachineID(1))
	if err != nil || m.Facts != facts || !m.StateAt.Equal(now) {
		t.Errorf("machine %+v, %v", m, err)
	}
}

func TestReportsThatAreRefused(t *testing.T) {
	now := time.Now()
	in, db := newIngester(t, &now)
	tracers := []tracer.Tracer{{Kind: tracer.BPF, Object: "vmlinux", Function: "fifo_open", Effect: tracer.Sleepers}}
	good := wire.Report{Key: "k-1", Event: wire.EventBooted, At: now, Facts: storetest.Facts("h"), Tracers: tracers,
		Stall: []stall.Count{{Class: stall.Sleeping, Object: "vmlinux", Function: "fifo_open", Tasks: 2}}}
	for name, change := range map[string]func(*wire.Report){
		"no key":         func(r *wire.Report) { r.Key = "" },
		"key with slash": func(r *wire.Report) { r.Key = "../x" },
		"unknown event":  func(r *wire.Report) { r.Event = "hacked" },
		"no hostname":    func(r *wire.Report) { r.Facts.Hostname = "" },
		"no kernel":      func(r *wire.Report) { r.Facts.Kernel.Release = "" },
		"long text":      func(r *wire.Report) { r.Text = strings.Repeat("x", 2001) },
		"long state":     func(r *wire.Report) { r.State.Text = strings.Repeat("x", 2001) },
		"too many counts of a stall": func(r *wire.Report) {
			r.Stall = slices.Repeat([]stall.Count{{Class: stall.Unknown, Tasks: 1}}, stall.MaxCounts+1)
		},
		"a stall of nobody":       func(r *wire.Report) { r.Stall = []stall.Count{{Class: stall.Unknown}} },
		"a stall without a class": func(r *wire.Report) { r.Stall = []stall.Count{{Tasks: 1}} },
		"a stall in a long name": func(r *wire.Report) {
			r.Stall = []stall.Count{{Class: stall.Unknown, Tasks: 1, Function: strings.Repeat("x", 513)}}
		},
		"too many tracers":           func(r *wire.Report) { r.Tracers = slices.Repeat(tracers, tracer.MaxTracers+1) },
		"a tracer without an effect": func(r *wire.Report) { r.Tracers = []tracer.Tracer{{Kind: tracer.BPF}} },
		"a long class":               func(r *wire.Report) { r.State.Class = strings.Repeat("x", 65) },
		"a long step":                func(r *wire.Report) { r.State.Step = strings.Repeat("x", 65) },
		"too many logs":              func(r *wire.Report) { r.State.Seen = &wire.Seen{Logs: make([]wire.Checkpoint, wire.MaxSeenLogs+1)} },
		"a log's long name": func(r *wire.Report) {
			r.State.Seen = &wire.Seen{Logs: []wire.Checkpoint{{Log: strings.Repeat("x", 254)}}}
		},
		"a log's long root": func(r *wire.Report) {
			r.State.Seen = &wire.Seen{Logs: []wire.Checkpoint{{Root: strings.Repeat("x", 65)}}}
		},
		"a log that shrank below nothing": func(r *wire.Report) { r.State.Seen = &wire.Seen{Logs: []wire.Checkpoint{{Size: -1}}} },
	} {
		r := good
		change(&r)
		if err := in.Report(t.Context(), storetest.MachineID(1), r); fault.CodeOf(err) != "bad_report" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if list, err := db.Machines(t.Context(), "", 0); err != nil || len(list) != 0 {
		t.Errorf("something was stored: %+v, %v", list, err)
	}
	good.At = now.Add(1000 * time.Hour) // a clock far ahead must not freeze the state
	for range 2 {
		if err := in.Report(t.Context(), storetest.MachineID(1), good); err != nil {
			t.Fatal(err)
		}
	}
	list, err := db.Reports(t.Context(), storetest.MachineID(1), 0, 10)
	if err != nil || len(list) != 1 || !slices.Equal(list[0].Report.Stall, good.Stall) || !slices.Equal(list[0].Report.Tracers, tracers) {
		t.Errorf("what stood in the way is lost: %+v, %v", list, err)
	}
	m, err := db.Machine(t.Context(), storetest.MachineID(1))
	if err != nil || m.StateAt.After(now.Add(time.Second)) {
		t.Errorf("state of %s, %v", m.StateAt, err)
	}
}
