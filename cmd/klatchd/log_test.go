// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/local"
	"klatch/internal/testkit"
	"klatch/internal/testkit/logsim"
	"klatch/internal/translog"
	"klatch/internal/tufrepo"
)

// logged is a rig whose publisher keeps a log, two of whose three witnesses
// must cosign.
type logged struct {
	*rig
	log *logsim.Log
}

func newLogged(t *testing.T) *logged {
	t.Helper()
	testkit.Need(t, "root") // to ask for checks
	r := &logged{newRig(t), logsim.New(t, "lab/log", 3)}
	r.log.Add("other/a", []byte("a"))
	r.log.Add("other/b", []byte("b"))
	r.believe(r.log.Policy(2))
	r.enroll()
	return r
}

// believe is the machine's owner, who installs an anchor.
func (r *logged) believe(policy string) {
	r.fleet.Pub.Anchor.LogPolicy = policy
	r.fleet.Install(r.machine)
}

// show puts a log's files where the machine gets them.
func (r *logged) show(l *logsim.Log) {
	r.t.Helper()
	for name, content := range l.Files() {
		r.fleet.Repo.Write(name, content)
	}
}

// offer publishes a livepatch with a proof, or without one.
func (r *logged) offer(s livepatch.Sequence, proof func(target string, bundle []byte) []byte) {
	r.t.Helper()
	m, bundle := r.fleet.Pub.Livepatch(r.machine.Kernel, s, "CVE-2026-0001")
	targets := []tufrepo.Target{{Path: m.TargetPath(), Content: bundle}}
	if p := proof(m.TargetPath(), bundle); p != nil {
		targets = append(targets, tufrepo.Target{Path: translog.ProofPath(m.TargetPath()), Content: p})
	}
	r.fleet.Repo.Publish(time.Now(), targets...)
	r.fleet.OfferTarget(m.TargetPath(), s)
}

// honest logs and proves as a publisher does.
func (r *logged) honest(target string, bundle []byte) []byte {
	i := r.log.Add(target, bundle)
	r.show(r.log)
	return r.log.Proof(i, 0, 2).Encode()
}

// check has the daemon look now. One that is busy with a livepatch has looked
// by itself already.
func (r *logged) check() {
	r.t.Helper()
	r.until("up", func(agent.Status) bool { return true })
	if _, err := local.Dial(r.socket).Check(r.t.Context()); err != nil && fault.KindOf(err) != fault.Conflict {
		r.t.Fatal(err)
	}
}

// confirmOne has livepatch 1 loaded by a klatchd that has so seen the log.
func confirmOne(t *testing.T) *logged {
	r := newLogged(t)
	r.offer(1, r.honest)
	r.start()
	r.check()
	r.until("confirmed", confirmed)
	return r
}

