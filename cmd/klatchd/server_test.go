// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"klatch/internal/fault"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/machine/local"
	"klatch/internal/testkit"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/testkit/tufsim"
	"klatch/internal/wire"
)

var ready = regexp.MustCompile(`^ready fleet=(https://\S+) admin=(http://\S+)\n$`)

// TestAgainstTheRealServer enrolls a real klatchd at a real klatch-server,
// takes a livepatch through it, and finds the machine in the fleet's list.
func TestAgainstTheRealServer(t *testing.T) {
	testkit.Need(t, "root") // enrolling is for root
	pub := pubsim.New(t, "acme", time.Now())
	m := agenttest.NewMachine(t)
	pub.Release(time.Now(), m.Kernel, 1, "CVE-2026-0001")

	dir := t.TempDir()
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), filepath.Join(dir, name), args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", dir, "klatch/cmd/klatch-server", "klatch/cmd/klatch-fleet").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	anchor, err := pub.Anchor.Encode()
	if err != nil {
		t.Fatal(err)
	}
	anchorFile, tokenFile, data := filepath.Join(dir, "anchor.json"), filepath.Join(dir, "admin-token"), filepath.Join(dir, "data")
	if err := os.WriteFile(anchorFile, anchor, 0o600); err != nil {
		t.Fatal(err)
	}
	run("klatch-server", "init", "--data", data, "--name", "127.0.0.1", "--anchor", anchorFile, "--allow-lab", "--admin-token-file", tokenFile)
	run("klatch-server", "sync", "--data", data, "--from", pub.Serve())
	server := exec.CommandContext(t.Context(), filepath.Join(dir, "klatch-server"), "serve", "--data", data, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
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
	created := run("klatch-fleet", "token", "create", "--server", at[2], "--token-file", tokenFile)
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
	if _, err := local.Dial(r.socket).Enroll(t.Context(), local.EnrollRequest{Server: at[1], Token: wire.Token(token)}); err != nil {
		t.Fatal(err)
	}
	s := r.until("confirmed", confirmed)
	if s.State.Sequence != 1 {
		t.Errorf("state %+v", s.State)
	}
	list := run("klatch-fleet", "machines", "--server", at[2], "--token-file", tokenFile, "--json")
	if !strings.Contains(list, s.Identity.MachineID) || !strings.Contains(list, "confirmed") || !strings.Contains(list, "CVE-2026-0001") {
		t.Errorf("the fleet says\n%s", list)
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
