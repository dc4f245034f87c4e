// SPDX-License-Identifier: Apache-2.0

// Package fleet decides which machine is offered which livepatch. It is pure:
// what is published and what a machine says come in, an answer goes out.
package fleet

import (
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
)

// Published is one livepatch of the repository, as the server read it from
// verified metadata.
type Published struct {
	Target   string
	Kernel   kernel.Build
	Sequence livepatch.Sequence
	Fixes    []livepatch.Fix
}

// Offer names a target of the TUF repository.
type Offer struct {
	Target   string             `json:"target"`
	Sequence livepatch.Sequence `json:"sequence"`
}

// Answer is the outcome of a check. It can delay, never invent: the machine
// verifies the target by itself.
type Answer struct {
	Offer  *Offer `json:"offer"`  // null: nothing for this machine now
	Reason string `json:"reason"` // "newest", "current" or "no_livepatch"
	// Absent is why a newer livepatch of this kernel build that is signed is
	// not offered: "filter", "age", "age_unknown", "upstream" or
	// "not_imported"; empty if there is none.
	Absent string `json:"absent,omitempty"`
}

// Absent is a livepatch that is signed and that the server leaves out on
// purpose.
type Absent struct {
	Kernel   kernel.Build // without a build id where the signed list tells none
	Sequence livepatch.Sequence
	Why      string
}

// Missing says why the newest livepatch for a kernel build above a sequence is
// not on this server; empty if none is missing.
func Missing(absent []Absent, running kernel.Build, above livepatch.Sequence) string {
	why := ""
	for _, a := range absent {
		fits := a.Kernel.ID == running.ID || a.Kernel.ID.IsZero() && a.Kernel.Distro == running.Distro && a.Kernel.Arch == running.Arch
		if fits && a.Kernel.Release == running.Release && a.Sequence > above {
			why, above = a.Why, a.Sequence
		}
	}
	return why
}

// Decide answers one check: the highest sequence for exactly this kernel
// build, unless the machine has it already. The build id decides, not the
// release string; a livepatch of the neighbor build is never offered.
func Decide(published []Published, running kernel.Build, loaded livepatch.Sequence) Answer {
	var best *Published
	for i, p := range published {
		if kernel.Fits(p.Kernel, running) == nil && (best == nil || p.Sequence > best.Sequence) {
			best = &published[i]
		}
	}
	switch {
	case best == nil:
		return Answer{Reason: "no_livepatch"}
	case best.Sequence <= loaded:
		return Answer{Reason: "current"}
	}
	return Answer{
		Offer:  &Offer{Target: best.Target, Sequence: best.Sequence},
		Reason: "newest",
	}
}
