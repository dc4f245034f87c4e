// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/machine/local"
	"klatch/internal/testkit"
	"klatch/internal/testkit/logsim"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/translog"
	"klatch/internal/trustsign"
	"klatch/internal/tufrepo"
	"klatch/internal/wire"
)

var ready = regexp.MustCompile(`^ready fleet=(https://\S+) admin=(http://\S+)\n$`)

// real is a klatch-server process with a publisher's repository in it.
type real struct {
	t            *testing.T
	dir, data    string
	fleet, admin string // addresses
}

func (s *real) run(name string, args ...string) string {
	s.t.Helper()
	out, err := exec.CommandContext(s.t.Context(), filepath.Join(s.dir, name), args...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (s *real) sync(from string) { s.run("klatch-server", "sync", "--data", s.data, "--from", from) }

func (s *real) tokenFile() string { return filepath.Join(s.dir, "admin-token") }

// startReal makes a server, copies the repository and serves it.
func startReal(t *testing.T, anchor []byte, from string, prepare ...func(*real)) *real {
	t.Helper()
	s := initReal(t, anchor)
	s.sync(from)
	for _, f := range prepare {
		f(s)
	}
	s.serve()
	return s
}

// initReal builds the programs and makes a server's data folder.
func initReal(t *testing.T, anchor []byte) *real {
	t.Helper()
	dir := t.TempDir()
	s := &real{t: t, dir: dir, data: filepath.Join(dir, "data")}
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", dir, "klatch/cmd/klatch-server", "klatch/cmd/klatch-fleet").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	anchorFile := filepath.Join(dir, "anchor.json")
	if err := os.WriteFile(anchorFile, anchor, 0o600); err != nil {
		t.Fatal(err)
	}
	s.run("klatch-server", "init", "--data", s.data, "--name", "127.0.0.1", "--anchor", anchorFile, "--allow-lab", "--admin-token-file", s.tokenFile())
	return s
}

func (s *real) serve() {
	t := s.t
	t.Helper()
	server := exec.CommandContext(t.Context(), filepath.Join(s.dir, "klatch-server"), "serve", "--data", s.data, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Process.Kill(); _ = server.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	at := ready.FindStringSubmatch(line)
	if err != nil || at == nil {
		t.Fatalf("ready line %q, %v", line, err)
	}
	s.fleet, s.admin = at[1], at[2]
}

// enrolled starts a real klatchd on a machine and enrolls it there.
func (s *real) enrolled(m *agenttest.Machine, pub *pubsim.Publisher, anchor []byte) *rig {
	t := s.t
	t.Helper()
	created := s.run("klatch-fleet", "token", "create", "--server", s.admin, "--token-file", s.tokenFile())
	token := regexp.MustCompile(`klatch1\.\S+`).FindString(created)
	r := &rig{t: t, machine: m, fleet: agenttest.NewFleet(t, "unused"), state: filepath.Join(t.TempDir(), "state")}
	m.Transition = 100 * time.Millisecond
	m.Anchor = pub.Anchor
	m.Write("etc/klatch/trust.json", string(anchor))
	m.Write("etc/klatch/allow-lab-keys", "")
	m.Write("etc/klatch/conf.d/50-test.toml", "check_interval = \"5s\"\nsoak = \"1s\"\n")
	r.loader = agenttest.ServeLoader(t, m)
	r.socket = filepath.Join(agenttest.ShortDir(t), "klatchd.sock")
	t.Cleanup(r.kill)
	r.start()
	r.until("not enrolled", func(s agent.Status) bool { return s.State.State == "not_enrolled" })
	if _, err := local.Dial(r.socket).Enroll(t.Context(), local.EnrollRequest{Server: s.fleet, Token: wire.Token(token)}); err != nil {
		t.Fatal(err)
	}
	return r
}

// TestAgainstTheRealServer enrolls a real klatchd at a real klatch-server,
// takes a livepatch through it, and finds the machine in the fleet's list.
func TestAgainstTheRealServer(t *testing.T) {
	testkit.Need(t, "root") // enrolling is for root
	pub := pubsim.New(t, "acme", time.Now())
	m := agenttest.NewMachine(t)
	pub.Release(time.Now(), m.Kernel, 1, "CVE-2026-0001")
	anchor, err := trustsign.Anchor(*pub.Anchor)
	if err != nil {
		t.Fatal(err)
	}
	server := startReal(t, anchor, pub.Serve())
	s := server.enrolled(m, pub, anchor).until("confirmed", confirmed)
	if s.State.Sequence != 1 {
		t.Errorf("state %+v", s.State)
	}
	list := server.run("klatch-fleet", "machines", "--server", server.admin, "--token-file", server.tokenFile(), "--json")
	if !strings.Contains(list, s.Identity.MachineID) || !strings.Contains(list, "confirmed") || !strings.Contains(list, "CVE-2026-0001") {
		t.Errorf("the fleet says\n%s", list)
	}
}

// TestALoggedLivepatchThroughTheRealServer: the proofs and, once the log has
// grown, its tiles reach a real klatchd through a real klatch-server.
func TestALoggedLivepatchThroughTheRealServer(t *testing.T) {
	testkit.Need(t, "root")
	pub, log := pubsim.New(t, "acme", time.Now()), logsim.New(t, "acme/log", 2)
	pub.Anchor.LogPolicy = log.Policy(1)
	anchor, err := trustsign.Anchor(*pub.Anchor)
	if err != nil {
		t.Fatal(err)
	}
	m := agenttest.NewMachine(t)
	release := func(s livepatch.Sequence) {
		man, b := pub.Bundle(m.Kernel, s, "CVE-2026-0001")
		i := log.Add(man.TargetPath(), b.Encode())
		for name, content := range log.Files() {
			pub.Write(name, content)
		}
		pub.Publish(time.Now(), tufrepo.Target{Path: man.TargetPath(), Content: b.Encode()},
			tufrepo.Target{Path: translog.ProofPath(man.TargetPath()), Content: log.Proof(i, 1).Encode()})
	}
	release(1)
	from := pub.Serve()
	server := startReal(t, anchor, from)
	r := server.enrolled(m, pub, anchor)
	r.until("confirmed", confirmed)
	for i := range 300 {
		log.Add(fmt.Sprintf("other/%d", i), nil)
	}
	release(2)
	server.sync(from)
	r.until("confirmed at 2", func(s agent.Status) bool { return confirmed(s) && s.State.Sequence == 2 })
}

// TestARealServerOpensATier: an operator's repository made and signed by the
// real commands. A machine of the second tier takes nothing until somebody has
// promoted it, though the server holds it and would offer it.
func TestARealServerOpensATier(t *testing.T) {
	testkit.Need(t, "root")
	pub := pubsim.New(t, "acme", time.Now())
	m := agenttest.NewMachine(t)
	pub.Release(time.Now(), m.Kernel, 1, "CVE-2026-0001")
	anchor, err := trustsign.Anchor(*pub.Anchor)
	if err != nil {
		t.Fatal(err)
	}
	server := startReal(t, anchor, pub.Serve(), func(s *real) {
		s.run("klatch-server", "rollout", "init", "--data", s.data, "--operator", "ops", "--profile", "lab", "--tier", "canary", "--tier", "stable")
	})
	operator, err := os.ReadFile(filepath.Join(server.data, "rollout.json"))
	if err != nil {
		t.Fatal(err)
	}
	m.Write("etc/klatch/rollout.json", string(operator))
	m.Write("etc/klatch/conf.d/60-tier.toml", "tier = \"stable\"\n")
	r := server.enrolled(m, pub, anchor)
	r.until("not selected", func(s agent.Status) bool { return s.Check.Result == "current" && s.Check.Code == "not_selected" })
	if m.Loads() != 0 {
		t.Error("loaded without a promotion")
	}
	for start := time.Now(); ; time.Sleep(time.Second) { // until canary has it, there is nothing to promote
		cmd := exec.CommandContext(t.Context(), filepath.Join(server.dir, "klatch-fleet"), "promote", "stable", "--all", "--reason", "well",
			"--draft", filepath.Join(server.dir, "none"), "--server", server.admin, "--token-file", server.tokenFile())
		out, err := cmd.CombinedOutput()
		if err == nil {
			break
		}
		if time.Since(start) > 30*time.Second {
			t.Fatalf("promote: %v\n%s", err, out)
		}
	}
	s := r.until("confirmed", confirmed)
	if s.Rollout == nil || s.Rollout.Operator != "ops" || s.State.Seen == nil || s.State.Seen.Rollout == nil {
		t.Errorf("rollout %+v, seen %+v", s.Rollout, s.State.Seen)
	}
}

// TestMetadataThatARealDaemonRefuses shows a klatchd that runs livepatch 1
// metadata that lies. It must say so, and livepatch 1 must stay.
func TestMetadataThatARealDaemonRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		code fault.Code
		lie  func(r *rig, repo *tufsim.Repo)
	}{
		{"expired", "metadata_expired", func(_ *rig, repo *tufsim.Repo) {
			tufsim.Forge(repo, "metadata/timestamp.json", "metadata/timestamp.json", repo.Keys.Timestamp.Signers, func(ts *metadata.TimestampType) {
				ts.Expires = time.Now().Add(-time.Hour)
				ts.Version += 10
			})
		}},
		{"rolled back", "metadata_rollback", func(_ *rig, repo *tufsim.Repo) {
			tufsim.Forge(repo, "metadata/timestamp.json", "metadata/timestamp.json", repo.Keys.Timestamp.Signers, func(ts *metadata.TimestampType) {
				ts.Version = 1
			})
		}},
		{"signed by somebody else", "metadata_untrusted", func(_ *rig, repo *tufsim.Repo) {
			tufsim.Forge(repo, "metadata/timestamp.json", "metadata/timestamp.json", tufsim.Signers("evil", 1), func(ts *metadata.TimestampType) {
				ts.Version += 10
			})
		}},
		{"a flipped byte in the livepatch", "target_digest", func(r *rig, repo *tufsim.Repo) {
			m := r.fleet.Publish(r.machine.Kernel, 2, "CVE-2026-0002")
			dir := filepath.Join(repo.Dir, "targets", filepath.Dir(m.TargetPath()))
			found, err := filepath.Glob(filepath.Join(dir, "*klatch_2.lpb"))
			if err != nil || len(found) != 1 {
				r.t.Fatalf("blob: %v, %v", found, err)
			}
			b, err := os.ReadFile(found[0])
			if err != nil {
				r.t.Fatal(err)
			}
			b[len(b)/2] ^= 1
			if err := os.WriteFile(found[0], b, 0o644); err != nil {
				r.t.Fatal(err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.enroll()
			r.fleet.Publish(r.machine.Kernel, 1, "CVE-2026-0001")
			r.start()
			r.until("confirmed", confirmed)
			tt.lie(r, r.fleet.Repo)
			s := r.until("refused", func(s agent.Status) bool { return s.State.State == "check_failed" })
			if s.State.Reason != tt.code || s.State.Sequence != 1 || r.machine.Loads() != 1 {
				b, err := json.Marshal(s.State)
				t.Errorf("state %s, %v, want code %s and livepatch 1", b, err, tt.code)
			}
		})
	}
}
