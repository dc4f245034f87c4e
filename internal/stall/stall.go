// SPDX-License-Identifier: Apache-2.0

// Package stall says why a task keeps a transition from finishing. It owns the
// classes and the reading of what /proc tells of a task; it does not look
// itself, and it knows nothing of who may be stopped.
//
// Start with Classify. The kernel says only that a task still runs the old
// code; why follows from the task's kernel stack, its flags and its state
// (kernel/livepatch/transition.c, klp_try_switch_task).
package stall

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"klatch/internal/livepatch"
)

// Class is why a task holds a transition up. The stored form is the string; it
// is never renamed.
type Class string

// The classes, the one that wins first.
const (
	// KernelThread: no signal moves it and nobody can restart it. It may sleep
	// in a replaced function for ever.
	KernelThread Class = "kernel_thread"
	// Sleeping: a replaced function is on its stack, so it would come back to
	// the old code.
	Sleeping Class = "sleeping_in_patched_function"
	// Running: it was on a processor, or ready for one, when it was looked at.
	Running Class = "running"
	// Unreliable: it sleeps, and no replaced function is on its stack; then the
	// kernel could not trust the stack, as below a BPF trampoline.
	Unreliable Class = "unreliable_stack"
	// Unknown: the stack could not be read.
	Unknown Class = "unknown"
)

// Classes lists every class.
var Classes = []Class{KernelThread, Sleeping, Running, Unreliable, Unknown}

// Task is one task as /proc tells of it.
type Task struct {
	PID, TID int
	Comm     string
	State    string // one letter, proc(5); empty where it was gone
	Kthread  bool
	Stack    []Frame // innermost first; empty where it could not be read
}

// Frame is one line of a kernel stack.
type Frame struct {
	Symbol string
	Module string // empty for the kernel itself
}

func (f Frame) String() string {
	if f.Module == "" {
		return f.Symbol
	}
	return f.Symbol + " [" + f.Module + "]"
}

// Limits of what is taken over from /proc, in bytes and frames.
const (
	maxComm   = 64 // TASK_COMM_LEN is 16, a workqueue's name is appended
	maxSymbol = 512
	maxFrames = 64
)

// ParseTask reads /proc/PID/task/TID/stat (proc(5)) and the lines of
// /proc/PID/task/TID/stack. What is not there stays empty: the task may have
// ended meanwhile.
func ParseTask(pid, tid int, stat string, stack []string) Task {
	t := Task{PID: pid, TID: tid}
	// The name stands in parentheses and may hold anything, these too; after it
	// come state ppid pgrp session tty tpgid flags.
	begin, end := strings.IndexByte(stat, '('), strings.LastIndexByte(stat, ')')
	if 0 <= begin && begin < end {
		t.Comm = clip(stat[begin+1:end], maxComm)
		if f := strings.Fields(stat[end+1:]); len(f) > 6 && len(f[0]) == 1 {
			const pfKthread = 0x00200000 // include/linux/sched.h
			flags, err := strconv.ParseUint(f[6], 10, 64)
			t.State, t.Kthread = f[0], err == nil && flags&pfKthread != 0
		}
	}
	for _, line := range stack {
		if f, ok := parseFrame(line); ok && len(t.Stack) < maxFrames {
			t.Stack = append(t.Stack, f)
		}
	}
	return t
}

// parseFrame reads "[<0>] symbol+0x1/0x2 [module]" (%pB of printk).
func parseFrame(line string) (Frame, bool) {
	f := strings.Fields(strings.TrimPrefix(strings.TrimSpace(line), "[<0>]"))
	if len(f) == 0 {
		return Frame{}, false
	}
	symbol, _, _ := strings.Cut(f[0], "+0x")
	frame := Frame{Symbol: clip(symbol, maxSymbol)}
	if len(f) > 1 && strings.HasPrefix(f[1], "[") {
		frame.Module = clip(strings.Trim(f[1], "[]"), maxComm)
	}
	return frame, frame.Symbol != ""
}