// TestAttack/T: a machine has loaded a livepatch that was logged, and is then
// offered one with something wrong about the log. All else is right. It must
// refuse with that code, load nothing, and keep what it has.
func TestAttack(t *testing.T) {
	for _, tt := range []struct {
		name  string
		state string
		code  fault.Code
		proof func(r *logged, target string, bundle []byte) []byte
	}{
		{"no proof", "check_failed", translog.CodeNoProof, func(*logged, string, []byte) []byte { return nil }},
		{"wrong leaf", "check_failed", translog.CodeNotIncluded, func(r *logged, target string, bundle []byte) []byte {
			return r.honest(target, append([]byte("other "), bundle...))
		}},
		{"wrong index", "check_failed", translog.CodeNotIncluded, func(r *logged, target string, bundle []byte) []byte {
			i := r.log.Add(target, bundle)
			r.show(r.log)
			p := r.log.Proof(i, 0, 1)
			p.Index--
			return p.Encode()
		}},
		{"bad log key", "check_failed", translog.CodeUntrusted, func(r *logged, target string, bundle []byte) []byte {
			evil := r.log.Fork()
			evil.UseKey(logsim.Secret(r.t, "lab/log"))
			return evil.Proof(evil.Add(target, bundle), 0, 1).Encode()
		}},
		{"below quorum", "check_failed", translog.CodeQuorum, func(r *logged, target string, bundle []byte) []byte {
			i := r.log.Add(target, bundle)
			r.show(r.log)
			return r.log.Proof(i, 1).Encode()
		}},
		{"duplicate witness", "check_failed", translog.CodeQuorum, func(r *logged, target string, bundle []byte) []byte {
			i := r.log.Add(target, bundle)
			r.show(r.log)
			return r.log.Proof(i, 1, 1, 1).Encode()
		}},
		{"unknown witness", "check_failed", translog.CodeQuorum, func(r *logged, target string, bundle []byte) []byte {
			i := r.log.Add(target, bundle)
			r.show(r.log)
			stranger := r.log.Fork()
			stranger.Witnesses = logsim.New(r.t, "x", 3).Witnesses // of the same names
			p := r.log.Proof(i, 0)
			p.Checkpoint = stranger.Cosign(p.Checkpoint, 1, 2)
			return p.Encode()
		}},
		{"old checkpoint", "check_failed", translog.CodeRollback, func(r *logged, target string, bundle []byte) []byte {
			proof := r.honest(target, bundle)
			old := r.log.Fork()
			old.Entries = old.Entries[:2] // the server shows the log as it was before livepatch 1
			r.show(old)
			return proof
		}},
		{"inconsistent checkpoint", "halted", translog.CodeInconsistent, func(r *logged, target string, bundle []byte) []byte {
			fork := r.log.Fork()
			fork.Entries[2] = translog.EntryOf("other/c", []byte("livepatch 1 never was"))
			i := fork.Add(target, bundle)
			r.show(fork)
			return fork.Proof(i, 0, 1, 2).Encode()
		}},
		{"size shrink", "check_failed", translog.CodeRollback, func(r *logged, target string, bundle []byte) []byte {
			fork := r.log.Fork()
			fork.Entries = nil
			i := fork.Add(target, bundle)
			r.show(fork)
			return fork.Proof(i, 0, 1, 2).Encode()
		}},
		{"same size with another root", "halted", translog.CodeInconsistent, func(r *logged, target string, bundle []byte) []byte {
			fork := r.log.Fork()
			fork.Entries = fork.Entries[:2]
			i := fork.Add(target, bundle)
			r.show(fork)
			return fork.Proof(i, 0, 1).Encode()
		}},
		{"a smaller history beside the true one", "halted", translog.CodeInconsistent, func(r *logged, target string, bundle []byte) []byte {
			r.log.Add("other/d", []byte("d"))
			r.show(r.log)
			fork := r.log.Fork()
			fork.Entries = fork.Entries[:1]
			return fork.Proof(fork.Add(target, bundle), 1, 2).Encode()
		}},
		{"wrong origin", "check_failed", translog.CodeOrigin, func(r *logged, target string, bundle []byte) []byte {
			other := r.log.Fork()
			other.Origin = "lab/another-log"
			return other.Proof(other.Add(target, bundle), 0, 1).Encode()
		}},
		{"extension lines", "check_failed", translog.CodeMalformed, func(r *logged, target string, bundle []byte) []byte {
			i := r.log.Add(target, bundle)
			r.show(r.log)
			p := r.log.Proof(i)
			p.Checkpoint = r.log.Cosign(r.log.Sign(r.log.Whole().Checkpoint.Body()+"and by the way\n"), 0, 1)
			return p.Encode()
		}},
		{"proof for other bundle", "check_failed", translog.CodeNotIncluded, func(r *logged, target string, bundle []byte) []byte {
			r.log.Add(target, bundle)
			r.show(r.log)
			return r.log.Proof(2, 0, 1).Encode() // that of livepatch 1
		}},
		{"log key rotated", "check_failed", translog.CodeUntrusted, func(r *logged, target string, bundle []byte) []byte {
			proof := r.honest(target, bundle)
			next := logsim.New(r.t, "lab/log-2", 3)
			r.believe(next.Policy(2)) // the retired key signs on
			return proof
		}},
		{"tiles of nobody", "check_failed", translog.CodeTiles, func(r *logged, target string, bundle []byte) []byte {
			proof := r.honest(target, bundle)
			for name, content := range r.log.Files() {
				if strings.Contains(name, "tile/0/") {
					content[0] ^= 1
					r.fleet.Repo.Write(name, content)
				}
			}
			return proof
		}},
	} {
		t.Run("T/"+tt.name, func(t *testing.T) {
			t.Parallel()
			r := confirmOne(t)
			r.offer(2, func(target string, bundle []byte) []byte { return tt.proof(r, target, bundle) })
			r.check()
			s := r.until(tt.state, func(s agent.Status) bool { return s.State.State == tt.state })
			if s.State.Reason != tt.code || s.State.Sequence != 1 || r.machine.Loads() != 1 {
				t.Errorf("state %+v, %d loads; want code %s and livepatch 1", s.State, r.machine.Loads(), tt.code)
			}
			if r.staged() {
				t.Error("livepatch 2 was staged")
			}
		})
	}
}

