// SPDX-License-Identifier: Apache-2.0

//go:build system

package main_test

import (
	"crypto/tls"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"klatch/internal/livepatch"
	"klatch/internal/pki"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/trustsign"
	"klatch/internal/tufclient"
	"klatch/internal/tufrepo"
	"klatch/internal/wire"
)

// below makes a stage for a server that shares the publisher and the programs
// of another one.
func (s *stage) below() *stage {
	s.t.Helper()
	return &stage{t: s.t, bin: s.bin, data: filepath.Join(s.t.TempDir(), "data"), publisher: s.publisher,
		tokenFile: filepath.Join(s.t.TempDir(), "admin-token"), fleetListen: "127.0.0.1:0"}
}

// join makes a token on the server above and redeems it.
func (s *stage) join(above *stage) {
	s.t.Helper()
	out, _ := above.run(0, "klatch-server", "token", "create", "--mirror")
	file := filepath.Join(s.t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(out), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.run(0, "klatch-server", "join", above.fleet, "--token-file", file, "--name", "below")
}

// trusting is the TLS end of one who has only a token.
func (s *stage) trusting(token string) *tls.Config {
	s.t.Helper()
	c, err := pki.TLSForToken(wire.Token(token), "127.0.0.1")
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

func withoutCertificate(c *tls.Config) *tls.Config {
	c = c.Clone()
	c.GetClientCertificate = nil
	return c
}

// status is what klatch-server status says.
type status struct {
	Livepatches int   `json:"livepatches"`
	Recalls     int64 `json:"recalls_version"`
	Metadata    int64 `json:"metadata_version"`
	LeftOut     []struct {
		Target string `json:"target"`
		Why    string `json:"why"`
	} `json:"left_out"`
	Problems []string `json:"problems"`
	Tiers    struct {
		From     string    `json:"from"`
		Upstream string    `json:"upstream"`
		Operator string    `json:"operator"`
		Version  int64     `json:"metadata_version"`
		Expires  time.Time `json:"metadata_expires"`
		Problem  string    `json:"problem"`
	} `json:"tiers"`
	Last struct {
		Code string `json:"code"`
		Text string `json:"text"`
	} `json:"last_sync"`
}

func (s *stage) status() status {
	s.t.Helper()
	out, _ := s.run(0, "klatch-server", "status", "--json")
	var st status
	if err := json.Unmarshal([]byte(out), &st); err != nil {
		s.t.Fatal(err)
	}
	return st
}

// await polls a server's status until it is as wanted.
func (s *stage) await(what string, want func(status) bool) {
	s.t.Helper()
	var st status
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if st = s.status(); want(st) {
			return
		}
	}
	s.t.Fatalf("never %s: %+v\n%s", what, st, s.log)
}

func recallOne(t *testing.T, p *pubsim.Publisher, k livepatch.Recall) {
	t.Helper()
	signed, err := trustsign.Recalls(livepatch.Recalls{Format: livepatch.RecallsFormat, Version: 1, Issued: time.Now(), Entries: []livepatch.Recall{k}}, p.Note)
	if err != nil {
		t.Fatal(err)
	}
	p.Publish(time.Now(), tufrepo.Target{Path: livepatch.RecallsPath(1), Content: signed})
}

// TestThreeServersInAChain: publisher, server, mirror, mirror of the mirror,
// each a process that follows the one above with a credential of its own, the
// lowest with a filter. What is published arrives at the end, verified by a
// machine there; a recall arrives although its livepatch is filtered away; a
// mirror that is removed is told so and keeps serving what it has.
func TestThreeServersInAChain(t *testing.T) {
	top := newStage(t)
	k, neighbor := pubsim.Kernel("6.1.0-50-cloud-amd64", 1), pubsim.Kernel("6.1.0-51-cloud-amd64", 2)
	p := top.publisher
	p.Release(time.Now(), k, 1, "CVE-2026-0001")
	p.Release(time.Now(), neighbor, 1, "CVE-2026-0001")
	top.init()
	top.run(0, "klatch-server", "configure", "--upstream", top.upstream, "--interval", "1s", "--closed")
	top.start()
	middle, low := top.below(), top.below()
	for _, pair := range [][2]*stage{{middle, top}, {low, middle}} {
		pair[0].init()
		pair[0].join(pair[1])
		pair[0].run(0, "klatch-server", "configure", "--interval", "1s", "--closed")
		if pair[0] == low {
			low.run(0, "klatch-server", "configure", "--kernel", "6.1.0-50-*")
		}
		pair[0].start()
	}
	low.await("both livepatches through three servers", func(s status) bool {
		return s.Livepatches == 1 && len(s.LeftOut) == 1 && s.LeftOut[0].Why == "filter" && len(s.Problems) == 0
	})

	out, _ := low.run(0, "klatch-fleet", "token", "create")
	facts := wire.Facts{Hostname: "host-1", Kernel: k, Version: "test"}
	machine, _, problem := low.enroll(wire.Token(strings.TrimSpace(out)), facts)
	if machine == nil {
		t.Fatal(problem)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: machine}}
	snapshot, err := tufclient.Refresh(t.Context(), tufclient.Config{Root: p.Root, Dir: t.TempDir(), BaseURL: low.fleet, Now: time.Now(), Client: client})
	if err != nil {
		t.Fatal(err)
	}
	if len(snapshot.Targets()) != 2 {
		t.Errorf("the machine sees %d signed targets", len(snapshot.Targets()))
	}
	var answer wire.CheckAnswer
	check := func(f wire.Facts) wire.CheckAnswer {
		t.Helper()
		answer = wire.CheckAnswer{}
		if status, p := low.call(machine, "/v1/check", wire.CheckRequest{Facts: f}, &answer); status != 200 {
			t.Fatal(p)
		}
		return answer
	}
	for end := time.Now().Add(time.Minute); check(facts).Offer == nil && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
	}
	if answer.Offer == nil || answer.Absent != "" {
		t.Fatalf("answer %+v", answer)
	}
	target, err := snapshot.Target(answer.Offer.Target)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := snapshot.Download(t.Context(), target, livepatch.MaxBundle); err != nil {
		t.Error(err)
	}
	if a := check(wire.Facts{Hostname: "host-2", Kernel: neighbor, Version: "test"}); a.Offer != nil || a.Absent != "filter" || a.Reason != "no_livepatch" {
		t.Errorf("a machine whose kernel is filtered away hears %+v", a)
	}
	// Nobody reads a closed server without its certificate.
	a, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: withoutCertificate(machine)}}).Get(low.fleet + "/metadata/timestamp.json")
	if err != nil {
		t.Fatal(err)
	}
	a.Body.Close()
	if a.StatusCode != http.StatusForbidden {
		t.Errorf("without a certificate: %s", a.Status)
	}

	// The recall of what the lowest does not have, and a new livepatch.
	recallOne(t, p, livepatch.Recall{Kernel: neighbor.ID, Sequence: 1, Reason: "it hangs"})
	p.Release(time.Now(), k, 2, "CVE-2026-0001", "CVE-2026-0002")
	low.await("the recall", func(s status) bool { return s.Recalls == 1 && s.Livepatches == 2 })

	out, _ = middle.run(0, "klatch-server", "mirrors", "--json")
	var list struct {
		Mirrors []struct {
			ID   string `json:"mirror_id"`
			Name string `json:"name"`
		} `json:"mirrors"`
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list.Mirrors) != 1 || list.Mirrors[0].Name != "below" {
		t.Fatalf("%v: %s", err, out)
	}
	middle.run(3, "klatch-server", "mirrors", "remove", "mir_00000000000000000000000000")
	middle.run(0, "klatch-server", "mirrors", "remove", list.Mirrors[0].ID)
	low.await("told that it was removed", func(s status) bool { return s.Last.Code == "mirror_removed" })
	if st := low.status(); st.Livepatches != 2 || check(facts).Offer == nil {
		t.Errorf("the removed mirror serves %+v", st)
	}
	_, stderr := low.run(3, "klatch-server", "sync")
	if !strings.Contains(stderr, "was removed at") || !strings.Contains(stderr, "hint: ") {
		t.Error(stderr)
	}
	low.join(middle)
	low.await("taken in again", func(s status) bool { return s.Last.Code == "" })
}

