// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/translog"
	"klatch/internal/trust"
	"klatch/internal/wire"
)

// TestAttackOnWhatIsStaged: days may pass between staging and loading. What is
// loaded is what was checked, by what counts at that moment.
func TestAttackOnWhatIsStaged(t *testing.T) {
	for _, tt := range []struct {
		name string
		code fault.Code
		evil func(w *world)
	}{
		{"L/staged module swapped for another that is signed", "module_digest", func(w *world) {
			_, other := w.pub.Livepatch(w.machine.Kernel, 6)
			b, err := livepatch.ParseBundle(other)
			if err != nil {
				w.Fatal(err)
			}
			w.write("staged/klatch_5.ko", b.Module)
		}},
		{"L/staged manifest swapped for another that is signed", "wrong_target", func(w *world) {
			_, other := w.pub.Livepatch(w.machine.Kernel, 6)
			b, err := livepatch.ParseBundle(other)
			if err != nil {
				w.Fatal(err)
			}
			w.write("staged/klatch_5.manifest", b.Manifest)
			w.write("staged/klatch_5.ko", b.Module)
		}},
		{"L/symbolic link in the staged files", "staged_damaged", func(w *world) {
			path := filepath.Join(w.dir, "staged/klatch_5.ko")
			if err := os.Rename(path, path+".real"); err != nil {
				w.Fatal(err)
			}
			if err := os.Symlink(path+".real", path); err != nil {
				w.Fatal(err)
			}
		}},
		{"L/FIFO in the staged files", "staged_damaged", func(w *world) { w.fifo("staged/klatch_5.ko") }},
		{"L/staged file deleted", "staged_damaged", func(w *world) {
			if err := os.Remove(filepath.Join(w.dir, "staged/klatch_5.manifest")); err != nil {
				w.Fatal(err)
			}
		}},
		{"R/recalled after it was staged", "recalled", func(w *world) { w.pub.Recall(recalls(w, 1)) }},
		{"R/another anchor after it was staged", "manifest_untrusted", func(w *world) {
			w.reanchor(func(a *trust.Anchor) { a.Manifest = agenttest.NewPublisher(w).Anchor.Manifest })
		}},
		{"T/log policy after it was staged", translog.CodeNoProof, func(w *world) { w.keepLog() }},
		{"L/off line until the list was long dead", "list_expired", func(w *world) {
			w.server.Set(func(s *agenttest.Server) { s.Fail = fault.New(fault.Unavailable, "server_unavailable", "no route") })
			time.Sleep(3 * 24 * time.Hour)
			w.server.Set(func(s *agenttest.Server) { s.Fail = nil })
		}},
		{"L/root's record went on meanwhile", "sequence_lower", func(w *world) {
			w.machine.Change(func(s *loaderapi.Status) { s.Highest = 9 })
		}},
	} {
		t.Run("Attack/"+tt.name, func(t *testing.T) {
			t.Parallel()
			inWorld(t, func(w *world) {
				before := w.running(3)
				w.machine.Set(func(m *agenttest.Machine) {
					m.Refuse = fault.New(fault.Unavailable, "loader_unreachable", "connect: refused")
				})
				w.publish(5)
				w.pub.Set(func(p *agenttest.Publisher) { p.Until = time.Now().Add(-88 * 24 * time.Hour) })
				w.within(3*time.Hour, "staged")
				tt.evil(w)
				w.server.Set(func(s *agenttest.Server) { s.Offer = nil })
				time.Sleep(2 * time.Hour) // a check
				w.machine.Set(func(m *agenttest.Machine) { m.Refuse = nil })
				time.Sleep(5 * time.Hour)
				s := w.state()
				if s.Sequence != 3 || s.Phase != wire.Idle || w.machine.Loads() != 1 {
					w.Errorf("state %+v, %d loads", s, w.machine.Loads())
				}
				if !slices.ContainsFunc(w.server.Reports()[before:], func(r wire.Report) bool {
					return r.Event == wire.EventRefused && r.Sequence == 5 && r.Code == tt.code
				}) {
					w.Errorf("told %+v", w.server.Reports()[before:])
				}
				if left, err := filepath.Glob(filepath.Join(w.dir, "staged", "klatch_5.*")); err != nil || len(left) > 0 {
					w.Errorf("left behind: %v, %v", left, err)
				}
			})
		})
	}
}

