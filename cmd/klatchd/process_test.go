// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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

func TestAProcessGoesTheWholeJourney(t *testing.T) {
	r := newRig(t)
	r.start()
	r.until("not enrolled", func(s agent.Status) bool { return s.State.State == "not_enrolled" })
	if os.Geteuid() != 0 {
		r.enroll()
		r.kill()
		r.start()
	} else if _, err := local.Dial(r.socket).Enroll(t.Context(), local.EnrollRequest{Server: r.fleet.URL, Token: r.fleet.Token}); err != nil {
		t.Fatal(err)
	}
	r.until("without a livepatch", func(s agent.Status) bool { return s.Check.Result == "current" })
	r.fleet.Publish(r.machine.Kernel, 1, "CVE-2026-0001")
	r.until("confirmed", confirmed)
	r.fleet.Publish(r.machine.Kernel, 2, "CVE-2026-0001", "CVE-2026-0002")
	s := r.until("confirmed at 2", func(s agent.Status) bool { return confirmed(s) && s.State.Sequence == 2 })
	if len(s.State.Fixes) != 2 {
		t.Errorf("fixes %v", s.State.Fixes)
	}
	r.secretsStayHidden()
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

// secretsStayHidden looks at who may read the credential.
func (r *rig) secretsStayHidden() {
	r.t.Helper()
	err := filepath.WalkDir(r.state, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			r.t.Errorf("%s has mode %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		r.t.Error(err)
	}
	b, err := os.ReadFile(filepath.Join(r.state, "journal.json"))
	if err != nil {
		r.t.Fatal(err)
	}
	for _, secret := range []string{string(r.fleet.Token), "PRIVATE"} {
		if strings.Contains(string(b), secret) {
			r.t.Error("the journal holds a secret")
		}
	}
}

// checkEnd says that a journey ended as if nothing had happened.
func (r *rig) checkEnd(s agent.Status) {
	r.t.Helper()
	if s.State.Sequence != 1 || s.State.Highest != 1 {
		r.t.Errorf("state %+v", s.State)
	}
	if n := r.machine.Loads(); n != 1 {
		r.t.Errorf("the kernel took %d livepatches", n)
	}
	want := []wire.Event{wire.EventBooted, wire.EventStaged, wire.EventLoading, wire.EventLoaded, wire.EventConfirmed}
	if got := r.fleet.Events(); !slices.Equal(got, want) {
		r.t.Errorf("events\n got %v\nwant %v", got, want)
	}
	// The metadata's folder is cleared by the next look at the server.
	for _, pattern := range []string{".tmp-*", "staged/.tmp-*"} {
		if left, err := filepath.Glob(filepath.Join(r.state, pattern)); err != nil || len(left) > 0 {
			r.t.Errorf("left behind: %v, %v", left, err)
		}
	}
}

// killedAt runs a journey that strace kills at the n-th call of a kind, starts
// klatchd again, and wants the end of an undisturbed journey. It is false
// where the journey has fewer such calls.
func killedAt(t *testing.T, call string, n int) bool {
	r := newRig(t)
	r.enroll()
	r.fleet.Publish(r.machine.Kernel, 1, "CVE-2026-0001")
	r.start("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace="+call, "-e", "inject="+call+":signal=SIGKILL:when="+strconv.Itoa(n))
	dead := make(chan error, 1)
	go func() { dead <- r.cmd.Wait() }()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		select {
		case err := <-dead:
			if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("klatchd ended by itself: %v", err)
			}
			r.start()
			r.checkEnd(r.until("confirmed after a kill", confirmed))
			return true
		case <-time.After(50 * time.Millisecond):
		}
		if s, err := local.Dial(r.socket).Status(ctx); err == nil && confirmed(s) {
			_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL)
			<-dead
			r.checkEnd(s)
			return false
		}
		if ctx.Err() != nil {
			t.Fatal("neither killed nor confirmed")
		}
	}
}
