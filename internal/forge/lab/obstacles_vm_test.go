// SPDX-License-Identifier: Apache-2.0

//go:build vm

package lab_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/forge/lab/labtest"
	"klatch/internal/forge/lab/qemu"
	"klatch/internal/livepatch"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/stall"
	"klatch/internal/testkit"
	"klatch/internal/testkit/kerneltest"
	"klatch/internal/tracer"
)

// trial is a machine with the fixtures of this file below /lab.
type trial struct {
	*testing.T
	lab.Machine
}

// TestObstaclesInTheLab shows on real kernels what keeps a livepatch out, and
// that the lab and the machine's own code tell it.
func TestObstaclesInTheLab(t *testing.T) {
	testkit.Need(t, "qemu", "gcc")
	spec := fixtures(t)
	t.Run("stalls", func(t *testing.T) { testStalls(newTrial(t, spec)) })
	t.Run("tracers", func(t *testing.T) { testTracers(newTrial(t, spec)) })
}

// fixtures is a machine that has what the tests load and start.
func fixtures(t *testing.T) lab.Spec {
	t.Helper()
	k := kerneltest.Prepared(t)
	spec := lab.Spec{Name: "obstacles", Kernel: k.Tree.Image(), MemoryMiB: 384}
	for name, path := range kerneltest.Modules(t, k, "livepatches/ok", "livepatches/stalls-task", "livepatches/stalls-thread", "modules/probe") {
		spec.Files = append(spec.Files, lab.File{Name: name + ".ko", Source: path})
	}
	bin := t.TempDir()
	for _, name := range []string{"klatch-look"} {
		cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, "klatch/internal/testkit/cmd/"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if msg, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, msg)
		}
		spec.Files = append(spec.Files, lab.File{Name: name, Source: filepath.Join(bin, name), Mode: 0o755})
	}
	return spec
}

