// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/cli"
	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/advice"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/machine/bootkeys"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/machine/local"
	"klatch/internal/notice"
	"klatch/internal/stall"
	"klatch/internal/tracer"
	"klatch/internal/trustsign"
	"klatch/internal/wire"
)

// daemon says what a test wants.
type daemon struct {
	status agent.Status
	err    error
	token  wire.Token
}

func (d *daemon) Status(context.Context) agent.Status { return d.status }
func (d *daemon) CheckNow(context.Context) error      { return d.err }
func (d *daemon) Retry(context.Context) error         { return d.err }
func (d *daemon) Resume(context.Context) error        { return d.err }
func (d *daemon) Enroll(_ context.Context, server string, t wire.Token) (agent.Identity, error) {
	d.token = t
	return agent.Identity{MachineID: agenttest.MachineID, Tier: "stable", Server: server}, d.err
}

func (d *daemon) History() []agent.Entry {
	return []agent.Entry{
		{At: noon, Event: wire.EventConfirmed, Sequence: 3},
		{At: noon.Add(-time.Minute), Event: wire.EventStalled, Sequence: 3, Code: "deadline", Text: "task 7 (\"cat\", state D)\ntask 8\x1b[2J"},
	}
}

var noon = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

func patched() agent.Status {
	k := kernel.Build{Distro: "debian-12", Arch: "amd64", Release: "6.1.0-50-cloud-amd64", ID: kernel.BuildID{0xca, 0xfe}}
	return agent.Status{
		Version: 1, At: noon, Since: noon.Add(-time.Hour),
		State: wire.State{
			State: "confirmed", Reason: "live_patched", Text: "livepatch 3 with 2 fixes", NextStep: "none", Phase: wire.Idle, Sequence: 3, Highest: 3,
			Fixes:  []livepatch.Fix{{CVE: "CVE-2026-0001", Check: livepatch.Passed}, {CVE: "CVE-2026-0002", Check: livepatch.Unchecked}},
			Advice: "advised", Reasons: []fault.Code{"newer_kernel_installed", "livepatch_loaded"},
		},
		Facts:    wire.Facts{Hostname: "db1", Kernel: k, BootID: "boot-1", Lockdown: "integrity", Enforced: "yes", Version: "1.0", Newer: "6.1.0-56-cloud-amd64", SecureBoot: "on", KeyTrust: "trusted"},
		Identity: &agent.Identity{MachineID: agenttest.MachineID, Tier: "stable", Server: "https://klatch.example.org:8443", Expires: noon.Add(72 * time.Hour)},
		Trust:    &agent.Publisher{Publisher: "lab", Profile: "lab"},
		ModuleKey: &bootkeys.Verdict{Word: bootkeys.Trusted, Code: "module_key_enrolled", SecureBoot: bootkeys.On,
			Text: "the publisher's module key is enrolled (lab in db)"},
		Check: agent.Check{At: noon.Add(-10 * time.Minute), GoodAt: noon.Add(-10 * time.Minute), Result: "current", Code: "current"},
		Next:  noon.Add(50 * time.Minute), Problems: []string{},
		Reboot: advice.Of(advice.Facts{Running: k.Release, Newer: "6.1.0-56-cloud-amd64", Loaded: 3}),
	}
}

// told is a machine of which the publisher's notice says bad things.
func told(s notice.Support, cves ...notice.CVE) agent.Status {
	st := patched()
	n := notice.Notice{Kernel: st.Facts.Kernel, Support: s, CVEs: cves}
	state, _, _ := s.At(noon)
	st.Notice = &agent.Notice{Support: state, Text: s.Text(noon), Until: s.Until, Ended: s.Ended, Through: s.Through, Reason: s.Reason, Instead: s.Instead, CVEs: n.CVEs}
	st.State.Notice = &wire.Notice{Support: string(state), Until: s.Until, Ended: s.Ended, Instead: s.Instead, Reboots: len(n.Reboots())}
	for _, c := range n.Reboots() {
		st.State.Notice.CVEs = append(st.State.Notice.CVEs, c.ID)
	}
	st.Reboot = advice.Of(advice.Facts{Running: st.Facts.Kernel.Release, Newer: "6.1.0-56-cloud-amd64", Loaded: 3, Notice: &n, Now: noon})
	return st
}

