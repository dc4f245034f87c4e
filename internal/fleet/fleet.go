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
