// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"slices"
	"strings"
	"testing"

	"klatch/internal/forge/lab"
	"klatch/internal/machine/agent"
	"klatch/internal/stall"
	"klatch/internal/tracer"
	"klatch/internal/wire"
)

// TestVMStalled: a real task holds a real transition up, below a BPF program.
// klatchd, which has no privilege, names it with the right reason by way of the
// sandboxed loader, cancels, leaves the old code running, and gets through once the
// task has gone.
func TestVMStalled(t *testing.T) {
	m := everything(t)
	p := newPublisher(t, "e2e", m)
	s := newServer(t, m)
	s.init(p)
	s.sync(p.Dir)
	s.start()
	const program = lab.FilesDir + "/guestmain"
	g := bootMachine(t, m, p, lab.File{Name: "guestmain", Source: m.bin + "/guestmain", Mode: 0o755})
	g.install(quick + "transition_deadline = \"20s\"\nstall_retry = \"5s\"\n")
	g.enroll(s.fleet, s.token())

	g.sh("touch /.klatch-lab-guest") // the lab's program works in lab guests only
	g.sh("setsid " + program + " klatch-lab-trace fexit kernel_clone /tmp/hits >/tmp/trace 2>&1 & i=0; until [ -f /tmp/hits ]; do [ $i -lt 300 ] || { cat /tmp/trace >&2; exit 1; }; i=$((i+1)); sleep 0.1; done")
	sleeper := g.sh("setsid " + program + " klatch-lab-wait >/tmp/wait 2>&1 & echo $!; i=0; until grep -q kernel_clone /proc/$!/task/*/stack; do [ $i -lt 300 ] || exit 1; i=$((i+1)); sleep 0.1; done")
	g.sh("cd /sys/kernel/tracing && echo p:lab/probe unix_ioctl > kprobe_events && echo 1 > events/lab/probe/enable")

	// Both capabilities are needed for the stacks of others, root's too.
	g.run("systemctl", "stop", "klatchd.service")
	const less = "/run/systemd/system/klatch-loader.service.d"
	g.run("mkdir", "-p", less)
	b := p.livepatch(1)
	g.put("/tmp/manifest", b.Manifest)
	g.put("/tmp/module", b.Module)
	for set, stacks := range map[string]bool{"CAP_SYS_ADMIN": false, "CAP_SYS_PTRACE": false, "CAP_SYS_ADMIN CAP_SYS_PTRACE": true} {
		g.put(less+"/less.conf", []byte("[Service]\nCapabilityBoundingSet=\nCapabilityBoundingSet=CAP_SYS_MODULE CAP_DAC_READ_SEARCH "+set+"\n"))
		g.run("systemctl", "daemon-reload")
		g.run("systemctl", "stop", "klatch-loader.service")
		if got := g.hostile("klatch", "blockers", "/tmp/manifest", "/tmp/module"); got.Code != "" || got.Kind != "" || (got.Stacks > 0) != stacks {
			t.Errorf("with %s: %+v, want stacks %t", set, got, stacks)
		}
		g.sh("cd /sys/kernel/livepatch/klatch_1 && echo 0 > enabled; i=0; while [ -d /sys/kernel/livepatch/klatch_1 ]; do [ $i -lt 300 ] || exit 1; i=$((i+1)); sleep 0.1; done; rmmod klatch_1")
	}
	g.run("rm", "-r", less)
	g.run("systemctl", "daemon-reload")
	g.run("systemctl", "stop", "klatch-loader.service")
	g.run("systemctl", "start", "klatchd.service")

	p.release(1, b)
	s.sync(p.Dir)
	got := g.until("stalled", func(s agent.Status) bool { return s.State.State == "stalled" })
	i := slices.IndexFunc(got.Blocking, func(b agent.Blocking) bool { return b.Name == "guestmain" && b.State == "D" })
	if i < 0 || got.Blocking[i].Class != stall.Unreliable || got.Blocking[i].Object != "vmlinux" || got.Blocking[i].Function == "" {
		t.Errorf("blocked by %+v, want task %s with an unreliable stack", got.Blocking, sleeper)
	}
	if !got.Act || !strings.Contains(got.State.Text, "below bpf_trampoline_") || len(got.Blocking) == 1 && got.State.Reason != "unreliable_stack" {
		t.Errorf("state %+v", got.State)
	}
	want := tracer.Tracer{Kind: tracer.Kprobe, Object: "vmlinux", Function: "unix_ioctl", Effect: tracer.Both}
	if !slices.Equal(got.Tracers, []tracer.Tracer{want}) {
		t.Errorf("tracers %+v, want %+v", got.Tracers, want)
	}
	if g.enabled() != "" {
		t.Errorf("after the cancel the kernel has %s", g.enabled())
	}
	g.checks(true, true)

	g.sh("kill -KILL -" + sleeper)
	g.confirmed(1)
	g.checks(false, true)
	if events := g.events(1); !slices.Contains(events, wire.EventStalled) || events[len(events)-1] != wire.EventConfirmed {
		t.Errorf("events %v", events)
	}
}