func newTrial(t *testing.T, spec lab.Spec) *trial {
	t.Helper()
	rig, err := qemu.New(qemu.Config{Guest: labtest.GuestProgram(t), Scratch: t.TempDir(), Accelerator: "tcg"})
	if err != nil {
		t.Fatal(err)
	}
	m, err := rig.Boot(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	tr := &trial{t, m}
	tr.sh("mkfifo /tmp/fifo")
	return tr
}

// try runs a shell script and gives what it printed and its exit status.
func (t *trial) try(format string, args ...any) (string, int) {
	t.Helper()
	res, err := t.Machine.Run(t.Context(), lab.Command{Argv: []string{"sh", "-c", fmt.Sprintf(format, args...)}, Timeout: 2 * time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(res.Stdout) + string(res.Stderr)), res.Exit
}

func (t *trial) sh(format string, args ...any) string {
	t.Helper()
	out, status := t.try(format, args...)
	if status != 0 {
		t.Fatalf("%s: exit status %d: %s", fmt.Sprintf(format, args...), status, out)
	}
	return out
}

// until waits, in the guest, for a condition.
func (t *trial) until(condition string) {
	t.Helper()
	t.sh("i=0; until %s; do [ $i -lt 300 ] || exit 1; sleep 0.2; i=$((i+1)); done", condition)
}

// load puts a livepatch in and waits for the end of its transition.
func (t *trial) load(name string) {
	t.Helper()
	t.sh("insmod /lab/%s.ko", name)
	t.until(fmt.Sprintf("grep -q 0 /sys/kernel/livepatch/%s/transition", name))
}

// takeOut disables a livepatch, or cancels its transition, and removes it.
func (t *trial) takeOut(name string) {
	t.Helper()
	t.sh("echo 0 > /sys/kernel/livepatch/%s/enabled", name)
	t.until(fmt.Sprintf("[ ! -d /sys/kernel/livepatch/%s ] && rmmod %s", name, name))
}

// blocked waits until nobody but the one task blocks the transition, and
// checks that the lab and the machine's own code see the same.
func (t *trial) blocked(module string, replaced []livepatch.Function) stall.Blocked {
	t.Helper()
	for range 60 {
		bs, err := lab.Blockers(t.Context(), t.Machine, module, replaced)
		if err != nil {
			t.Fatal(err)
		}
		if len(bs) == 0 {
			t.Fatalf("nobody blocks %s\n%s", module, t.sh("cat /sys/kernel/livepatch/%s/transition; dmesg | tail", module))
		}
		if len(bs) > 1 {
			time.Sleep(300 * time.Millisecond)
			continue
		}
		var own []loaderapi.Blocker
		if err := json.Unmarshal([]byte(t.sh("/lab/klatch-look blockers")), &own); err != nil {
			t.Fatal(err)
		}
		if len(own) != 1 {
			t.Fatalf("the machine sees %+v", own)
		}
		same := stall.Classify(stall.ParseTask(own[0].PID, own[0].TID, own[0].Stat, own[0].Stack), replaced)
		if same.String() != bs[0].String() || !slices.Equal(same.Stack, bs[0].Stack) {
			t.Errorf("the machine says %q, the lab %q", same, bs[0])
		}
		t.Log(bs[0])
		return bs[0]
	}
	t.Fatalf("more than one task blocks %s", module)
	return stall.Blocked{}
}

func functions(names ...string) (fs []livepatch.Function) {
	for _, n := range names {
		fs = append(fs, livepatch.Function{Object: "vmlinux", Name: n})
	}
	return fs
}

// Each class on a real kernel. A cancel half-way leaves the old code running.
func testStalls(m *trial) {
	// Opening a named pipe waits for the other side, in fifo_open.
	const sleeper, old, patched = "cat /tmp/fifo > /tmp/got 2>&1 &", "timeout 1 cat /tmp/fifo", "cat /tmp/fifo"
	m.T.Run("a task asleep in a replaced function", func(t *testing.T) {
		m := &trial{t, m.Machine}
		m.sh(sleeper + " sleep 0.5; insmod /lab/klatch_fifo.ko")
		b := m.blocked("klatch_fifo", functions("fifo_open"))
		if b.Class != stall.Sleeping || b.Function.String() != "fifo_open" || b.Comm != "cat" || b.Kthread {
			t.Errorf("got %s", b)
		}
		m.takeOut("klatch_fifo")
		if out, status := m.try(old); strings.Contains(out, "No data available") || status != 143 {
			t.Errorf("after the cancel the old code does not run: %q, %d", out, status)
		}
		m.sh("echo hello > /tmp/fifo")
		m.until("grep -q hello /tmp/got") // the task that slept never noticed

		m.load("klatch_fifo") // nobody sleeps in it
		if out, status := m.try(patched); !strings.Contains(out, "No data available") || status == 0 {
			t.Errorf("the new code does not run: %q, %d", out, status)
		}
		m.takeOut("klatch_fifo")
	})
	m.T.Run("a kernel thread", func(t *testing.T) {
		m := &trial{t, m.Machine}
		m.sh("insmod /lab/klatch_reaper.ko")
		b := m.blocked("klatch_reaper", functions("oom_reaper", "cmdline_proc_show"))
		if b.Class != stall.KernelThread || b.Function.String() != "oom_reaper" || b.Comm != "oom_reaper" || !b.Kthread {
			t.Errorf("got %s", b)
		}
		if got := m.sh("cat /proc/cmdline"); got != "klatch_reaper: this has been live patched" {
			t.Errorf("a task that was moved runs the old code: %q", got)
		}
		m.takeOut("klatch_reaper")
		if got := m.sh("cat /proc/cmdline"); !strings.Contains(got, "console=") {
			t.Errorf("after the cancel the old code does not run: %q", got)
		}
	})
	m.T.Run("a stack that the kernel cannot trust", func(t *testing.T) {
		m := &trial{t, m.Machine}
		m.sh("/proc/1/exe klatch-lab-trace fexit kernel_clone /tmp/hits > /tmp/bpf 2>&1 & echo $! > /tmp/pid")
		m.until("[ -f /tmp/hits ]")
		m.sh("setsid /proc/1/exe klatch-lab-wait > /tmp/wait 2>&1 & echo $! > /tmp/sleeper")
		m.until("grep -q kernel_clone /proc/$(cat /tmp/sleeper)/task/*/stack")
		m.sh("insmod /lab/klatch_ok.ko") // replaces something else
		b := m.blocked("klatch_ok", functions("cmdline_proc_show"))
		if g, ok := b.Generated(); b.Class != stall.Unreliable || b.State != "D" || !ok || !strings.HasPrefix(g.Symbol, "bpf_trampoline_") {
			t.Errorf("got %s", b)
		}
		m.sh("kill -KILL -$(cat /tmp/sleeper)")
		m.until("grep -q 0 /sys/kernel/livepatch/klatch_ok/transition")
		m.takeOut("klatch_ok")
		m.sh("kill $(cat /tmp/pid)")
	})
	if bs, err := lab.Blockers(m.Context(), m.Machine, "klatch_ok", nil); err == nil {
		m.Errorf("a livepatch that is gone is blocked by %v", bs)
	}
	m.quiet()
}

// quiet wants a console without trouble but for refused loads.
func (t *trial) quiet() {
	t.Helper()
	console, err := t.Console()
	if err != nil {
		t.Fatal(err)
	}
	for _, found := range lab.ScanConsole(console) {
		if !strings.Contains(found.Title, "(-16)") && !strings.Contains(found.Title, "failed to patch object") && !strings.Contains(found.Title, "failed to enable patch") {
			t.Errorf("the kernel complains: %+v", found)
		}
	}
}

// What is found before loading, and what really happens then.
func testTracers(m *trial) {
	const (
		probe  = "insmod /lab/klatch_probe.ko symbol=cmdline_proc_show "
		hits   = "cat /sys/module/klatch_probe/parameters/hits"
		ftrace = "cd /sys/kernel/tracing; echo cmdline_proc_show > set_ftrace_filter; echo function > current_tracer"
		nop    = "cd /sys/kernel/tracing; echo nop > current_tracer; echo > set_ftrace_filter" // the other way round traces everything for a moment
		bpf    = "rm -f /tmp/hits; /proc/1/exe klatch-lab-trace %s cmdline_proc_show /tmp/hits > /tmp/bpf 2>&1 & echo $! > /tmp/pid; until [ -f /tmp/hits ]; do kill -0 $(cat /tmp/pid) || { cat /tmp/bpf; exit 1; }; sleep 0.1; done"
		seen   = "sleep 0.5; cat /tmp/hits"
		kill   = "kill $(cat /tmp/pid)"
	)
	for _, c := range []struct {
		name, attach, hits, detach string
		want                       tracer.Tracer // what matters of it
	}{
		{"a kprobe", probe, hits, "rmmod klatch_probe", tracer.Tracer{Kind: tracer.Kprobe, Effect: tracer.Both}},
		{"a kprobe with a post handler", probe + "post=1", "", "rmmod klatch_probe", tracer.Tracer{Kind: tracer.Kprobe, Effect: tracer.Refused}},
		{"a kprobe inside the function", probe + "offset=5", hits, "rmmod klatch_probe", tracer.Tracer{Kind: tracer.Kprobe, Effect: tracer.Silent, By: "+0x5"}},
		{"the function tracer", ftrace, "grep -c 'cmdline_proc_show <-' /sys/kernel/tracing/trace || true", nop,
			tracer.Tracer{Kind: tracer.Ftrace, Effect: tracer.Both, By: "function_trace_call"}},
		{"a BPF program at the entry", fmt.Sprintf(bpf, "fentry"), seen, kill, tracer.Tracer{Kind: tracer.BPF, Effect: tracer.Sleepers}},
		{"a BPF program at the exit", fmt.Sprintf(bpf, "fexit"), seen, kill, tracer.Tracer{Kind: tracer.BPF, Effect: tracer.Sleepers}},
	} {
		m.T.Run(c.name, func(t *testing.T) {
			m := &trial{t, m.Machine}
			m.sh("%s", c.attach)
			defer m.sh("%s", c.detach)
			found := m.tracers(nil)
			if len(found) != 1 || found[0].Kind != c.want.Kind || found[0].Effect != c.want.Effect || found[0].Function != "cmdline_proc_show" ||
				c.want.By != "" && found[0].By != c.want.By || c.want.Kind == tracer.BPF && !strings.HasPrefix(found[0].By, "bpf_trampoline_") {
				t.Fatalf("found %+v, want %+v\n%s", found, c.want, m.sh("cat /sys/kernel/debug/kprobes/list /sys/kernel/tracing/enabled_functions"))
			}
			t.Log(found[0])
			if found[0].Effect == tracer.Refused {
				if out, status := m.try("insmod /lab/klatch_ok.ko"); status == 0 || !strings.Contains(out, "Device or resource busy") {
					t.Errorf("the kernel takes it: %q", out)
				}
				return
			}
			m.sh("cat /proc/cmdline")
			before := m.count(c.hits)
			m.load("klatch_ok")
			if got := m.sh("cat /proc/cmdline"); got != "klatch_ok: this has been live patched" {
				t.Errorf("the new code does not run: %q", got)
			}
			if after := m.count(c.hits); before == 0 || (after > before) != (found[0].Effect != tracer.Silent) {
				t.Errorf("the tracer saw %d calls before and %d after, effect %s", before, after, found[0].Effect)
			}
			already := functions("cmdline_proc_show")
			if again := m.tracers(already); len(again) != 1 || again[0].Kind != c.want.Kind || again[0].Effect != c.want.Effect {
				t.Errorf("with the livepatch in: %+v", again)
			}
			m.takeOut("klatch_ok")
		})
	}
	m.T.Run("nobody", func(t *testing.T) {
		m := &trial{t, m.Machine}
		if found := m.tracers(nil); len(found) > 0 {
			t.Errorf("found %v", found)
		}
		m.load("klatch_ok")
		if found := m.tracers(functions("cmdline_proc_show")); len(found) > 0 {
			t.Errorf("our own livepatch counts as a tracer: %v", found)
		}
		m.takeOut("klatch_ok")
	})
	m.quiet()
}

// tracers looks with the lab's and with the machine's own code.
func (t *trial) tracers(already []livepatch.Function) []tracer.Tracer {
	t.Helper()
	wanted := functions("cmdline_proc_show", "fifo_open")
	found, err := lab.Tracers(t.Context(), t.Machine, wanted, already)
	if err != nil {
		t.Fatal(err)
	}
	var listing string
	if err := json.Unmarshal([]byte(t.sh("/lab/klatch-look tracers")), &listing); err != nil {
		t.Fatal(err)
	}
	if own := tracer.Find(listing, wanted, already); !slices.Equal(own, found) {
		t.Errorf("the machine finds %v, the lab %v", own, found)
	}
	if strings.Contains(listing, "0xffff") || strings.Contains(listing, "ffffffff") {
		t.Errorf("addresses are told: %s", listing)
	}
	return found
}

func (t *trial) count(how string) int {
	t.Helper()
	out := t.sh("%s", how)
	n, err := strconv.Atoi(cmp.Or(out, "0"))
	if err != nil {
		t.Fatal(err)
	}
	return n
}
