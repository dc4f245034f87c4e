// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/machine/agent"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/testkit"
	"klatch/internal/testkit/logsim"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/translog"
	"klatch/internal/trust"
	"klatch/internal/trustsign"
	"klatch/internal/tufrepo"
)

// insideEnv names the folder that was carried over the gap.
const insideEnv = "KLATCH_TEST_AIR_GAP"

// TestAcrossAnAirGap: outside, a server copies from the publisher and exports.
// Then this test runs itself in a network namespace that has no way out, with
// nothing but that file and the trust anchor.
func TestAcrossAnAirGap(t *testing.T) {
	testkit.Need(t, "root") // for the namespace, and for enrolling
	pub, log := pubsim.New(t, "acme", time.Now()), logsim.New(t, "acme/log", 2)
	pub.Anchor.LogPolicy = log.Policy(1)
	anchor, err := trustsign.Anchor(*pub.Anchor)
	if err != nil {
		t.Fatal(err)
	}
	k := agenttest.NewMachine(t).Kernel
	man, b := pub.Bundle(k, 1, "CVE-2026-0001")
	i := log.Add(man.TargetPath(), b.Encode())
	for name, content := range log.Files() {
		pub.Write(name, content)
	}
	pub.Publish(time.Now(), pubsim.Listed(man, b, time.Now()), tufrepo.Target{Path: translog.ProofPath(man.TargetPath()), Content: log.Proof(i, 1).Encode()})
	other := k
	other.Release, other.ID[0] = "6.1.0-99-amd64", other.ID[0]^1
	pub.Release(time.Now(), other, 1)

	outside := initReal(t, anchor)
	outside.sync(pub.Serve())
	carried := t.TempDir()
	outside.run("klatch-server", "export", "--data", outside.data, "--kernel", string(k.Release), filepath.Join(carried, "export"))
	if err := os.WriteFile(filepath.Join(carried, "anchor.json"), anchor, 0o600); err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), "unshare", "-n", "sh", "-c", "ip link set lo up && exec \"$@\"", "sh", os.Args[0], "-test.run", "^TestBehindTheAirGap$", "-test.v", "-test.timeout", "5m")
	c.Env = append(os.Environ(), insideEnv+"="+carried)
	out, err := c.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestBehindTheAirGap") {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestBehindTheAirGap is the inner half of TestAcrossAnAirGap; alone it has
// nothing to do.
func TestBehindTheAirGap(t *testing.T) {
	carried := os.Getenv(insideEnv)
	if carried == "" {
		return
	}
	var d net.Dialer
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if conn, err := d.DialContext(ctx, "udp", "192.0.2.1:53"); err == nil {
		conn.Close()
		t.Fatal("there is a way out of the namespace")
	}
	anchor, err := os.ReadFile(filepath.Join(carried, "anchor.json"))
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := trust.ParseAnchor(anchor, true)
	if err != nil {
		t.Fatal(err)
	}
	s := initReal(t, anchor)
	file := filepath.Join(carried, "export")
	// Killed at some moments, then repeated: each run goes on.
	for after := time.Millisecond; after < 100*time.Millisecond; after *= 3 {
		c := exec.CommandContext(t.Context(), filepath.Join(s.dir, "klatch-server"), "import", "--data", s.data, file)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after)
		_ = c.Process.Kill()
		_ = c.Wait()
	}
	for range 2 {
		if out := s.run("klatch-server", "import", "--data", s.data, file); !strings.Contains(out, "1 livepatches, metadata") || !strings.Contains(out, "6.1.0-99-amd64/klatch_1.lpb: it was not in the imported file") {
			t.Errorf("import says\n%s", out)
		}
	}
	s.serve()
	m := agenttest.NewMachine(t)
	r := s.enrolled(m, &pubsim.Publisher{Anchor: parsed}, anchor)
	r.until("confirmed", func(st agent.Status) bool { return confirmed(st) && st.State.Sequence == 1 })
}