func (r *logged) staged() bool {
	found, err := filepath.Glob(filepath.Join(r.state, "staged", "klatch_2*"))
	if err != nil {
		r.t.Fatal(err)
	}
	return len(found) > 0
}

// TestAHonestLogIsFollowed: newer checkpoints, older proofs and a log that is
// in use again after a restart are all taken.
func TestAHonestLogIsFollowed(t *testing.T) {
	r := confirmOne(t)
	var late []byte // proof of livepatch 2, made before others were logged
	r.offer(2, func(target string, bundle []byte) []byte {
		late = r.honest(target, bundle)
		for i := range 300 {
			r.log.Add("other/"+strings.Repeat("x", i+1), nil)
		}
		r.show(r.log)
		return late
	})
	r.check()
	r.until("confirmed at 2", func(s agent.Status) bool { return confirmed(s) && s.State.Sequence == 2 })
	r.kill()
	r.start()
	r.offer(3, r.honest)
	r.check()
	r.until("confirmed at 3", func(s agent.Status) bool { return confirmed(s) && s.State.Sequence == 3 })
}

// TestAHaltLastsUntilAPersonHasLooked: not over a restart, not by an honest
// offer; removing the memory ends it.
func TestAHaltLastsUntilAPersonHasLooked(t *testing.T) {
	r := confirmOne(t)
	r.offer(2, func(target string, bundle []byte) []byte {
		fork := r.log.Fork()
		fork.Entries = fork.Entries[:2]
		return fork.Proof(fork.Add(target, bundle), 0, 1).Encode()
	})
	r.check()
	halted := func(s agent.Status) bool { return s.State.State == "halted" }
	r.until("halted", halted)
	r.kill()
	r.start()
	r.offer(3, r.honest)
	r.check()
	s := r.until("halted", halted)
	if s.State.NextStep == "" || r.machine.Loads() != 1 {
		t.Errorf("state %+v, %d loads", s.State, r.machine.Loads())
	}
	file := filepath.Join(r.state, "log.json")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var m struct{ Halt agent.Halt }
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	policy, err := translog.ParsePolicy(r.log.Policy(2))
	if err != nil {
		t.Fatal(err)
	}
	one, err1 := policy.OpenUnwitnessed([]byte(m.Halt.Seen))
	two, err2 := policy.OpenUnwitnessed([]byte(m.Halt.Shown))
	if err1 != nil || err2 != nil || one.Size != two.Size || one.Root == two.Root {
		t.Errorf("the evidence %s: %v, %v", b, err1, err2)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	r.check()
	r.until("confirmed at 3", func(s agent.Status) bool { return confirmed(s) && s.State.Sequence == 3 })
}

// TestAnAnchorWithoutALogAsksForNoProof: as before there was a log.
func TestAnAnchorWithoutALogAsksForNoProof(t *testing.T) {
	r := newLogged(t)
	r.believe("")
	r.offer(1, func(string, []byte) []byte { return nil })
	r.start()
	r.check()
	r.until("confirmed", confirmed)
	if _, err := os.Stat(filepath.Join(r.state, "log.json")); !os.IsNotExist(err) {
		t.Errorf("a memory of a log: %v", err)
	}
}
