// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"slices"

	"klatch/internal/fault"
	"klatch/internal/translog"
)

// Class is what a refusal means for the machine. What is loaded stays loaded
// in every one of them.
type Class string

// The classes, stored and sent as these words.
const (
	// Stay: keep what is loaded, wait, look again.
	Stay Class = "stay"
	// Quarantine: stay, and do not fetch or try the same bytes again until
	// others are published or a person says so.
	Quarantine Class = "quarantine"
	// Stop: stay, and load nothing more until a person has looked or a newer
	// signed policy came. The word for people is "halt".
	Stop Class = "halt"
)

// Step is one check on the way of a livepatch into the kernel. Its name is
// stored and sent.
type Step string

// The steps.
const (
	StepMemory    Step = "memory"
	StepClock     Step = "clock"
	StepRollout   Step = "rollout"
	StepMetadata  Step = "metadata"
	StepPolicy    Step = "policy"
	StepSelection Step = "selection"
	StepAgreement Step = "agreement"
	StepTier      Step = "tier"
	StepForward   Step = "forward"
	StepDownload  Step = "download"
	StepBundle    Step = "bundle"
	StepKernel    Step = "kernel"
	StepModule    Step = "module"
	StepLog       Step = "log"
	StepEvidence  Step = "evidence"
	StepRecheck   Step = "recheck"
	StepLoader    Step = "loader"
	StepSoak      Step = "soak"
	StepReceipt   Step = "receipt"
)

// Place is one line of the order.
type Place struct {
	Step  Step
	By    string // who checks
	Class Class  // of a refusal by what was signed; see classOf
	What  string
}

// Order is every check between an offer and a confirmed livepatch, in the order
// in which they are made. docs/explanation/trust-on-the-machine.md holds it as
// a table, which a test compares. What klatchd does is in trial.go, function by
// function under these names.
var Order = []Place{
	{StepMemory, "klatchd", Stop, "One klatchd only. The kernel is identified, the anchor is one that may be believed, root's record can be read and has not gone back behind what was seen here; nothing is halted."},
	{StepClock, "klatchd", Stay, "The clock is not before the time floor: the newest signed time that was accepted here, or the build of the program. One start time for the whole look."},
	{StepRollout, "klatchd", Stay, "The operator's metadata, with a root and a memory of its own, where a rollout anchor is installed. It comes before the publisher's, because a livepatch is copied before it is selected."},
	{StepMetadata, "klatchd", Stay, "The publisher's metadata: the roots one by one, each signed by the old and the new keys, then timestamp, snapshot and lists; signatures, versions, digests, expiry, jumps. Signed not later than the clock says."},
	{StepPolicy, "klatchd, then root", Stop, "The recalls: signed by the manifest keys, and they hold all that those before held."},
	{StepSelection, "klatchd", Stay, "Something is chosen for this machine: by the operator's signed selection for its tier, which its own configuration names, or without a rollout anchor by the server."},
	{StepAgreement, "klatchd", Quarantine, "Both repositories name the same path, length and digest."},
	{StepTier, "klatchd", Stay, "The tier is open: the first one, or promoted by people for exactly this bundle, and its soak is over."},
	{StepForward, "klatchd, then root", Quarantine, "Not recalled; higher than what is loaded and than what was ever confirmed here; not in quarantine and not one that failed before."},
	{StepDownload, "klatchd", Stay, "Nothing that the kernel would certainly refuse for its module key is fetched. The bytes are those of the signed list: length, digest, time limit."},
	{StepBundle, "klatchd, then root", Quarantine, "The bundle has its one form; the threshold of manifest keys signed its manifest."},
	{StepKernel, "klatchd, then root", Quarantine, "It is for the kernel build that runs: build id, release, architecture. Path and sequence are those of the target."},
	{StepModule, "klatchd, then root", Quarantine, "The module has the manifest's length and both digests. Root only: the module signature by a known key, the module's own words, its ELF form, no foreign livepatch, no transition."},
	{StepLog, "klatchd", Quarantine, "The publisher's log holds exactly this file, as enough witnesses saw it, and is still the log that was seen before."},
	{StepEvidence, "klatchd", Quarantine, "Where the publisher has an evidence policy: what lies beside the livepatch says that enough builders made the same bytes, that it was tested on this kernel build and reviewed, signed by those whom the newest policy names."},
	{StepRecheck, "klatchd", Stay, "Just before the loader gets it: all of that once more, from the staged files, by the anchor, the recalls and the log policy of that moment."},
	{StepLoader, "root, kernel", Quarantine, "Root copies both files into sealed memory, checks what is marked above again there, writes the attempt down and gives the same memory to the kernel."},
	{StepSoak, "klatchd, then root", Quarantine, "All functions are replaced in time, and the kernel does not complain while it soaks. Root looks for itself before it confirms."},
	{StepReceipt, "klatchd, root", Stop, "The outcome is on disk before anybody is told. A journal that cannot be written ends the program."},
}

// refusal is an error with its place in the order.
type refusal struct {
	step  Step
	class Class // empty: by the step and the error
	err   error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

// at says at which step an error came up; one that has a place keeps it.
func at(s Step, err error) error {
	if err == nil {
		return nil
	}
	if r, ok := errors.AsType[*refusal](err); ok {
		if r.step == "" {
			return &refusal{s, r.class, r.err}
		}
		return err
	}
	return &refusal{step: s, err: err}
}

// stays marks a refusal that says nothing about signed bytes: whoever hands
// them out could make it at will, and must not be able to halt a machine or to
// have it forget a good livepatch.
func stays(err error) error {
	if err == nil {
		return nil
	}
	return &refusal{class: Stay, err: err}
}

// placeOf reads step and class of an error.
func placeOf(err error) (Step, Class) {
	r, ok := errors.AsType[*refusal](err)
	if !ok {
		return "", Stay
	}
	if r.class != "" {
		return r.step, r.class
	}
	return r.step, classOf(r.step, r.err)
}

// stopCodes are the refusals that only who holds keys, or a memory that went
// back, can have made. Everything else that would halt a machine could be made
// by a bad mirror.
var stopCodes = []fault.Code{translog.CodeInconsistent, codeRecallsBack, codeMemoryBack, "tiers_malformed"}

// classOf is pure. Only a refusal of signed bytes is more than a stay.
func classOf(s Step, err error) Class {
	if slices.Contains(stopCodes, fault.CodeOf(err)) {
		return Stop
	}
	i := slices.IndexFunc(Order, func(p Place) bool { return p.Step == s })
	switch k := fault.KindOf(err); {
	case i < 0 || Order[i].Class != Quarantine:
		return Stay
	case k == fault.Unavailable || k == fault.Internal || k == fault.Denied:
		return Stay
	}
	return Quarantine
}