func dead() agent.Status {
	st := told(notice.Support{Ended: "2026-05-01", Through: "6.1.0-52-cloud-amd64", Reason: "too many open CVEs", Instead: "6.1.0-56-cloud-amd64"},
		notice.CVE{ID: "CVE-2026-0003", Code: "layout_changed", Text: "net/unix/af_unix.c, struct unix_sock: the layout of a type changes", Advice: notice.Reboot},
		notice.CVE{ID: "CVE-2026-0004", Code: notice.Deferred, Text: "the module is not loaded here", Advice: notice.Wait})
	st.Act = true
	st.State.State, st.State.Reason = "kernel_ended", "declared_dead"
	st.State.Text, st.State.NextStep = "kernel upgrade required: support of 6.1.0-50-cloud-amd64 "+st.Notice.Text, "update the kernel to 6.1.0-56-cloud-amd64 or newer and reboot"
	return st
}

func fresh() agent.Status {
	return agent.Status{
		Version: 1, At: noon, Act: true, Problems: []string{"no trust anchor is installed", "connect to /run/klatch/loader.sock: no such file"},
		State: wire.State{
			State: "no_anchor", Reason: "no_anchor", Text: "no trust anchor is installed", NextStep: "install the one of your publisher: klatch trust install FILE",
			Phase: wire.Idle, Fixes: []livepatch.Fix{}, Advice: "unknown", Reasons: []fault.Code{"kernels_unknown"},
		},
		Facts:  wire.Facts{Hostname: "db1", BootID: "boot-1", Lockdown: "unknown", Enforced: "unknown", Version: "1.0"},
		Reboot: advice.Of(advice.Facts{KernelsUnknown: true}),
	}
}

func stalled() agent.Status {
	s := patched()
	s.Act = true
	s.State.State, s.State.Reason, s.State.Phase = "stalled", "kernel_thread", wire.Stalled
	s.State.Text = "livepatch 4 did not finish in time"
	s.State.NextStep = stall.KernelThread.Next()
	s.Blocking = []agent.Blocking{
		{PID: 10, TID: 10, Name: "oom_reaper", Kthread: true, State: "S", Class: stall.KernelThread, Object: "vmlinux", Function: "oom_reaper"},
		{PID: 71, TID: 72, Name: "cat\x1b[2J", State: "S", Class: stall.Unknown},
	}
	s.Tracers = []tracer.Tracer{
		{Kind: tracer.BPF, Object: "vmlinux", Function: "fifo_open", Effect: tracer.Sleepers, By: "bpf_trampoline_6442485778"},
		{Kind: tracer.Kprobe, Object: "vmlinux", Function: "fifo_open", Effect: tracer.Both},
	}
	return s
}

// refusedFor is a machine that refused something, with all that follows.
func refusedFor(class agent.Class, step agent.Step, code fault.Code) agent.Status {
	s := patched()
	s.Act = true
	s.Check = agent.Check{At: noon, GoodAt: noon.Add(-time.Hour), Result: "failed", Kind: fault.Untrusted, Code: code, Text: "livepatch 5: refused", Class: class, Step: step}
	s.State.State, s.State.Reason, s.State.Text, s.State.Class, s.State.Step = "check_failed", code, "livepatch 5: refused", string(class), string(step)
	s.Floor = &agent.Floor{Time: noon.Add(-2 * time.Hour), From: "metadata"}
	switch class {
	case agent.Quarantine:
		q := agent.Quarantined{At: noon, Kernel: s.Facts.Kernel.ID, Target: "debian-12/amd64/x/klatch_5.lpb", Sequence: 5, Step: step, Code: code, Text: s.Check.Text}
		q.Bundle = strings.Repeat("5", 64)
		s.Quarantine = []agent.Quarantined{q}
		s.State.NextStep = "nothing to do here"
	case agent.Stop:
		s.State.State = "halted"
		s.Halt = &agent.Halt{At: noon, Step: step, Code: code, Text: s.Check.Text}
		s.State.NextStep = "find out what happened, then as root: klatch resume"
	default:
		s.State.NextStep = "set the machine's clock"
	}
	return s
}

