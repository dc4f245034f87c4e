// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"slices"
	"testing"
	"time"

	"klatch/internal/evidence"
	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/testkit/logsim"
	"klatch/internal/translog"
	"klatch/internal/trust"
	"klatch/internal/wire"
)

// attack is something that one step of the order must refuse. Livepatch 3 is
// confirmed, and the attack offers another one; evil may stop and start the
// agent.
type attack struct {
	name  string
	step  agent.Step
	class agent.Class
	code  fault.Code
	// alone says that no other check refuses it: without the step it is staged.
	alone bool
	evil  func(w *world)
}

// behind makes the program younger than the clock.
func behind(w *world) {
	w.publish(5)
	w.stop()
	w.built = time.Now().Add(100 * 24 * time.Hour)
	w.start()
}

func attacks() []attack {
	return []attack{
		{"L/root's record is older than what was seen of it", agent.StepMemory, agent.Stop, "memory_back", true, func(w *world) {
			w.publish(5)
			w.machine.Change(func(s *loaderapi.Status) { s.Highest = 1 })
		}},
		{"L/clock before the build of the program", agent.StepClock, agent.Stay, "clock_back", true, behind},
		{"L/metadata that was signed after the clock says", agent.StepMetadata, agent.Stay, "clock_back", false, func(w *world) {
			w.publish(5)
			w.pub.Set(func(p *agenttest.Publisher) { p.SignedAt = time.Now().Add(24 * time.Hour) })
		}},
		{"R/recalled by its publisher", agent.StepForward, agent.Quarantine, "recalled", true, func(w *world) {
			w.publish(5)
			w.pub.Recall(recalls(w, 1))
		}},
		{"R/recalled, and only the policy says so", agent.StepPolicy, agent.Quarantine, "recalled", true, func(w *world) {
			w.publish(5)
			w.pub.Recall(recalls(w, 1))
		}},
		{"R/floor lowered", agent.StepPolicy, agent.Stop, "recalls_rollback", true, func(w *world) {
			r := recalls(w, 4)
			r.Floors = []livepatch.Floor{{Kernel: w.machine.Kernel.ID, Sequence: 5}}
			w.pub.Recall(r)
			time.Sleep(2 * time.Hour)
			r.Version, r.Floors = 5, []livepatch.Floor{}
			w.pub.Recall(r)
			w.publish(6)
		}},
		{"R/recalls taken out of the list", agent.StepPolicy, agent.Stop, "recalls_rollback", true, func(w *world) {
			w.pub.Recall(recalls(w, 4))
			time.Sleep(2 * time.Hour)
			w.pub.Withdraw(livepatch.RecallsPath(4))
			w.publish(6)
		}},
		{"R/level lower", agent.StepForward, agent.Quarantine, "sequence_lower", true, func(w *world) { w.publish(2) }},
		{"R/wrong build-id", agent.StepKernel, agent.Quarantine, "wrong_build", true, func(w *world) {
			k := w.machine.Kernel
			k.ID[0] ^= 1
			w.server.OfferTarget(w.pub.Publish(k, 5), 5)
		}},
		{"R/wrong release", agent.StepKernel, agent.Quarantine, "wrong_release", true, func(w *world) {
			k := w.machine.Kernel
			k.Release = "6.1.0-51-cloud-amd64"
			w.server.OfferTarget(w.pub.Publish(k, 5), 5)
		}},
		{"K/a neighbor's bundle under this kernel's name", agent.StepKernel, agent.Quarantine, "wrong_build", true, func(w *world) {
			k := w.machine.Kernel
			k.Release, k.ID[0] = "6.1.0-51-cloud-amd64", k.ID[0]^1
			_, b := w.pub.Livepatch(k, 5)
			m, _ := w.pub.Livepatch(w.machine.Kernel, 5)
			w.pub.Put(m.TargetPath(), b)
			w.server.OfferTarget(m.TargetPath(), 5)
		}},
		{"K/module that is not the manifest's", agent.StepModule, agent.Quarantine, "module_digest", true, func(w *world) {
			m, b := w.pub.Livepatch(w.machine.Kernel, 5)
			b[len(b)-1] ^= 1
			w.pub.Put(m.TargetPath(), b)
			w.server.OfferTarget(m.TargetPath(), 5)
		}},
		{"K/manifest of another publisher", agent.StepBundle, agent.Quarantine, "manifest_untrusted", false, func(w *world) {
			m, b := agenttest.NewPublisher(w).Livepatch(w.machine.Kernel, 5)
			w.pub.Put(m.TargetPath(), b)
			w.server.OfferTarget(m.TargetPath(), 5)
		}},
		{"K/target that is in no signed list", agent.StepDownload, agent.Stay, "target_missing", false, func(w *world) {
			m, _ := w.pub.Livepatch(w.machine.Kernel, 5)
			w.server.OfferTarget(m.TargetPath(), 5)
		}},
		{"T/not in the log", agent.StepLog, agent.Quarantine, translog.CodeNoProof, true, func(w *world) {
			w.keepLog()
			w.publish(5)
		}},
		{"A/no evidence, and its publisher has a policy", agent.StepEvidence, agent.Quarantine, "no_evidence", true, func(w *world) {
			w.publish(5)
			w.askEvidence()
		}},
		{"A/a policy that nobody can read", agent.StepEvidence, agent.Stay, "policy_malformed", true, func(w *world) {
			w.publish(5)
			w.pub.Put("policy/evidence.1.json", []byte("{}\n"))
		}},
		{"T/a log that the server cuts", agent.StepLog, agent.Stay, translog.CodeRollback, false, func(w *world) {
			l := w.keepLog()
			old := l.Fork()
			w.logged(l, 4)
			w.show(l)
			w.within(3*time.Hour, "soaking")
			w.within(time.Hour, "confirmed")
			w.logged(l, 5)
			w.show(old)
		}},
	}
}