// TestASignalAsksForACopyAtOnce: the interval is a day, the signal does not
// wait for it.
func TestASignalAsksForACopyAtOnce(t *testing.T) {
	s := newStage(t)
	k := pubsim.Kernel("6.1.0-50-cloud-amd64", 1)
	var asked atomic.Int64
	s.publisher.Lie("/metadata/timestamp.json", func(w http.ResponseWriter, q *http.Request) {
		asked.Add(1)
		http.ServeFile(w, q, filepath.Join(s.publisher.Dir, "metadata", "timestamp.json"))
	})
	s.publisher.Release(time.Now(), k, 1, "CVE-2026-0001")
	s.init()
	s.run(0, "klatch-server", "configure", "--upstream", s.upstream, "--interval", "24h")
	s.start()
	s.await("the first copy", func(st status) bool { return st.Livepatches == 1 })
	s.publisher.Release(time.Now(), k, 2, "CVE-2026-0001")
	if err := s.server.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s.await("the second copy", func(st status) bool { return st.Livepatches == 2 })
	if n := asked.Load(); n != 2 {
		t.Errorf("looked %d times, want at the start and at the signal", n)
	}
	_, stderr := s.run(2, "klatch-server", "configure", "--series", "six")
	if !strings.Contains(stderr, `series "six" is not such as 6.1`) {
		t.Error(stderr)
	}
}
