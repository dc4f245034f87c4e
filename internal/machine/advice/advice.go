// SPDX-License-Identifier: Apache-2.0

// Package advice says whether a machine should be rebooted, and why. It is
// pure: what is known comes in, a level with reason codes goes out. It never
// reboots anything.
package advice

import (
	"fmt"
	"strings"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/notice"
)

// Level says how much a reboot is needed.
type Level string

// The levels. Their spelling is stored and sent.
const (
	None     Level = "none"
	Advised  Level = "advised"
	Required Level = "required"
	// Unknown is for machines that cannot say what the next boot would run. It
	// is never used where another level is certain.
	Unknown Level = "unknown"
)

// The reason codes.
const (
	NewerKernel    fault.Code = "newer_kernel_installed"
	LivepatchOn    fault.Code = "livepatch_loaded"
	Suspect        fault.Code = "suspect"
	Disabled       fault.Code = "disabled"
	KernelsUnknown fault.Code = "kernels_unknown"
	KernelEnded    fault.Code = "kernel_ended"     // no livepatches any more
	SupportEnding  fault.Code = "support_ending"   // not for much longer
	NoLivepatch    fault.Code = "cannot_livepatch" // CVEs that only another kernel fixes
)

// Facts is what the advice is made of.
type Facts struct {
	Running        kernel.Release
	Newer          kernel.Release     // newest installed if newer than running; empty for none
	KernelsUnknown bool               // nobody knows what is installed
	Loaded         livepatch.Sequence // loaded and enabled; 0 for none
	Suspect        livepatch.Sequence // the kernel complained after this one and it is still loaded; 0 for none
	Disabled       bool               // taken out by hand until the next reboot
	Notice         *notice.Notice     // of the publisher, on the running kernel build; nil: nothing is known
	Now            time.Time
}

// Reason is one reason for a level.
type Reason struct {
	Code fault.Code `json:"code"`
	Text string     `json:"text"`
}

// Advice is the answer. A reason may also support none.
type Advice struct {
	Level   Level    `json:"level"`
	Reasons []Reason `json:"reasons"`
}

// Of gives the advice: the strongest level that a reason supports.
func Of(f Facts) Advice {
	a := Advice{Level: None, Reasons: []Reason{}}
	add := func(l Level, c fault.Code, format string, args ...any) {
		if rank[l] > rank[a.Level] {
			a.Level = l
		}
		a.Reasons = append(a.Reasons, Reason{c, fmt.Sprintf(format, args...)})
	}
	if f.Suspect != 0 {
		add(Required, Suspect, "the kernel complained after livepatch %d was loaded; only a reboot or a newer livepatch takes it out", f.Suspect)
	}
	if f.Disabled {
		add(Required, Disabled, "the livepatch was taken out by hand; its fixes come back with the next boot")
	}
	if f.Notice != nil {
		told(f, add)
	}
	if f.Newer != "" {
		add(Advised, NewerKernel, "kernel %s is installed, %s runs", f.Newer, f.Running)
	}
	if f.KernelsUnknown {
		add(Unknown, KernelsUnknown, "the installed kernels could not be listed")
	}
	if f.Loaded != 0 {
		add(None, LivepatchOn, "livepatch %d fixes the running kernel", f.Loaded)
	}
	return a
}

// told adds what follows from the publisher's notice. A kernel build that has
// ended requires a reboot only where one would help: with nothing newer
// installed, the update comes first.
func told(f Facts, add func(Level, fault.Code, string, ...any)) {
	n := f.Notice
	switch state, _, _ := n.Support.At(f.Now); state { // a notice that parsed has good dates
	case notice.Ended:
		level := Advised
		if f.Newer != "" {
			level = Required
		}
		add(level, KernelEnded, "kernel upgrade required: support of kernel %s %s", n.Kernel.Release, n.Support.Text(f.Now))
	case notice.Ending:
		add(None, SupportEnding, "support of kernel %s is %s: plan the update", n.Kernel.Release, n.Support.Text(f.Now))
	case notice.Supported, notice.Unknown:
	}
	cves := n.Reboots()
	if len(cves) == 0 {
		return
	}
	var names []string
	for i, c := range cves {
		if i == few {
			names = append(names, fmt.Sprintf("and %d more", len(cves)-few))
			break
		}
		names = append(names, fmt.Sprintf("%s (%s)", c.ID, c.Code))
	}
	add(Advised, NoLivepatch, "no livepatch fixes %s on this kernel: update and reboot", strings.Join(names, ", "))
}

// few is how many CVEs a text names.
const few = 5

var rank = map[Level]int{None: 0, Unknown: 1, Advised: 2, Required: 3}

// ExitStatus is the exit status of klatch advice.
func (l Level) ExitStatus() int {
	switch l {
	case None:
		return 0
	case Advised:
		return 10
	case Required:
		return 11
	default:
		return 12
	}
}

// Codes lists the reasons without their texts.
func (a Advice) Codes() []fault.Code {
	codes := make([]fault.Code, 0, len(a.Reasons))
	for _, r := range a.Reasons {
		codes = append(codes, r.Code)
	}
	return codes
}
