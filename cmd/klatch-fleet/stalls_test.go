// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"testing"

	"klatch/internal/kernel"
	"klatch/internal/server/adminapi"
	"klatch/internal/stall"
	"klatch/internal/wire"
)

func TestStallsAreAddedUpByFunction(t *testing.T) {
	report := func(machine string, k kernel.Release, counts ...stall.Count) adminapi.Report {
		return adminapi.Report{MachineID: machine, Report: wire.Report{Stall: counts, Facts: wire.Facts{Kernel: kernel.Build{Release: k}}}}
	}
	fifo := stall.Count{Class: stall.Sleeping, Object: "vmlinux", Function: "fifo_open", Tasks: 3}
	reaper := stall.Count{Class: stall.KernelThread, Object: "vmlinux", Function: "oom_reaper", Tasks: 1}
	got := countStalls([]adminapi.Report{
		report("a", "6.1.0-50", reaper), report("a", "6.1.0-50", fifo), report("a", "6.1.0-50", fifo, reaper),
		report("b", "6.1.0-50", fifo), report("b", "6.1.0-51", fifo), report("c", "6.1.0-50"),
	})
	want := []stalled{
		{"6.1.0-50", stall.Sleeping, "vmlinux", "fifo_open", 3, 2},
		{"6.1.0-50", stall.KernelThread, "vmlinux", "oom_reaper", 2, 1},
		{"6.1.0-51", stall.Sleeping, "vmlinux", "fifo_open", 1, 1},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