// run runs klatch against a daemon on a real socket.
func run(t *testing.T, d *daemon, root, stdin string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	socket := filepath.Join(agenttest.ShortDir(t), "s")
	if d != nil {
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- local.Serve(ctx, l, d, slog.New(slog.DiscardHandler)) }()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}()
	}
	c := command()
	var out, errs bytes.Buffer
	c.SetOut(&out)
	c.SetErr(&errs)
	c.SetIn(strings.NewReader(stdin))
	c.SetArgs(append([]string{"--root", root, "--daemon", socket, "--loader", socket + "-none"}, args...))
	status = cli.RunContext(t.Context(), c)
	return status, out.String(), errs.String()
}

func TestCommands(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("need root")
	}
	refused := patched()
	refused.Check = agent.Check{At: noon, Result: "failed", Kind: fault.Untrusted, Code: "metadata_expired", Text: "timestamp metadata is expired", Hint: "tell the publisher"}
	suspect := patched()
	suspect.Reboot = advice.Of(advice.Facts{Suspect: 3})
	for _, tt := range []struct {
		golden string
		d      *daemon
		stdin  string
		args   string
		status int
	}{
		{"status-patched", &daemon{status: patched()}, "", "status", 0},
		{"status-fresh", &daemon{status: fresh()}, "", "status", 0},
		{"status-stalled", &daemon{status: stalled()}, "", "status --check", 4},
		{"status-stalled-json", &daemon{status: stalled()}, "", "status --json", 0},
		{"status-patched-json", &daemon{status: patched()}, "", "status --json", 0},
		{"status-fresh-json", &daemon{status: fresh()}, "", "status --json", 0},
		{"status-patched-yaml", &daemon{status: patched()}, "", "status --format yaml", 0},
		{"status-dead", &daemon{status: dead()}, "", "status --check", 4},
		{"status-dead-json", &daemon{status: dead()}, "", "status --json", 0},
		{"status-ending", &daemon{status: told(notice.Support{Until: "2026-06-10"})}, "", "status --check", 0},
		{"status-supported", &daemon{status: told(notice.Support{Until: "2027-06-10"})}, "", "status", 0},
		{"advice-dead", &daemon{status: dead()}, "", "advice", 11},
		{"status-format", &daemon{status: patched()}, "", "status --format xml", 2},
		{"status-check-fine", &daemon{status: patched()}, "", "status --check", 0},
		{"status-check-act", &daemon{status: fresh()}, "", "status --check", 4},
		{"status-no-daemon", nil, "", "status", 75},
		{"check-current", &daemon{status: patched()}, "", "check", 0},
		{"check-refused", &daemon{status: refused}, "", "check", 3},
		{"check-under-way", &daemon{status: patched(), err: fault.New(fault.Conflict, "under_way", "livepatch 4 is soaking").WithHint("look again later")}, "", "check", 3},
		{"status-stay", &daemon{status: refusedFor(agent.Stay, agent.StepClock, "clock_back")}, "", "status --check", 4},
		{"status-quarantine", &daemon{status: refusedFor(agent.Quarantine, agent.StepLog, "log_quorum")}, "", "status --check", 4},
		{"status-quarantine-json", &daemon{status: refusedFor(agent.Quarantine, agent.StepLog, "log_quorum")}, "", "status --json", 0},
		{"status-halted", &daemon{status: refusedFor(agent.Stop, agent.StepPolicy, "recalls_rollback")}, "", "status --check", 4},
		{"status-halted-json", &daemon{status: refusedFor(agent.Stop, agent.StepPolicy, "recalls_rollback")}, "", "status --json", 0},
		{"resume", &daemon{status: patched()}, "", "resume", 0},
		{"resume-not-halted", &daemon{err: fault.New(fault.Conflict, "not_halted", "this machine is not halted").WithHint("see klatch status")}, "", "resume", 3},
		{"retry", &daemon{status: patched()}, "", "retry", 0},
		{"history", &daemon{}, "", "history", 0},
		{"history-json", &daemon{}, "", "history --json", 0},
		{"advice-advised", &daemon{status: patched()}, "", "advice", 10},
		{"advice-required", &daemon{status: suspect}, "", "advice", 11},
		{"advice-unknown", &daemon{status: fresh()}, "", "advice --json", 12},
		{"advice-none", &daemon{status: agent.Status{Reboot: advice.Of(advice.Facts{Loaded: 3})}}, "", "advice", 0},
		{"advice-no-daemon", nil, "", "advice", 12},
		{"enroll", &daemon{}, "klatch1.secret.ca\n", "enroll --server https://klatch.example.org:8443", 0},
		{"enroll-empty", &daemon{}, "", "enroll --server https://klatch.example.org:8443", 2},
		{"enroll-no-server", &daemon{}, "", "enroll", 2},
		{"enroll-refused", &daemon{err: fault.New(fault.Denied, "token_used", "server: token was used").WithHint("ask for a new one")}, "klatch1.secret.ca", "enroll --server https://klatch.example.org:8443 --token-file -", 3},
		{"disable-not-meant", nil, "", "disable", 2},
		{"disable-no-loader", nil, "", "disable --until-reboot", 75},
		{"version", nil, "", "version", 0},
		{"unknown", nil, "", "lad", 2},
	} {
		t.Run(tt.golden, func(t *testing.T) {
			status, out, errs := run(t, tt.d, t.TempDir(), tt.stdin, strings.Fields(tt.args)...)
			if status != tt.status {
				t.Errorf("exit status %d, want %d", status, tt.status)
			}
			if tt.d != nil && strings.Contains(tt.golden, "enroll") && strings.Contains(out+errs, "secret") {
				t.Error("the token was printed")
			}
			got := "$ klatch " + tt.args + "\n" + out
			if errs != "" {
				got += "-- stderr --\n" + pathless(errs)
			}
			golden(t, "testdata/"+tt.golden+".txt", []byte(got))
		})
	}
}

