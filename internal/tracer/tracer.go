// SPDX-License-Identifier: Apache-2.0

// Package tracer finds who else is attached to the functions that a livepatch
// replaces: kprobes, ftrace users and BPF programs. It reads what the kernel
// lists and says what will happen; it does not look itself.
//
// Start with Find. The rules are those of Linux 5.6 and newer for kprobes
// (kernel/kprobes.c: only one with a post handler needs the function for
// itself) and of 6.0 and newer for BPF trampolines (kernel/trace/ftrace.c,
// FTRACE_OPS_CMD_ENABLE_SHARE_IPMODIFY_PEER); the VM tests of package lab hold
// each of them against real kernels.
package tracer

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"klatch/internal/livepatch"
)

// Kind is what is attached. The stored form is the string; it is never renamed.
type Kind string

// The kinds.
const (
	Kprobe Kind = "kprobe"
	BPF    Kind = "bpf"    // a BPF program: fentry, fexit or fmod_ret
	Ftrace Kind = "ftrace" // the function tracer, or a module
)

// Effect is what follows when the livepatch is loaded. The stored form is the
// string; it is never renamed.
type Effect string

// The effects, worst first.
const (
	// Refused: the kernel will refuse the livepatch with "busy".
	Refused Effect = "refused"
	// Silent: the livepatch loads, and the tracer sees nothing any more: it is
	// inside the old code.
	Silent Effect = "silent"
	// Sleepers: the livepatch loads. Tasks asleep below the tracer's own code
	// cannot be moved: their stacks are not reliable.
	Sleepers Effect = "sleepers"
	// Both: both work.
	Both Effect = "both_work"
)

// Words says what an effect means, for a person.
func (e Effect) Words() string {
	switch e {
	case Refused:
		return "the kernel will refuse the livepatch"
	case Silent:
		return "it sees nothing any more while the livepatch is in"
	case Sleepers:
		return "both work; a task asleep below an fexit or fmod_ret program holds the transition up"
	default:
		return "both work"
	}
}

// Tracer is one thing that is attached to one function.
type Tracer struct {
	Kind     Kind   `json:"kind"`
	Object   string `json:"object"`
	Function string `json:"function"`
	Effect   Effect `json:"effect"`
	By       string `json:"by,omitempty"` // the kernel's name for it, where it has one
}

func (t Tracer) String() string {
	by := ""
	if t.By != "" {
		by = " (" + t.By + ")"
	}
	return fmt.Sprintf("%s%s on %s:%s: %s", t.Kind, by, t.Object, t.Function, t.Effect.Words())
}

// MaxTracers limits what is told, worst first.
const MaxTracers = 64

// Find lists what is attached to functions, worst first. listing is the
// content of /sys/kernel/debug/kprobes/list and of
// /sys/kernel/tracing/enabled_functions, in this order; addresses may have
// been replaced by a dash. already are the functions that a livepatch in the
// kernel replaces now: that one is no tracer.
func Find(listing string, functions, already []livepatch.Function) []Tracer {
	probes, hooks := parse(listing)
	wanted, replaced := set(functions), set(already)
	var found []Tracer
	add := func(f livepatch.Function, k Kind, e Effect, by string) {
		t := Tracer{Kind: k, Object: f.Object, Function: f.Name, Effect: e, By: by}
		if wanted[f] && !slices.Contains(found, t) {
			found = append(found, t)
		}
	}
	atEntry, taken := map[livepatch.Function]bool{}, map[livepatch.Function]bool{}
	for _, h := range hooks {
		taken[h.function] = h.alone && !replaced[h.function]
	}
	for _, p := range probes {
		switch {
		case !p.ftrace && p.offset > 0:
			add(p.function, Kprobe, Silent, fmt.Sprintf("+%#x", p.offset))
			continue
		case taken[p.function]:
			add(p.function, Kprobe, Refused, "")
		default:
			add(p.function, Kprobe, Both, "")
		}
		atEntry[p.function] = atEntry[p.function] || p.ftrace
	}
	for _, h := range hooks {
		others := h.users
		if replaced[h.function] {
			others--
		}
		if h.direct {
			others--
			add(h.function, BPF, Sleepers, h.name("bpf_trampoline_"))
		}
		if atEntry[h.function] {
			others-- // told as a kprobe
		} else if taken[h.function] {
			others--
			add(h.function, Ftrace, Refused, h.name(""))
		}
		if others > 0 {
			add(h.function, Ftrace, Both, h.name(""))
		}
	}
	order := []Effect{Refused, Silent, Sleepers, Both}
	slices.SortStableFunc(found, func(x, y Tracer) int {
		return slices.Index(order, x.Effect) - slices.Index(order, y.Effect)
	})
	return found[:min(len(found), MaxTracers)]
}

