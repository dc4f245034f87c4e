// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/testkit/logsim"
	"klatch/internal/translog"
	"klatch/internal/trust"
)

// keepLog makes the world's publisher one that keeps a log; the attacks on it
// are in cmd/klatchd, on the real daemon.
func (w *world) keepLog() *logsim.Log {
	l := logsim.New(w, "lab/log", 0)
	l.Add("other/a", []byte("a"))
	w.reanchor(func(a *trust.Anchor) { a.LogPolicy = l.Policy(0) })
	return l
}

// logged publishes a livepatch with its proof and offers it. The files of the
// log are handed out only by show.
func (w *world) logged(l *logsim.Log, s livepatch.Sequence) {
	m, bundle := w.pub.Livepatch(w.machine.Kernel, s, "CVE-2026-0001")
	i := l.Add(m.TargetPath(), bundle)
	w.pub.Put(m.TargetPath(), bundle)
	w.pub.Put(translog.ProofPath(m.TargetPath()), l.Proof(i).Encode())
	w.server.OfferTarget(m.TargetPath(), s)
}

func (w *world) show(l *logsim.Log) {
	for name, content := range l.Files() {
		w.pub.PutStatic(name, content)
	}
}

func TestWhatIsStagedWaitsInAHalt(t *testing.T) {
	inWorld(t, func(w *world) {
		l := w.keepLog()
		fork := l.Fork()
		w.machine.Set(func(m *agenttest.Machine) {
			m.Refuse = fault.New(fault.Unavailable, "loader_unreachable", "connect: refused")
		})
		w.logged(l, 1)
		w.start()
		w.within(2*time.Minute, "staged")
		w.logged(fork, 2)
		w.within(3*time.Hour, "halted")
		w.machine.Set(func(m *agenttest.Machine) { m.Refuse = nil })
		time.Sleep(12 * time.Hour)
		w.wantState("halted", translog.CodeInconsistent)
		if n := w.machine.Loads(); n != 0 {
			w.Errorf("loaded %d times", n)
		}
		// A person has looked; the honest log is the one that is offered again.
		if err := os.Remove(filepath.Join(w.dir, "log.json")); err != nil {
			w.Fatal(err)
		}
		w.logged(l, 3)
		w.within(3*time.Hour, "confirmed")
	})
}

func TestAServerWithoutTheLogsFilesIsAskedLater(t *testing.T) {
	inWorld(t, func(w *world) {
		l := w.keepLog()
		w.logged(l, 1) // the first look needs none
		w.start()
		w.within(30*time.Minute, "confirmed")
		w.logged(l, 2)
		time.Sleep(6 * time.Hour)
		w.wantState("check_failed", "log_unavailable")
		if s := w.state(); s.Sequence != 1 || s.NextStep == "" {
			w.Errorf("state %+v", s)
		}
		w.show(l)
		time.Sleep(6 * time.Hour)
		if s := w.state(); s.State != "confirmed" || s.Sequence != 2 {
			w.Errorf("state %+v", s)
		}
	})
}

func TestALogMemoryOfAnotherKindIsNotGuessedAt(t *testing.T) {
	for name, content := range map[string]string{
		"not JSON":           "{",
		"another version":    `{"format":"klatch-log-memory/2"}`,
		"another checkpoint": "",
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				l := w.keepLog()
				if content == "" {
					content = `{"format":"klatch-log-memory/1","seen":{"` + l.Key.String() + `":"hello"},"halt":null}`
				}
				if err := os.WriteFile(filepath.Join(w.dir, "log.json"), []byte(content), 0o600); err != nil {
					w.Fatal(err)
				}
				w.logged(l, 1)
				w.start()
				w.within(2*time.Hour, "check_failed")
				w.wantState("check_failed", "state_malformed")
				if n := w.machine.Loads(); n != 0 || !strings.Contains(w.state().NextStep, "remove the file") {
					w.Errorf("loaded %d times, %+v", n, w.state())
				}
			})
		})
	}
}

// TestAPolicyThatPromisesTooLittleIsNotBelieved: profile small with a log that
// asks for no witness.
func TestAPolicyThatPromisesTooLittleIsNotBelieved(t *testing.T) {
	inWorld(t, func(w *world) {
		l := w.keepLog()
		w.reanchor(func(a *trust.Anchor) { a.Profile = "small" })
		w.logged(l, 1)
		w.start()
		w.within(2*time.Hour, "no_anchor")
		w.wantState("no_anchor", translog.CodePolicy)
	})
}

// TestAnotherLogEndsAHalt: the owner has installed an anchor that does not name
// the log any more whose key is in the wrong hands.
func TestAnotherLogEndsAHalt(t *testing.T) {
	inWorld(t, func(w *world) {
		l := w.keepLog()
		fork := l.Fork()
		w.logged(l, 1)
		w.start()
		w.within(30*time.Minute, "confirmed")
		w.logged(fork, 2)
		w.within(3*time.Hour, "halted")
		next := logsim.New(w, "lab/log-2", 0)
		w.reanchor(func(a *trust.Anchor) { a.LogPolicy = next.Policy(0) })
		w.logged(next, 3)
		w.within(3*time.Hour, "soaking")
		w.within(time.Hour, "confirmed")
		if s := w.state(); s.Sequence != 3 {
			w.Errorf("state %+v", s)
		}
	})
}

// TestResumePutsTheLogsMemoryAside: what a person has looked at is kept, and the
// log is believed anew.
func TestResumePutsTheLogsMemoryAside(t *testing.T) {
	inWorld(t, func(w *world) {
		l := w.keepLog()
		fork := l.Fork()
		w.logged(l, 1)
		w.start()
		w.within(30*time.Minute, "confirmed")
		w.logged(fork, 2)
		w.within(3*time.Hour, "halted")
		evidence, err := os.ReadFile(filepath.Join(w.dir, "log.json"))
		if err != nil {
			w.Fatal(err)
		}
		if err := w.agent.Retry(w.Context()); err != nil { // is not enough
			w.Error(err)
		}
		w.wantState("halted", translog.CodeInconsistent)
		w.logged(l, 3)
		w.show(l)
		if err := w.agent.Resume(w.Context()); err != nil {
			w.Fatal(err)
		}
		w.within(3*time.Hour, "confirmed")
		if s := w.state(); s.Sequence != 3 {
			w.Errorf("state %+v", s)
		}
		kept, err := filepath.Glob(filepath.Join(w.dir, "log.json.halt-*"))
		if err != nil || len(kept) != 1 {
			w.Fatalf("kept %v, %v", kept, err)
		}
		if b, err := os.ReadFile(kept[0]); err != nil || string(b) != string(evidence) {
			w.Errorf("the evidence changed: %v\n%s", err, b)
		}
	})
}
