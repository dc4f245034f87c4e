// SPDX-License-Identifier: Apache-2.0

//go:build system

package main_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"klatch/internal/cve"
	"klatch/internal/livepatch"
	"klatch/internal/pki"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/trustsign"
	"klatch/internal/tufclient"
	"klatch/internal/tufrepo"
	"klatch/internal/wire"
)

// stage is a publisher in this process, the server as processes of its own.
type stage struct {
	t           *testing.T
	bin, data   string
	publisher   *pubsim.Publisher
	upstream    string
	tokenFile   string
	fleet       string // addresses of the running server
	admin       string
	server      *exec.Cmd
	log         *bytes.Buffer
	fleetListen string
}

func newStage(t *testing.T) *stage {
	t.Helper()
	now := time.Now()
	s := &stage{t: t, bin: t.TempDir(), data: filepath.Join(t.TempDir(), "data"), publisher: pubsim.New(t, "acme", now), fleetListen: "127.0.0.1:0"}
	s.upstream, s.tokenFile = s.publisher.Serve(), filepath.Join(t.TempDir(), "admin-token")
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", s.bin, "klatch/cmd/klatch-server", "klatch/cmd/klatch-fleet").CombinedOutput()
	if err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	anchor, err := trustsign.Anchor(*s.publisher.Anchor)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.bin, "anchor.json"), anchor, 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// run runs a program to its end and compares its exit status.
func (s *stage) run(want int, name string, args ...string) (stdout, stderr string) {
	s.t.Helper()
	if name == "klatch-server" {
		args = append(args, "--data", s.data)
	} else {
		args = append(args, "--server", s.admin, "--token-file", s.tokenFile)
	}
	c := exec.CommandContext(s.t.Context(), filepath.Join(s.bin, name), args...)
	var o, e bytes.Buffer
	c.Stdout, c.Stderr = &o, &e
	err := c.Run()
	exit, failed := errors.AsType[*exec.ExitError](err)
	status := 0
	if failed {
		status = exit.ExitCode()
	} else if err != nil {
		s.t.Fatal(err)
	}
	if status != want {
		s.t.Fatalf("%s %s: exit status %d, want %d\n%s%s", name, strings.Join(args, " "), status, want, &o, &e)
	}
	return o.String(), e.String()
}

func (s *stage) init() {
	s.t.Helper()
	s.run(0, "klatch-server", "init", "--name", "127.0.0.1", "--anchor", filepath.Join(s.bin, "anchor.json"), "--allow-lab", "--admin-token-file", s.tokenFile)
}

var ready = regexp.MustCompile(`^ready fleet=(https://\S+) admin=(http://\S+)\n$`)

func (s *stage) start(args ...string) {
	s.t.Helper()
	args = append([]string{"serve", "--verbose", "--data", s.data, "--listen", s.fleetListen, "--admin-listen", "127.0.0.1:0"}, args...)
	c := exec.CommandContext(s.t.Context(), filepath.Join(s.bin, "klatch-server"), args...)
	s.log = &bytes.Buffer{}
	c.Stderr = s.log
	out, err := c.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.server = c
	s.t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	m := ready.FindStringSubmatch(line)
	if err != nil || m == nil {
		s.t.Fatalf("ready line %q, %v\n%s", line, err, s.log)
	}
	s.fleet, s.admin = m[1], m[2]
	s.fleetListen = strings.TrimPrefix(s.fleet, "https://")
}

func (s *stage) kill() {
	s.t.Helper()
	if err := s.server.Process.Kill(); err != nil {
		s.t.Fatal(err)
	}
	s.server.Wait()
}

