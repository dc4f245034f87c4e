// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/machine/local"
	"klatch/internal/testkit"
	"klatch/internal/testkit/logsim"
	"klatch/internal/testkit/pubsim"
	"klatch/internal/trustsign"
	"klatch/internal/wire"
)

// fleetSize is how many machines a drill with a fleet has.
const fleetSize = 6

// TestAttackDrills are the incidents of group C in which machines have the
// larger part: first what the attacker gets, then the recovery, each step as
// the how-to names it. The publisher's part is in internal/forge/ceremony, a
// stolen module key in internal/machine/loader.
func TestAttackDrills(t *testing.T) {
	testkit.Need(t, "root") // enrolling is for root
	t.Run("Attack/C/server owned", serverOwned)
	t.Run("Attack/C/log fork seen", logForkSeen)
	t.Run("Attack/C/a machine lost all its state", stateLost)
}

// serverOwned: somebody owns the server; it is rebuilt from nothing, with a new
// CA, and the fleet enrolls again. No livepatch is touched by either.
func serverOwned(t *testing.T) {
	pub := pubsim.New(t, "acme", time.Now())
	var machines []*agenttest.Machine
	for range fleetSize {
		machines = append(machines, agenttest.NewMachine(t))
	}
	pub.Release(time.Now(), machines[0].Kernel, 1, "CVE-2026-0001")
	anchor, err := trustsign.Anchor(*pub.Anchor)
	if err != nil {
		t.Fatal(err)
	}
	from := pub.Serve()
	owned := startReal(t, anchor, from)
	rigs := make([]*rig, fleetSize)
	for i, m := range machines {
		rigs[i] = owned.enrolled(m, pub, anchor)
	}
	each(rigs, func(r *rig) { r.until("confirmed", confirmed) })

	// The owner of the server has its CA key and its copy of the repository, and
	// puts a world of their own there, with a livepatch 2 that they signed.
	evil := pubsim.New(t, "evil", time.Now())
	evil.Release(time.Now(), machines[0].Kernel, 2, "CVE-2026-0001")
	served := filepath.Join(owned.data, "repository")
	for _, part := range []string{"metadata", "targets"} {
		at := filepath.Join(served, part)
		for _, err := range []error{os.RemoveAll(at), os.CopyFS(at, os.DirFS(filepath.Join(evil.Dir, part)))} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	each(rigs, func(r *rig) {
		s := r.until("refused", func(s agent.Status) bool { return s.State.State == "check_failed" })
		if s.State.Reason != "metadata_untrusted" && s.State.Reason != "metadata_rollback" || s.State.Sequence != 1 || r.machine.Loads() != 1 {
			t.Errorf("state %+v, %d loads", s.State, r.machine.Loads())
		}
	})
	pub.Release(time.Now(), machines[0].Kernel, 2, "CVE-2026-0001")

	// Rebuilt: new data folder, new CA, new tokens. On each machine the owner
	// stops klatchd, removes the old identity and enrolls.
	rebuilt := startReal(t, anchor, from)
	created := rebuilt.run("klatch-fleet", "token", "create", "--server", rebuilt.admin, "--token-file", rebuilt.tokenFile(), "--uses", "100")
	token := wire.Token(regexp.MustCompile(`klatch1\.\S+`).FindString(created))
	each(rigs, func(r *rig) {
		r.kill()
		if err := os.Remove(filepath.Join(r.state, "identity.json")); err != nil {
			t.Error(err)
		}
		r.start()
		r.until("not enrolled", func(s agent.Status) bool { return s.Identity == nil })
		if _, err := local.Dial(r.socket).Enroll(t.Context(), local.EnrollRequest{Server: rebuilt.fleet, Token: token}); err != nil {
			t.Error(err)
		}
		r.until("confirmed at 2", func(s agent.Status) bool { return confirmed(s) && s.State.Sequence == 2 })
		if n := r.machine.Loads(); n != 2 {
			t.Errorf("the kernel took %d livepatches", n)
		}
	})
	list := rebuilt.run("klatch-fleet", "machines", "--server", rebuilt.admin, "--token-file", rebuilt.tokenFile(), "--json")
	if n := strings.Count(list, `"mch_`); n != fleetSize {
		t.Errorf("the new server knows %d machines, want %d", n, fleetSize)
	}
}

// each does one thing on all machines, some at a time.
func each(rigs []*rig, do func(*rig)) {
	var wg sync.WaitGroup
	places := make(chan struct{}, 4)
	for _, r := range rigs {
		wg.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			do(r)
		})
	}
	wg.Wait()
}