func clip(s string, most int) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "")
	}
	return s
}

// Blocked is a task with the reason why it blocks.
type Blocked struct {
	Task
	Class Class
	// Function is the replaced function on the stack, nearest to the bottom,
	// where there is one; else the innermost one that is not the scheduler's.
	Function Frame
}

// Classify says why a task blocks a transition that replaces these functions.
// Code of a livepatch of ours counts as replaced too: a newer livepatch, or a
// cancel, takes it away.
func Classify(t Task, replaced []livepatch.Function) Blocked {
	b := Blocked{Task: t, Function: innermost(t.Stack)}
	patched := false
	for _, f := range t.Stack {
		if isReplaced(f, replaced) {
			b.Function, patched = f, true
		}
	}
	switch {
	case t.Kthread:
		b.Class = KernelThread
	case patched:
		b.Class = Sleeping
	case t.State == "R":
		b.Class = Running
	case len(t.Stack) == 0 || t.State == "":
		b.Class = Unknown
	default:
		b.Class = Unreliable
	}
	return b
}

func isReplaced(f Frame, replaced []livepatch.Function) bool {
	if _, ours := livepatch.SequenceOf(f.Module); ours {
		return true
	}
	object := cmp.Or(f.Module, "vmlinux")
	return slices.Contains(replaced, livepatch.Function{Object: object, Name: f.Symbol})
}

// innermost is the first frame that tells something.
func innermost(stack []Frame) Frame {
	for _, f := range stack {
		if !strings.HasPrefix(f.Symbol, "__schedule") && !strings.HasPrefix(f.Symbol, "schedule") {
			return f
		}
	}
	if len(stack) > 0 {
		return stack[0]
	}
	return Frame{}
}

// generated are the names of code that the kernel makes while it runs and
// cannot unwind (arch/x86/kernel/unwind_orc.c, "This is useful for generated
// code, like BPF, which ORC doesn't know about").
var generated = []string{"bpf_trampoline_", "bpf_prog_", "bpf_dispatcher_"}

// Generated is the frame that makes a stack unreliable, if one can be named.
func (t Task) Generated() (Frame, bool) {
	for _, f := range t.Stack {
		for _, g := range generated {
			if strings.HasPrefix(f.Symbol, g) {
				return f, true
			}
		}
	}
	return Frame{}, false
}

// String is one line for a person.
func (b Blocked) String() string {
	kind, state := "task", "?"
	if b.Kthread {
		kind = "kernel thread"
	}
	if b.State != "" {
		state = b.State
	}
	line := fmt.Sprintf("%s %d (%q, state %s)", kind, b.TID, b.Comm, state)
	if b.Function.Symbol != "" {
		line += " in " + b.Function.String()
	}
	if g, ok := b.Generated(); ok && b.Class == Unreliable {
		line += " below " + g.String()
	}
	return line + ": " + b.Class.Words()
}

// Words says what a class means, for a person.
func (c Class) Words() string {
	switch c {
	case KernelThread:
		return "a kernel thread that runs the old code"
	case Sleeping:
		return "asleep in a replaced function"
	case Running:
		return "running in the kernel"
	case Unreliable:
		return "asleep with a stack that the kernel cannot trust"
	default:
		return "the reason is not known"
	}
}

// Next is what a person can do about it.
func (c Class) Next() string {
	switch c {
	case KernelThread:
		return "unload or reconfigure what the kernel thread works for, then: klatch retry; if it is one of the kernel itself, reboot into a corrected kernel"
	case Sleeping:
		return "stop or restart the task that is named, then: klatch retry"
	case Running:
		return "none; it is tried again by itself when the task has less to do"
	case Unreliable:
		return "stop the BPF or tracing program that the task is under (bpftool prog), or the task, then: klatch retry"
	default:
		return "stop or restart the task that is named, then: klatch retry; klatch blockers as root shows more while it lasts"
	}
}