func (s *stage) call(c *tls.Config, path string, in, out any) (int, wire.Problem) {
	s.t.Helper()
	b, err := json.Marshal(in)
	if err != nil {
		s.t.Fatal(err)
	}
	tr := &http.Transport{TLSClientConfig: c}
	defer tr.CloseIdleConnections()
	a, err := (&http.Client{Transport: tr}).Post(s.fleet+path, "application/json", bytes.NewReader(b))
	if err != nil {
		s.t.Fatal(err)
	}
	defer a.Body.Close()
	answer, err := io.ReadAll(a.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	var p wire.Problem
	if a.StatusCode >= 400 {
		if err := json.Unmarshal(answer, &p); err != nil {
			s.t.Fatal(err)
		}
	} else if out != nil {
		if err := json.Unmarshal(answer, out); err != nil {
			s.t.Fatal(err)
		}
	}
	return a.StatusCode, p
}

// enroll gives the TLS end of a fresh machine.
func (s *stage) enroll(token wire.Token, facts wire.Facts) (*tls.Config, string, wire.Problem) {
	s.t.Helper()
	key, csr, err := pki.NewMachineKey()
	if err != nil {
		s.t.Fatal(err)
	}
	first, err := pki.TLSForToken(token, "127.0.0.1")
	if err != nil {
		s.t.Fatal(err)
	}
	var a wire.EnrollAnswer
	status, problem := s.call(first, "/v1/enroll", wire.EnrollRequest{Token: token, CSR: csr, Facts: facts}, &a)
	if status != 200 {
		return nil, "", problem
	}
	cert, err := pki.LoadMachine(a.Certificate, key)
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := pki.TLSForMachine(a.CA, func() (*tls.Certificate, error) { return &cert, nil })
	if err != nil {
		s.t.Fatal(err)
	}
	return c, a.MachineID, problem
}

func (s *stage) page() string {
	s.t.Helper()
	b, err := os.ReadFile(s.tokenFile)
	if err != nil {
		s.t.Fatal(err)
	}
	q, err := http.NewRequestWithContext(s.t.Context(), http.MethodGet, s.admin+"/", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	q.SetBasicAuth("admin", strings.TrimSpace(string(b)))
	a, err := http.DefaultClient.Do(q)
	if err != nil {
		s.t.Fatal(err)
	}
	defer a.Body.Close()
	page, err := io.ReadAll(a.Body)
	if err != nil || a.StatusCode != 200 {
		s.t.Fatal(a.Status, err)
	}
	return string(page)
}

// TestFleetJourney: enroll, check, download, report, page; then the server is
// killed, its database and its copy of the repository are wiped, and both come
// back: the livepatches from the publisher, the machine by its certificate.
func TestFleetJourney(t *testing.T) {
	s := newStage(t)
	k := pubsim.Kernel("6.1.0-50-cloud-amd64", 1)
	facts := wire.Facts{Hostname: "host-1", Kernel: k, Version: "test"}
	s.publisher.Release(time.Now(), k, 1, "CVE-2026-0001")

	_, stderr := s.run(3, "klatch-server", "serve")
	if !strings.Contains(stderr, "hint: make one: klatch-server init") {
		t.Errorf("no hint: %s", stderr)
	}
	s.init()
	s.run(3, "klatch-server", "init", "--name", "127.0.0.1", "--anchor", filepath.Join(s.bin, "anchor.json"), "--allow-lab")
	s.start()
	if page := s.page(); !strings.Contains(page, "No machine is enrolled yet.") || !strings.Contains(page, "klatch-server sync") {
		t.Error("the empty page does not say what to do")
	}
	s.run(0, "klatch-server", "sync", "--from", s.upstream) // while it serves

	out, _ := s.run(0, "klatch-fleet", "token", "create")
	token := wire.Token(strings.TrimSpace(out))
	machine, id, _ := s.enroll(token, facts)
	if id == "" {
		t.Fatal("not enrolled")
	}
	if _, _, p := s.enroll(token, facts); p.Code != "token_used" || p.Status != 403 || p.Hint == "" {
		t.Errorf("used token: %+v", p)
	}
	torn := token[:20] + "A" + token[21:]
	if token[20] == 'A' {
		torn = token[:20] + "B" + token[21:]
	}
	if _, _, p := s.enroll(torn, facts); p.Code != "token_unknown" {
		t.Errorf("wrong token: %+v", p)
	}

	var answer wire.CheckAnswer
	deadline := time.Now().Add(20 * time.Second)
	for answer.Offer == nil && time.Now().Before(deadline) { // serve notices the sync within seconds
		if status, p := s.call(machine, "/v1/check", wire.CheckRequest{Facts: facts}, &answer); status != 200 {
			t.Fatal(p)
		}
	}
	if answer.Offer == nil || answer.Offer.Sequence != 1 {
		t.Fatalf("answer %+v", answer)
	}
	snapshot, err := tufclient.Refresh(t.Context(), tufclient.Config{
		Root: s.publisher.Root, Dir: t.TempDir(), BaseURL: s.fleet, Now: time.Now(), Client: &http.Client{Transport: &http.Transport{TLSClientConfig: machine}},
	})
	if err != nil {
		t.Fatal(err)
	}
	target, err := snapshot.Target(answer.Offer.Target)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := snapshot.Download(t.Context(), target, livepatch.MaxBundle); err != nil {
		t.Fatal(err)
	}
	report := wire.Report{Key: "k1", Event: wire.EventConfirmed, At: time.Now(), Sequence: 1, Took: 1234, Facts: facts, Fixes: []cve.ID{"CVE-2026-0001"}, State: wire.State{
		State: "confirmed", Reason: "live_patched", Text: "livepatch 1 with 1 fix", NextStep: "none", Sequence: 1, Advice: "none",
		Fixes: []livepatch.Fix{{CVE: "CVE-2026-0001", Check: livepatch.Unchecked}},
	}}
	if status, p := s.call(machine, "/v1/reports", report, nil); status != 204 {
		t.Fatal(p)
	}
	for _, want := range []string{"host-1", id, "confirmed", "CVE-2026-0001", "unchecked", "6.1.0-50-cloud-amd64"} {
		if !strings.Contains(s.page(), want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if out, _ := s.run(0, "klatch-fleet", "machines", "--json"); !strings.Contains(out, `"version": 1`) || !strings.Contains(out, id) {
		t.Errorf("machines: %s", out)
	}
	if out, _ := s.run(0, "klatch-fleet", "reports"); !strings.Contains(out, "confirmed") || !strings.Contains(out, "1234 ms") {
		t.Errorf("reports: %s", out)
	}
	if strings.Contains(s.log.String(), string(token)) {
		t.Error("the token is in the log")
	}

	s.kill()
	for _, name := range []string{"klatch.db", "klatch.db-wal", "klatch.db-shm", "repository"} {
		if err := os.RemoveAll(filepath.Join(s.data, name)); err != nil {
			t.Fatal(err)
		}
	}
	s.run(0, "klatch-server", "sync", "--from", s.upstream)
	s.start()
	if status, p := s.call(machine, "/v1/reports", report, nil); status != 204 {
		t.Fatal(p)
	}
	if page := s.page(); !strings.Contains(page, id) || !strings.Contains(page, "host-1") || !strings.Contains(page, "newest") {
		t.Error("the wiped server does not know its machine or its livepatches again")
	}
	if err := s.server.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := s.server.Wait(); err != nil {
		t.Errorf("stopped with %v\n%s", err, s.log)
	}
}

// TestServeFollowsItsUpstream: with a source, serve copies by itself; while the
// publisher shows something broken, the fleet sees the old state, and the next
// good publication is taken.
func TestServeFollowsItsUpstream(t *testing.T) {
	s := newStage(t)
	k := pubsim.Kernel("6.1.0-50-cloud-amd64", 1)
	s.publisher.Release(time.Now(), k, 1, "CVE-2026-0001")
	s.init()
	s.start("--sync-from", s.upstream, "--sync-interval", "1s")
	await := func(want string, not string) {
		t.Helper()
		var out string
		for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
			if out, _ = s.run(0, "klatch-fleet", "livepatches", "--json"); strings.Contains(out, want) && (not == "" || !strings.Contains(out, not)) {
				return
			}
		}
		t.Fatalf("never saw %q: %s\n%s", want, out, s.log)
	}
	await("klatch_1.lpb", "")
	foreign := pubsim.New(t, "foreign", time.Now())
	m, b := foreign.Bundle(k, 2)
	s.publisher.Publish(time.Now(), tufrepo.Target{Path: m.TargetPath(), Content: b.Encode()})
	_, stderr := s.run(3, "klatch-server", "sync", "--from", s.upstream)
	if !strings.Contains(stderr, "klatch_2.lpb") || !strings.Contains(stderr, "hint: ") {
		t.Error(stderr)
	}
	await("klatch_1.lpb", "klatch_2.lpb")
	if _, err := tufrepo.Publish(t.Context(), s.publisher.Dir, tufrepo.Publication{Withdraw: []string{m.TargetPath()}}, s.publisher.Keys, time.Now()); err != nil {
		t.Fatal(err)
	}
	s.publisher.Release(time.Now(), k, 3, "CVE-2026-0001", "CVE-2026-0002")
	await("klatch_3.lpb", "klatch_2.lpb")
}

func TestCommandsWithoutAServer(t *testing.T) {
	s := newStage(t)
	s.init()
	_, stderr := s.run(2, "klatch-server", "serve", "--admin-listen", "0.0.0.0:0")
	if !strings.Contains(stderr, "admin_needs_tls") && !strings.Contains(stderr, "not a loopback address") {
		t.Error(stderr)
	}
	out, _ := s.run(0, "klatch-server", "token", "create", "--uses", "3", "--json")
	if !strings.Contains(out, `"token": "klatch1.`) || !strings.Contains(out, `"uses": 3`) {
		t.Error(out)
	}
	s.run(0, "klatch-server", "migrate")
	_, stderr = s.run(75, "klatch-server", "sync", "--from", t.TempDir())
	if !strings.HasPrefix(stderr, "klatch-server: cannot sync from ") || !strings.Contains(stderr, "\nhint: ") {
		t.Error(stderr)
	}
}
