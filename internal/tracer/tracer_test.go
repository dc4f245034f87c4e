// SPDX-License-Identifier: Apache-2.0

package tracer_test

import (
	"slices"
	"strings"
	"testing"

	"klatch/internal/livepatch"
	"klatch/internal/tracer"
)

var cmdline = livepatch.Function{Object: "vmlinux", Name: "cmdline_proc_show"}

// The listings are those of Debian's 6.1.0-50-cloud-amd64 in the lab, where
// TestObstaclesInTheLab compares what follows with what happens.
func TestFind(t *testing.T) {
	vmlinux := func(k tracer.Kind, e tracer.Effect, by string) tracer.Tracer {
		return tracer.Tracer{Kind: k, Object: "vmlinux", Function: "cmdline_proc_show", Effect: e, By: by}
	}
	for _, tt := range []struct {
		name, listing string
		already       bool
		want          []tracer.Tracer
	}{
		{"nothing", "", false, nil},
		{"a kprobe at the entry",
			"ffffffffaedf1bb0  k  cmdline_proc_show+0x0    [FTRACE]\n" +
				"cmdline_proc_show (1) R    \ttramp: 0xffffffffc03fa000 (kprobe_ftrace_handler+0x0/0x1b0) ->kprobe_ftrace_handler+0x0/0x1b0\n", false,
			[]tracer.Tracer{vmlinux(tracer.Kprobe, tracer.Both, "")}},
		{"a kprobe with a post handler",
			"-  k  cmdline_proc_show+0x0    [FTRACE]\n" +
				"cmdline_proc_show (1) R I  \ttramp: - (kprobe_ftrace_handler+0x0/0x1b0) ->kprobe_ftrace_handler+0x0/0x1b0\n", false,
			[]tracer.Tracer{vmlinux(tracer.Kprobe, tracer.Refused, "")}},
		{"a kprobe and our earlier livepatch",
			"-  k  cmdline_proc_show+0x0    [FTRACE]\n" +
				"cmdline_proc_show (2) R I   ->arch_ftrace_ops_list_func+0x0/0x1d0\n", true,
			[]tracer.Tracer{vmlinux(tracer.Kprobe, tracer.Both, "")}},
		{"a kprobe with a post handler and the function tracer",
			"-  k  cmdline_proc_show+0x0    [FTRACE]\n" +
				"cmdline_proc_show (2) R I   ->arch_ftrace_ops_list_func+0x0/0x1d0\n", false,
			[]tracer.Tracer{vmlinux(tracer.Kprobe, tracer.Refused, ""), vmlinux(tracer.Ftrace, tracer.Both, "")}},
		{"a kprobe inside the function", "ffffffffaedf1bb5  k  cmdline_proc_show+0x5    [OPTIMIZED]\n", false,
			[]tracer.Tracer{vmlinux(tracer.Kprobe, tracer.Silent, "+0x5")}},
		{"a kprobe that is switched off", "-  k  cmdline_proc_show+0x5    [DISABLED]\n-  k  cmdline_proc_show+0x5    [GONE]\n", false, nil},
		{"two kprobes at one place", strings.Repeat("-  r  cmdline_proc_show+0x0    [FTRACE]\n", 2) +
			"cmdline_proc_show (1) R    \ttramp: - (kprobe_ftrace_handler+0x0/0x1b0) ->kprobe_ftrace_handler+0x0/0x1b0\n", false,
			[]tracer.Tracer{vmlinux(tracer.Kprobe, tracer.Both, "")}},
		{"the function tracer",
			"cmdline_proc_show (1)      \ttramp: 0xffffffffc02ac000 (function_trace_call+0x0/0x120) ->function_trace_call+0x0/0x120\n", false,
			[]tracer.Tracer{vmlinux(tracer.Ftrace, tracer.Both, "function_trace_call")}},
		{"a module that changes where the call goes",
			"cmdline_proc_show (1) R I  \ttramp: - (guard_hook+0x0/0x10 [guard]) ->guard_hook+0x0/0x10 [guard]\n", false,
			[]tracer.Tracer{vmlinux(tracer.Ftrace, tracer.Refused, "guard_hook")}},
		{"a BPF program",
			"cmdline_proc_show (1) R   D\ttramp: ftrace_regs_caller+0x0/0x58 (call_direct_funcs+0x0/0x30)\n" +
				"\tdirect-->bpf_trampoline_6442485778+0x0/0x1000\n", false,
			[]tracer.Tracer{vmlinux(tracer.BPF, tracer.Sleepers, "bpf_trampoline_6442485778")}},
		{"a BPF program, the function tracer and our earlier livepatch",
			"cmdline_proc_show (3) R I D ->arch_ftrace_ops_list_func+0x0/0x1d0\n" +
				"\tdirect-->bpf_trampoline_6442485778+0x0/0x1000\n", true,
			[]tracer.Tracer{vmlinux(tracer.BPF, tracer.Sleepers, "bpf_trampoline_6442485778"), vmlinux(tracer.Ftrace, tracer.Both, "")}},
		{"our earlier livepatch alone",
			"cmdline_proc_show (1)   I  \ttramp: - (klp_ftrace_handler+0x0/0x110) ->klp_ftrace_handler+0x0/0x110\n", true, nil},
		{"another function, and one of this name in a module",
			"-  k  vfs_read+0x0    [FTRACE]\n-  k  cmdline_proc_show+0x5  other  \n" +
				"vfs_read (1) R I  \ttramp: - (x+0x0/0x1) ->x+0x0/0x1\ncmdline_proc_show [other] (1) R   D\n", false, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var already []livepatch.Function
			if tt.already {
				already = []livepatch.Function{cmdline}
			}
			got := tracer.Find(tt.listing, []livepatch.Function{cmdline}, already)
			if !slices.Equal(got, tt.want) {
				t.Errorf("got  %v\nwant %v", got, tt.want)
			}
		})
	}
}

func TestFindInAModule(t *testing.T) {
	f := livepatch.Function{Object: "af_packet", Name: "packet_ioctl"}
	got := tracer.Find("-  k  packet_ioctl+0x9  af_packet  [OPTIMIZED]\npacket_ioctl [af_packet] (1)   I  \n", []livepatch.Function{f}, nil)
	if len(got) != 2 || got[0].Effect != tracer.Refused || got[1].String() != "kprobe (+0x9) on af_packet:packet_ioctl: it sees nothing any more while the livepatch is in" {
		t.Errorf("got %v", got)
	}
}

func FuzzFind(f *testing.F) {
	f.Add("-  k  cmdline_proc_show+0x0    [FTRACE]\ncmdline_proc_show (1) R   D\ttramp: ftrace_regs_caller+0x0/0x58\n\tdirect-->bpf_trampoline_1+0x0/0x1000\n")
	f.Add("cmdline_proc_show (99999999999999999999) I D\n\t\n")
	f.Fuzz(func(t *testing.T, listing string) {
		got := tracer.Find(listing, []livepatch.Function{cmdline}, nil)
		if len(got) > tracer.MaxTracers {
			t.Errorf("%d tracers", len(got))
		}
		for _, g := range got {
			if g.Function != cmdline.Name || g.Object != cmdline.Object || !strings.Contains(listing, g.By) && g.Effect != tracer.Silent {
				t.Errorf("invented: %+v", g)
			}
		}
	})
}