func TestBlockersAreClassified(t *testing.T) {
	var out bytes.Buffer
	err := printBlockers(&out, []loaderapi.Blocker{
		{PID: 71, TID: 72, Stat: "72 (cat\x1b[2J) S 1 71 71 0 -1 4194304", Stack: []string{"[<0>] wait_for_partner+0x5d/0x110", "[<0>] fifo_open+0x2c0/0x310"}},
		{PID: 10, TID: 10, Stat: "10 (oom_reaper) S 2 0 0 0 -1 2129984"},
	}, []livepatch.Function{{Object: "vmlinux", Name: "fifo_open"}})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/blockers.txt", out.Bytes())
}

// pathless takes the sockets of this run out of a text.
func pathless(s string) string {
	for f := range strings.FieldsSeq(s) {
		if strings.HasPrefix(f, os.TempDir()) {
			s = strings.ReplaceAll(s, strings.TrimSuffix(f, ":"), "SOCKET")
		}
	}
	return s
}

func TestTrust(t *testing.T) {
	root := t.TempDir()
	b, err := trustsign.Anchor(*agenttest.NewPublisher(t).Anchor)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "lab.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	installed := filepath.Join(root, "etc/klatch/trust.json")

	if status, _, errs := run(t, nil, root, "", "trust", "show"); status != 3 || !strings.Contains(errs, "hint: install the one of your publisher") {
		t.Errorf("show without an anchor: %d, %s", status, errs)
	}
	if status, _, errs := run(t, nil, root, "", "trust", "install", file); status != 3 || !strings.Contains(errs, "klatch trust allow-lab") {
		t.Errorf("lab keys unasked: %d, %s", status, errs)
	}
	if _, err := os.Stat(installed); err == nil {
		t.Error("refused, and installed all the same")
	}
	if status, _, errs := run(t, nil, root, "", "trust", "allow-lab"); status != 0 || !strings.Contains(errs, "WARNING") {
		t.Errorf("allow-lab: %d, %s", status, errs)
	}
	status, out, errs := run(t, nil, root, "", "trust", "install", file)
	if status != 0 || !strings.Contains(out, "Profile:        lab") || !strings.Contains(out, "SHA256:") {
		t.Errorf("install: %d, %s%s", status, out, errs)
	}
	if st, err := os.Stat(installed); err != nil || st.Mode().Perm() != 0o644 {
		t.Errorf("installed: %v, %v", st, err)
	}
	if status, again, _ := run(t, nil, root, "", "trust", "show"); status != 0 || again != out {
		t.Errorf("show says something else than install: %d\n%s", status, again)
	}
	if err := os.WriteFile(file, append(b, '}'), 0o600); err != nil {
		t.Fatal(err)
	}
	if status, _, _ := run(t, nil, root, "", "trust", "install", file); status != 3 {
		t.Errorf("a damaged anchor: %d", status)
	}
	if now, err := os.ReadFile(installed); err != nil || !bytes.Equal(now, b) {
		t.Error("a refused anchor changed the one before")
	}
}
