// SPDX-License-Identifier: Apache-2.0

package stall_test

import (
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"klatch/internal/livepatch"
	"klatch/internal/stall"
)

var replaced = []livepatch.Function{{Object: "vmlinux", Name: "fifo_open"}, {Object: "vmlinux", Name: "oom_reaper"}, {Object: "af_packet", Name: "packet_ioctl"}}

const (
	user    = "71 (cat) S 1 71 71 0 -1 4194304 12 0 0"
	running = "72 (yes) R 1 72 72 0 -1 4194304 12 0 0"
	kthread = "10 (oom_reaper) S 2 0 0 0 -1 2129984 0 0"
)

func TestClassify(t *testing.T) {
	for _, tt := range []struct {
		name, stat string
		stack      string // as in /proc
		class      stall.Class
		function   string
	}{
		{"a task asleep in a replaced function", user,
			"[<0>] wait_for_partner+0x5d/0x110\n[<0>] fifo_open+0x2c0/0x310\n[<0>] do_dentry_open+0x1c1/0x4a0\n", stall.Sleeping, "fifo_open"},
		{"in one of a module", user, "[<0>] packet_ioctl+0x1/0x2 [af_packet]\n", stall.Sleeping, "packet_ioctl [af_packet]"},
		{"in one of that name elsewhere", user, "[<0>] packet_ioctl+0x1/0x2\n", stall.Unreliable, "packet_ioctl"},
		{"in the code of our earlier livepatch", user, "[<0>] schedule+0x5/0x10\n[<0>] anything+0x1/0x2 [klatch_6]\n", stall.Sleeping, "anything [klatch_6]"},
		{"in a module that only sounds like ours", user, "[<0>] anything+0x1/0x2 [klatch_06]\n", stall.Unreliable, "anything [klatch_06]"},
		{"the outermost of two is named", user, "[<0>] fifo_open+0x1/0x2\n[<0>] x+0x1/0x2\n[<0>] oom_reaper+0x1/0x2\n", stall.Sleeping, "oom_reaper"},
		{"a kernel thread in a replaced function", kthread, "[<0>] oom_reaper+0x2f/0x382\n[<0>] kthread+0xda/0x100\n", stall.KernelThread, "oom_reaper"},
		{"a kernel thread elsewhere", kthread, "[<0>] schedule_timeout+0x5/0x10\n[<0>] other+0x1/0x2\n", stall.KernelThread, "other"},
		{"a kernel thread without a stack", kthread, "", stall.KernelThread, ""},
		{"a task below a BPF trampoline", user, "[<0>] wait_for_partner+0x5d/0x110\n[<0>] bpf_trampoline_6442485778+0x5c/0x1000\n", stall.Unreliable, "wait_for_partner"},
		{"asleep nowhere in particular", user, "[<0>] do_nanosleep+0x1/0x2\n", stall.Unreliable, "do_nanosleep"},
		{"running", running, "[<0>] vfs_write+0x1/0x2\n", stall.Running, "vfs_write"},
		{"running in a replaced function", running, "[<0>] fifo_open+0x1/0x2\n", stall.Sleeping, "fifo_open"},
		{"without a stack", user, "", stall.Unknown, ""},
		{"without anything", "", "", stall.Unknown, ""},
		{"a stack that says nothing", user, "[<0>] \n\n", stall.Unknown, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := stall.Classify(stall.ParseTask(71, 71, tt.stat, strings.Split(tt.stack, "\n")), replaced)
			if b.Class != tt.class || b.Function.String() != tt.function {
				t.Errorf("got %s in %q, want %s in %q", b.Class, b.Function, tt.class, tt.function)
			}
			if b.Class.Next() == "" || b.Class.Words() == "" {
				t.Error("no words")
			}
		})
	}
}

func TestParseTask(t *testing.T) {
	for _, tt := range []struct {
		name, stat string
		want       stall.Task
	}{
		{"a name that pretends", "10 (a b) R 1) D 2 0 0 0 -1 2129984 0 0", stall.Task{PID: 1, TID: 2, Comm: "a b) R 1", State: "D", Kthread: true}},
		{"cut off", "10 (a) S 1", stall.Task{PID: 1, TID: 2, Comm: "a"}},
		{"no number for flags", "10 (a) S 2 0 0 0 -1 x 0 0", stall.Task{PID: 1, TID: 2, Comm: "a", State: "S"}},
		{"parentheses the wrong way round", ")(", stall.Task{PID: 1, TID: 2}},
	} {
		if got := stall.ParseTask(1, 2, tt.stat, nil); !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

func TestCountAll(t *testing.T) {
	task := func(stat string, stack ...string) stall.Task { return stall.ParseTask(1, 1, stat, stack) }
	bs := stall.All([]stall.Task{
		task(user, "fifo_open+0x1/0x2"), task(user, "fifo_open+0x9/0x9"), task(user), task(kthread, "oom_reaper+0x1/0x2"),
	}, replaced)
	if bs[0].Class != stall.KernelThread || bs[3].Class != stall.Unknown {
		t.Errorf("order: %v", bs)
	}
	want := []stall.Count{
		{Class: stall.Sleeping, Object: "vmlinux", Function: "fifo_open", Tasks: 2},
		{Class: stall.KernelThread, Object: "vmlinux", Function: "oom_reaper", Tasks: 1},
		{Class: stall.Unknown, Tasks: 1},
	}
	if got := stall.CountAll(bs); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	var many []stall.Task
	for i := range 100 {
		many = append(many, task(user, strings.Repeat("f", i+1)+"+0x1/0x2"))
	}
	if got := stall.CountAll(stall.All(many, nil)); len(got) != stall.MaxCounts {
		t.Errorf("%d counts", len(got))
	}
}

func FuzzParseTask(f *testing.F) {
	f.Add(user, "[<0>] fifo_open+0x2c0/0x310\n[<0>] x+0x1/0x2 [af_packet]")
	f.Add("1 (\xff) S 1 1 1 1 1 18446744073709551616", "[<0>] [\n[<0>]  []")
	f.Fuzz(func(t *testing.T, stat, stack string) {
		b := stall.Classify(stall.ParseTask(1, 1, stat, strings.Split(stack, "\n")), replaced)
		if !utf8.ValidString(b.String()) || len(b.String()) > 4<<10 || len(b.Stack) > 64 {
			t.Errorf("%d frames, %d bytes: %q", len(b.Stack), len(b.String()), b.String())
		}
		if (b.Class == stall.Unreliable || b.Class == stall.Sleeping) && len(b.Stack) == 0 {
			t.Errorf("%s without a stack", b.Class)
		}
		if b.Kthread != (b.Class == stall.KernelThread) {
			t.Errorf("%+v", b)
		}
	})
}
