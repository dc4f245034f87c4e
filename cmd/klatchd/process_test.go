// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"klatch/internal/cli"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/machine/local"
	"klatch/internal/machine/remote"
	"klatch/internal/wire"
)

// TestMain is klatchd itself where a test starts it as a process.
func TestMain(m *testing.M) {
	if os.Getenv("KLATCHD_TEST_PROCESS") != "" {
		os.Exit(cli.Run(command()))
	}
	os.Exit(m.Run())
}

// rig is a machine with a real klatchd process, a loader and a server on real
// sockets.
type rig struct {
	t       testing.TB
	machine *agenttest.Machine
	fleet   *agenttest.Fleet
	state   string
	socket  string
	loader  string
	cmd     *exec.Cmd
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{t: t, machine: agenttest.NewMachine(t), fleet: agenttest.NewFleet(t, "publisher"), state: filepath.Join(t.TempDir(), "state")}
	r.machine.Transition = 100 * time.Millisecond
	r.machine.Write("etc/klatch/conf.d/50-test.toml", "check_interval = \"5s\"\nsoak = \"1s\"\ntransition_deadline = \"30s\"\n")
	r.fleet.Install(r.machine)
	r.loader = agenttest.ServeLoader(t, r.machine)
	r.socket = filepath.Join(agenttest.ShortDir(t), "klatchd.sock")
	t.Cleanup(r.kill)
	return r
}

// enroll makes the machine known without a daemon, as a run before did.
func (r *rig) enroll() {
	r.t.Helper()
	if err := os.MkdirAll(r.state, 0o700); err != nil {
		r.t.Fatal(err)
	}
	c, err := remote.Open(r.state, slog.New(slog.DiscardHandler))
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := c.Enroll(r.t.Context(), r.fleet.URL, r.fleet.Token, wire.Facts{Hostname: "db1", Kernel: r.machine.Kernel}); err != nil {
		r.t.Fatal(err)
	}
}

// start runs klatchd; prefix is what runs it, such as strace with arguments.
func (r *rig) start(prefix ...string) {
	r.t.Helper()
	self, err := os.Executable()
	if err != nil {
		r.t.Fatal(err)
	}
	args := append(prefix, self, "serve", "--root", r.machine.Root, "--state", r.state, "--socket", r.socket, "--loader", r.loader)
	r.cmd = exec.Command(args[0], args[1:]...)
	r.cmd.Env = append(os.Environ(), "KLATCHD_TEST_PROCESS=1")
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if testing.Verbose() {
		r.cmd.Stderr = os.Stderr
	}
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
}

// kill ends the process group that this rig started, and only that.
func (r *rig) kill() {
	if r.cmd != nil && r.cmd.ProcessState == nil {
		_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL)
		_ = r.cmd.Wait()
	}
}

// until waits for a condition on the status.
func (r *rig) until(what string, ok func(agent.Status) bool) agent.Status {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 60*time.Second)
	defer cancel()
	var last agent.Status
	for {
		s, err := local.Dial(r.socket).Status(ctx)
		if err == nil && ok(s) {
			return s
		}
		if err == nil {
			last = s
		}
		select {
		case <-ctx.Done():
			r.t.Fatalf("not %s: %v, last %+v", what, err, last.State)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func confirmed(s agent.Status) bool {
	return s.State.State == "confirmed" && s.Queued == 0 && s.Check.Result != ""
}