// TestAttack is the agent's part of the attack catalog: what each step refuses,
// what that means, and that what runs goes on running.
func TestAttack(t *testing.T) {
	for _, tt := range attacks() {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			inWorld(t, func(w *world) {
				before := w.running(3)
				tt.evil(w)
				time.Sleep(5 * time.Hour)
				s := w.agent.Status(w.Context())
				c := s.Check
				// A later step may be the first that sees it; what it is called does not change.
				if s.State.Reason != tt.code || c.Class != tt.class || s.State.Class != string(tt.class) || s.State.Step != string(c.Step) {
					w.Errorf("%s/%s (%s): step %q, class %q; want code %s and class %s", s.State.State, s.State.Reason, s.State.Text, c.Step, c.Class, tt.code, tt.class)
				}
				if w.stagedSince(before) {
					w.Error("it was staged")
				}
				if s.State.Sequence < 3 || s.State.NextStep == "" || !s.Act {
					w.Errorf("state %+v", s.State)
				}
				w.toldOnce(before, tt.code, tt.class)
				w.remembered(s, tt)
			})
		})
	}
}

// askEvidence publishes a policy: from now on livepatches need evidence.
func (w *world) askEvidence() {
	w.Helper()
	p := evidence.DefaultPolicy(trust.Lab, evidence.BaseScenarios)
	for _, role := range []evidence.Role{evidence.Builder, evidence.Tester, evidence.Reviewer, evidence.Analyst} {
		key, err := evidence.NewKey(string(role), role)
		if err != nil {
			w.Fatal(err)
		}
		p.Signers = append(p.Signers, key.Signer())
	}
	b, err := p.Encode()
	if err != nil {
		w.Fatal(err)
	}
	w.pub.Put(p.TargetPath(), b)
}

// remembered says that a class has the effect that it promises.
func (w *world) remembered(s agent.Status, tt attack) {
	w.Helper()
	switch tt.class {
	case agent.Stop:
		if s.State.State != "halted" || s.Halt == nil || s.Halt.Code != tt.code {
			w.Errorf("halt %+v in state %s", s.Halt, s.State.State)
		}
	case agent.Quarantine:
		if len(s.Quarantine) != 1 || s.Quarantine[0].Code != tt.code {
			w.Errorf("quarantine %+v", s.Quarantine)
		}
		target := s.Quarantine[0].Target
		n := w.pub.Fetches(target)
		time.Sleep(5 * time.Hour)
		if again := w.pub.Fetches(target); again != n || n > 1 {
			w.Errorf("fetched %d times, then %d", n, again)
		}
	default:
		if len(s.Quarantine) != 0 || s.Halt != nil {
			w.Errorf("quarantine %+v, halt %+v", s.Quarantine, s.Halt)
		}
	}
}

// TestEachStepIsNeeded takes one step out of the order at a time: what it alone
// refuses must then be staged. Otherwise the attack above proves nothing.
func TestEachStepIsNeeded(t *testing.T) {
	needed := map[agent.Step]bool{}
	for _, tt := range attacks() {
		if !tt.alone {
			continue
		}
		needed[tt.step] = true
		t.Run(string(tt.step)+"/"+tt.name, func(t *testing.T) {
			t.Parallel()
			inWorld(t, func(w *world) {
				w.without = tt.step
				before := w.running(3)
				tt.evil(w)
				time.Sleep(5 * time.Hour)
				if !w.stagedSince(before) {
					s := w.state()
					w.Errorf("without step %s something else refuses it: %s/%s (%s)", tt.step, s.State, s.Reason, s.Text)
				}
			})
		})
	}
	for _, s := range []agent.Step{agent.StepMemory, agent.StepClock, agent.StepPolicy, agent.StepForward, agent.StepKernel, agent.StepModule, agent.StepLog, agent.StepEvidence} {
		if !needed[s] {
			t.Errorf("no attack needs step %s", s)
		}
	}
}