// TestAttackOnTheMemory: what this machine remembers is lost, old or damaged.
func TestAttackOnTheMemory(t *testing.T) {
	journal := func(w *world) string { return filepath.Join(w.dir, "journal.json") }
	t.Run("Attack/L/two agents", func(t *testing.T) {
		inWorld(t, func(w *world) {
			w.running(3)
			if _, err := agent.New(agent.Config{Dir: w.dir}); fault.CodeOf(err) != "locked" {
				w.Errorf("the second one: %v", err)
			}
		})
	})
	t.Run("Attack/L/state file deleted", func(t *testing.T) {
		inWorld(t, func(w *world) {
			w.running(3)
			w.stop()
			if err := os.Remove(journal(w)); err != nil {
				w.Fatal(err)
			}
			w.publish(2) // an old world offers itself
			w.start()
			time.Sleep(5 * time.Hour)
			if s := w.state(); s.Sequence != 3 || s.Highest != 3 || s.Reason != "sequence_lower" || w.machine.Loads() != 1 {
				w.Errorf("state %+v, %d loads", s, w.machine.Loads())
			}
		})
	})
	t.Run("Attack/L/state file older", func(t *testing.T) {
		inWorld(t, func(w *world) {
			w.publish(2)
			w.start()
			w.within(5*time.Minute, "soaking")
			old, err := os.ReadFile(journal(w))
			if err != nil {
				w.Fatal(err)
			}
			w.within(time.Hour, "confirmed")
			w.publish(3)
			time.Sleep(3 * time.Hour)
			w.wantState("confirmed", "")
			w.stop()
			w.write("journal.json", old)
			w.start()
			time.Sleep(5 * time.Hour)
			if s := w.state(); s.Sequence != 3 || s.Highest != 3 || w.machine.Loads() != 2 {
				w.Errorf("state %+v, %d loads", s, w.machine.Loads())
			}
		})
	})
	t.Run("Attack/L/state file corrupt", func(t *testing.T) {
		inWorld(t, func(w *world) {
			w.running(3)
			w.stop()
			for name, spoil := range map[string]string{
				"cut": `{"format":"klatch-journal/1","phase":"id`, "phase": `{"format":"klatch-journal/1","phase":"nowhere"}`,
				"floor": `{"format":"klatch-journal/1","phase":"idle","time_floor":{"time":"soon"}}`, "empty": "",
			} {
				w.write("journal.json", []byte(spoil))
				if _, err := agent.New(agent.Config{Dir: w.dir}); fault.CodeOf(err) != "journal_malformed" || fault.HintOf(err) == "" {
					w.Errorf("%s: %v", name, err)
				}
			}
		})
	})
	t.Run("Attack/L/clock far ahead leaves no trace", func(t *testing.T) {
		inWorld(t, func(w *world) {
			w.pub.Set(func(p *agenttest.Publisher) { p.SignedAt = time.Now() })
			w.running(3)
			time.Sleep(40 * time.Hour) // the clock runs away, and the metadata is good all the same
			if s := w.agent.Status(w.Context()); s.Floor == nil || s.Floor.From != "metadata" || time.Since(s.Floor.Time) < 39*time.Hour {
				w.Errorf("floor %+v at %s", s.Floor, time.Now())
			}
		})
	})
}

// TestAJournalOfBefore: what an older version wrote is read, and goes on.
func TestAJournalOfBefore(t *testing.T) {
	inWorld(t, func(w *world) {
		w.machine.Set(func(m *agenttest.Machine) {
			m.Refuse = fault.New(fault.Unavailable, "loader_unreachable", "connect: refused")
		})
		w.publish(1)
		w.start()
		w.within(5*time.Minute, "staged")
		w.stop()
		b, err := os.ReadFile(filepath.Join(w.dir, "journal.json"))
		if err != nil {
			w.Fatal(err)
		}
		var j map[string]any
		if err := json.Unmarshal(b, &j); err != nil {
			w.Fatal(err)
		}
		for _, later := range []string{"quarantine", "halt", "time_floor", "peak"} {
			delete(j, later)
		}
		delete(j["work"].(map[string]any), "sha256")
		if b, err = json.Marshal(j); err != nil || strings.Contains(string(b), "peak") {
			w.Fatal(err)
		}
		w.write("journal.json", b)
		w.machine.Set(func(m *agenttest.Machine) { m.Refuse = nil })
		w.start()
		w.within(3*time.Hour, "confirmed")
	})
}

func (w *world) fifo(name string) {
	w.Helper()
	path := filepath.Join(w.dir, name)
	if err := errors.Join(os.Remove(path), syscall.Mkfifo(path, 0o600)); err != nil {
		w.Fatal(err)
	}
}

func (w *world) write(name string, b []byte) {
	w.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, name), b, 0o600); err != nil {
		w.Fatal(err)
	}
}