// logForkSeen: the log shows two histories. Machines that see it load nothing
// more; the publisher begins a new log with a new key, in a new anchor that the
// owner installs; what was seen is kept as evidence.
func logForkSeen(t *testing.T) {
	r := confirmOne(t)
	r.offer(2, func(target string, bundle []byte) []byte {
		fork := r.log.Fork()
		fork.Entries = fork.Entries[:2]
		return fork.Proof(fork.Add(target, bundle), 0, 1).Encode()
	})
	r.check()
	r.until("halted", func(s agent.Status) bool { return s.State.State == "halted" })
	// An honest offer of the same log changes nothing: nobody knows which
	// history is the true one.
	r.offer(3, r.honest)
	r.check()
	if s := r.until("halted", func(s agent.Status) bool { return s.State.State == "halted" }); r.machine.Loads() != 1 || s.State.Sequence != 1 {
		t.Errorf("state %+v, %d loads", s.State, r.machine.Loads())
	}
	evidence, err := os.ReadFile(filepath.Join(r.state, "log.json"))
	if err != nil {
		t.Fatal(err)
	}
	next := logsim.New(t, "lab/log-2", 3)
	next.Add("other/a", []byte("a"))
	r.believe(next.Policy(2))
	r.log = next
	r.offer(4, r.honest)
	r.check()
	r.until("confirmed at 4", func(s agent.Status) bool { return confirmed(s) && s.State.Sequence == 4 })
	after, err := os.ReadFile(filepath.Join(r.state, "log.json"))
	if err != nil || !strings.Contains(string(after), `"shown"`) || len(after) < len(evidence) {
		t.Errorf("the evidence is gone: %v\n%s", err, after)
	}
}

// stateLost: the disk of klatchd is new. The attacker, who owns the server,
// shows the world as it was before livepatch 2: still fresh metadata, signed by
// the publisher. What the kernel and root's record say beats the lost memory.
func stateLost(t *testing.T) {
	r := newRig(t)
	r.machine.Write("etc/klatch/conf.d/60-test.toml", "check_interval = \"1h\"\n") // only when asked
	r.enroll()
	first := r.fleet.Publish(r.machine.Kernel, 1)
	r.start()
	r.look()
	r.until("confirmed at 1", func(s agent.Status) bool { return confirmed(s) && s.State.Sequence == 1 })
	old := t.TempDir()
	if err := os.CopyFS(old, os.DirFS(r.fleet.Repo.Dir)); err != nil {
		t.Fatal(err)
	}
	r.fleet.Publish(r.machine.Kernel, 2)
	r.look()
	r.until("confirmed at 2", func(s agent.Status) bool { return confirmed(s) && s.State.Sequence == 2 })

	r.kill()
	if err := os.RemoveAll(r.state); err != nil {
		t.Fatal(err)
	}
	honest := t.TempDir()
	swap := func(to, with string) {
		t.Helper()
		for _, err := range []error{os.CopyFS(to, os.DirFS(r.fleet.Repo.Dir)), os.RemoveAll(r.fleet.Repo.Dir), os.CopyFS(r.fleet.Repo.Dir, os.DirFS(with))} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	swap(honest, old)
	r.fleet.OfferTarget(first.TargetPath(), 1)
	r.enroll()
	r.start()
	if code := r.look(); code != "sequence_lower" {
		t.Errorf("the old world is refused with %q", code)
	}
	if n := r.machine.Loads(); n != 2 {
		t.Errorf("the kernel took %d livepatches", n)
	}
	swap(t.TempDir(), honest)
	r.fleet.Publish(r.machine.Kernel, 3)
	if code := r.look(); code == fault.Code("metadata_rollback") {
		t.Errorf("the honest world is refused with %q", code)
	}
	r.until("confirmed at 3", func(s agent.Status) bool { return confirmed(s) && s.State.Sequence == livepatch.Sequence(3) })
}