// running has a livepatch confirmed and counts the events of that.
func (w *world) running(s livepatch.Sequence) (events int) {
	w.Helper()
	w.publish(s)
	w.start()
	w.within(20*time.Minute, "confirmed")
	time.Sleep(time.Minute)
	return len(w.server.Reports())
}

// stagedSince says whether the attack's livepatch was staged; 3 and 4 are honest.
func (w *world) stagedSince(before int) bool {
	return slices.ContainsFunc(w.server.Reports()[before:], func(r wire.Report) bool {
		return r.Event == wire.EventStaged && r.Sequence != 3 && r.Sequence != 4
	})
}

// toldOnce: the server hears of a refusal once, with its class.
func (w *world) toldOnce(before int, code fault.Code, class agent.Class) {
	w.Helper()
	n := 0
	for _, r := range w.server.Reports()[before:] {
		if r.Event == wire.EventRefused && r.Code == code {
			n++
			if r.State.Class != string(class) || r.State.Step == "" {
				w.Errorf("told with class %q at step %q", r.State.Class, r.State.Step)
			}
		}
	}
	if n != 1 {
		w.Errorf("told %d times", n)
	}
}

// TestQuarantineEnds: by other bytes under the same name, by another proof, by a
// person, by another anchor; not by time.
func TestQuarantineEnds(t *testing.T) {
	for name, free := range map[string]func(w *world, l *logsim.Log, target string, bundle []byte){
		"a proof that is right": func(w *world, l *logsim.Log, target string, bundle []byte) {
			w.pub.Put(translog.ProofPath(target), l.Proof(l.Add(target, bundle)).Encode())
		},
		"a person": func(w *world, l *logsim.Log, target string, bundle []byte) {
			i := l.Add(target, bundle)
			w.show(l)
			_ = i
			w.reanchor(func(a *trust.Anchor) { a.LogPolicy = "" })
			if err := w.agent.Retry(w.Context()); err != nil {
				w.Error(err)
			}
		},
		"another anchor": func(w *world, _ *logsim.Log, _ string, _ []byte) {
			w.reanchor(func(a *trust.Anchor) { a.LogPolicy = "" })
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.running(3)
				l := w.keepLog()
				m, bundle := w.pub.Livepatch(w.machine.Kernel, 5, "CVE-2026-0001")
				w.pub.Put(m.TargetPath(), bundle)
				w.pub.Put(translog.ProofPath(m.TargetPath()), l.Proof(0).Encode()) // of another file
				w.server.OfferTarget(m.TargetPath(), 5)
				w.within(3*time.Hour, "check_failed")
				if s := w.agent.Status(w.Context()); len(s.Quarantine) != 1 || s.Quarantine[0].Step != agent.StepLog {
					w.Fatalf("quarantine %+v", s.Quarantine)
				}
				w.stop()
				w.start() // it is on disk
				time.Sleep(3 * time.Hour)
				if n := w.pub.Fetches(m.TargetPath()); n != 1 {
					w.Errorf("fetched %d times", n)
				}
				free(w, l, m.TargetPath(), bundle)
				w.within(3*time.Hour, "soaking")
				if s := w.agent.Status(w.Context()); len(s.Quarantine) != 0 {
					w.Errorf("quarantine %+v", s.Quarantine)
				}
			})
		})
	}
}

// TestAHaltEnds: by a person, or by a newer signed policy, and then at once.
func TestAHaltEnds(t *testing.T) {
	for name, end := range map[string]func(w *world){
		"a person": func(w *world) {
			w.pub.Recall(recalls(w, 4))
			if err := w.agent.Resume(w.Context()); err != nil {
				w.Error(err)
			}
			if err := w.agent.Resume(w.Context()); fault.CodeOf(err) != "not_halted" {
				w.Errorf("twice: %v", err)
			}
		},
		"another anchor": func(w *world) {
			w.reanchor(func(a *trust.Anchor) { a.LogPolicy = logsim.New(w, "lab/log", 0).Policy(0) })
			w.pub.Recall(recalls(w, 4))
			w.reanchor(func(a *trust.Anchor) { a.LogPolicy = "" })
			w.reanchor(func(a *trust.Anchor) { a.ModuleKeys[0].Name = "another" })
		},
		"higher recalls": func(w *world) { w.pub.Recall(recalls(w, 7)) },
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.running(3)
				w.pub.Recall(recalls(w, 4))
				time.Sleep(2 * time.Hour)
				w.pub.Withdraw(livepatch.RecallsPath(4))
				w.publish(6)
				w.within(3*time.Hour, "halted")
				w.stop()
				w.start() // it is on disk
				time.Sleep(5 * time.Hour)
				w.wantState("halted", "recalls_rollback")
				if n := w.machine.Loads(); n != 1 {
					w.Errorf("loaded %d times", n)
				}
				end(w)
				w.within(3*time.Hour, "confirmed")
				if s := w.state(); s.Sequence != 6 || s.Class != "" {
					w.Errorf("state %+v", s)
				}
			})
		})
	}
}
