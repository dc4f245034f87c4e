// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"bufio"
	"context"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/livepatch"
	"klatch/internal/server/adminapi"
	"klatch/internal/trustsign"
	"klatch/internal/wire"
)

// server is a klatch-server process, in a network namespace of its own where
// netns has a name.
type server struct {
	t          *testing.T
	program    string
	data       string
	netns      string
	listen     string // address for machines; port 0 chooses one
	fleet      string // its port, once it runs
	admin      string
	adminToken string
	cmd        *exec.Cmd
	ended      chan struct{}
}

func newServer(t *testing.T, m made) *server {
	t.Helper()
	dir := t.TempDir()
	return &server{t: t, program: filepath.Join(m.bin, "klatch-server"), data: filepath.Join(dir, "data"),
		listen: "127.0.0.1:0", adminToken: filepath.Join(dir, "admin-token")}
}

func (s *server) command(args ...string) *exec.Cmd {
	argv := append([]string{s.program, "--data", s.data}, args...)
	if s.netns != "" {
		argv = append([]string{"ip", "netns", "exec", s.netns}, argv...)
	}
	return exec.CommandContext(context.WithoutCancel(s.t.Context()), argv[0], argv[1:]...)
}

func (s *server) run(args ...string) string {
	s.t.Helper()
	cmd := s.command(args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("klatch-server %v: %v\n%s%s", args, err, out, &stderr)
	}
	return string(out)
}

// init makes the server; it believes p and holds none of its keys.
func (s *server) init(p *publisher, names ...string) {
	s.t.Helper()
	b, err := trustsign.Anchor(*p.Anchor)
	if err != nil {
		s.t.Fatal(err)
	}
	anchor := filepath.Join(s.t.TempDir(), "anchor.json")
	if err := os.WriteFile(anchor, b, 0o600); err != nil {
		s.t.Fatal(err)
	}
	args := []string{"init", "--anchor", anchor, "--allow-lab", "--admin-token-file", s.adminToken}
	for _, n := range append(names, lab.HostAddress, "127.0.0.1") {
		args = append(args, "--name", n)
	}
	s.run(args...)
}

func (s *server) sync(from string) {
	s.t.Helper()
	s.run("sync", "--from", from)
}

var ready = regexp.MustCompile(`^ready fleet=https://\S+:([0-9]+) admin=(http://\S+)\n$`)

func (s *server) start() {
	s.t.Helper()
	cmd := s.command("serve", "--listen", s.listen, "--admin-listen", "127.0.0.1:0")
	var log strings.Builder
	cmd.Stderr = &log
	out, err := cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if s.ended, err = startWithUs(cmd); err != nil {
		s.t.Fatal(err)
	}
	s.cmd = cmd
	s.t.Cleanup(s.stop)
	line, err := bufio.NewReader(out).ReadString('\n')
	m := ready.FindStringSubmatch(line)
	if m == nil {
		<-s.ended
		s.t.Fatalf("ready line %q, %v\n%s", line, err, &log)
	}
	s.fleet, s.admin = m[1], m[2]
	s.listen = s.listen[:strings.LastIndexByte(s.listen, ':')+1] + s.fleet
}

// stop ends it in order; it may have ended already.
func (s *server) stop() {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	hung := time.AfterFunc(20*time.Second, func() { _ = s.cmd.Process.Kill() })
	<-s.ended
	hung.Stop()
	s.cmd = nil
}

// startWithUs starts a program that dies with this one, however this one
// ends. The kernel means the thread that started it (prctl(2)), so that thread
// stays until the program has ended.
func startWithUs(cmd *exec.Cmd) (ended chan struct{}, err error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	ended = make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // who looks at the end knows why
		}
		close(ended)
	}()
	return ended, <-started
}

func (s *server) token() wire.Token {
	s.t.Helper()
	return wire.Token(strings.TrimSpace(s.run("token", "create")))
}

// client is for a server that is not in a namespace.
func (s *server) client() *adminapi.Client {
	s.t.Helper()
	token, err := os.ReadFile(s.adminToken)
	if err != nil {
		s.t.Fatal(err)
	}
	return &adminapi.Client{BaseURL: s.admin, Token: strings.TrimSpace(string(token)), HTTP: &http.Client{Timeout: 10 * time.Second}}
}

// events are those that the server has of one sequence, oldest first.
func (s *server) events(n livepatch.Sequence) []wire.Event {
	s.t.Helper()
	r, err := s.client().Reports(s.t.Context(), "", 500)
	if err != nil {
		s.t.Fatal(err)
	}
	var list []wire.Event
	for _, e := range r.Reports {
		if e.Report.Sequence == n && e.Report.Event != wire.EventBooted {
			list = append([]wire.Event{e.Report.Event}, list...)
		}
	}
	return list
}