// Refusing are those with which the kernel would refuse the livepatch.
func Refusing(found []Tracer) []Tracer {
	return slices.DeleteFunc(slices.Clone(found), func(t Tracer) bool { return t.Effect != Refused })
}

func set(functions []livepatch.Function) map[livepatch.Function]bool {
	m := map[livepatch.Function]bool{}
	for _, f := range functions {
		m[f] = true
	}
	return m
}

// hook is one function that ftrace is attached to.
type hook struct {
	function livepatch.Function
	users    int
	alone    bool // somebody changes where the call goes (IPMODIFY); only one may
	direct   bool // somebody is called instead of ftrace: a BPF trampoline
	names    []string
}

// name is the first of the kernel's names for the users that begins so, if it
// tells anything.
func (h hook) name(begin string) string {
	for _, n := range h.names {
		if strings.HasPrefix(n, begin) && (begin != "" || !plumbing[n] && !strings.HasPrefix(n, "bpf_trampoline_")) {
			return n
		}
	}
	return ""
}

// plumbing are the kernel's own names where there is more than one user, or
// for those that are told otherwise.
var plumbing = map[string]bool{"arch_ftrace_ops_list_func": true, "ftrace_ops_list_func": true, "ftrace_ops_assist_func": true,
	"ftrace_regs_caller": true, "ftrace_caller": true, "call_direct_funcs": true, "klp_ftrace_handler": true, "kprobe_ftrace_handler": true}

// probe is one kprobe.
type probe struct {
	function livepatch.Function
	offset   uint64
	ftrace   bool // at the function's entry, by ftrace
}

// Lines of the two lists (kernel/kprobes.c, report_probe; kernel/trace/ftrace.c,
// t_show):
//
//	ffffffffaedf1bb0  k  cmdline_proc_show+0x0    [FTRACE]
//	ffffffffaedf1bb5  k  vfs_read+0x5  module [OPTIMIZED]
//	cmdline_proc_show (1) R I  	tramp: 0xffffffffc03fe000 (klp_ftrace_handler+0x0/0x110) ->klp_ftrace_handler+0x0/0x110
//	vfs_read [module] (2) R I D ->arch_ftrace_ops_list_func+0x0/0x1d0
//		direct-->bpf_trampoline_6442485778+0x0/0x1000
var (
	kprobeLine = regexp.MustCompile(`^(?:-|[0-9a-f]{8,16})?\s+([krj])\s+(\S+)\+0x([0-9a-f]+)(?:\s+([A-Za-z0-9_]+))?\s*((?:\[[A-Z]+\])*)`)
	hookLine   = regexp.MustCompile(`^(\S+)(?: \[([A-Za-z0-9_]+)\])? \((\d+)\)(.*)$`)
	symbol     = regexp.MustCompile(`([A-Za-z_][A-Za-z0-9_.]*)\+0x`)
	flagsEnd   = regexp.MustCompile(`tramp:|direct-->|ops:|subops:|->`)
)

func parse(listing string) (probes []probe, hooks []hook) {
	for line := range strings.Lines(listing) {
		line = strings.TrimRight(line, "\n")
		if m := kprobeLine.FindStringSubmatch(line); m != nil {
			p := probe{function: function(m[2], m[4]), ftrace: strings.Contains(m[5], "[FTRACE]")}
			p.offset, _ = strconv.ParseUint(m[3], 16, 32) // digits only
			if strings.Contains(m[5], "[DISABLED]") || strings.Contains(m[5], "[GONE]") {
				continue
			}
			probes = append(probes, p)
		} else if m := hookLine.FindStringSubmatch(line); m != nil {
			h := hook{function: function(m[1], m[2])}
			h.users, _ = strconv.Atoi(m[3])
			flags := m[4]
			if end := flagsEnd.FindStringIndex(flags); end != nil {
				flags = flags[:end[0]]
			}
			h.alone, h.direct = strings.Contains(flags, "I"), strings.Contains(flags, "D")
			h.names = names(m[4])
			hooks = append(hooks, h)
		} else if strings.HasPrefix(line, "\t") && len(hooks) > 0 {
			last := &hooks[len(hooks)-1]
			last.names = append(last.names, names(line)...)
		}
	}
	return probes, hooks
}

func names(text string) (list []string) {
	for _, m := range symbol.FindAllStringSubmatch(text, 16) {
		list = append(list, m[1])
	}
	return list
}

func function(name, module string) livepatch.Function {
	if module == "" {
		module = "vmlinux"
	}
	return livepatch.Function{Object: module, Name: name}
}
