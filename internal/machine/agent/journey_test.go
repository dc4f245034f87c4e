// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/machine/facts"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/rollout"
	"klatch/internal/stall"
	"klatch/internal/trust"
	"klatch/internal/wire"
)

// world is a machine, its publisher and its server, with an agent between.
type world struct {
	*testing.T
	machine *agenttest.Machine
	pub     *agenttest.Publisher
	server  *agenttest.Server
	dir     string
	policy  agent.Policy
	anchor  error // why there is no anchor
	built   time.Time
	without agent.Step // taken out of the order

	operator    *agenttest.Operator // nil: the server chooses
	notOperator error               // why the operator's anchor is not believed
	tier        string
	agent       *agent.Agent
	stop        func()
}

func newWorld(t *testing.T) *world {
	w := &world{
		T: t, machine: agenttest.NewMachine(t), pub: agenttest.NewPublisher(t), server: agenttest.NewServer(),
		dir: t.TempDir(), policy: agent.DefaultPolicy(), stop: func() {},
	}
	w.machine.Anchor = w.pub.Anchor
	w.machine.Transition = 2 * time.Second
	return w
}

// reanchor installs a changed anchor, as a new file: the agent may still hold
// the one before.
func (w *world) reanchor(change func(*trust.Anchor)) {
	w.pub.Set(func(p *agenttest.Publisher) {
		a := *p.Anchor
		a.ModuleKeys = slices.Clone(a.ModuleKeys)
		change(&a)
		p.Anchor = &a
	})
}

// start runs an agent as a start of klatchd does.
func (w *world) start() {
	w.Helper()
	a, err := agent.New(agent.Config{
		Dir: w.dir, Version: "test", Built: w.built, Policy: w.policy,
		Machine: facts.Machine{Root: w.machine.Root},
		Server:  w.server, Repository: w.pub, Loader: w.machine,
		Anchor: func() (a *trust.Anchor, err error) {
			w.pub.Set(func(p *agenttest.Publisher) { a = p.Anchor })
			return a, w.anchor
		},
		Rollout: w.operator, Tier: w.tier,
		Operator: func() (*rollout.Anchor, error) {
			if w.operator == nil {
				return nil, nil
			}
			return w.operator.Anchor, w.notOperator
		},
		Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		w.Fatal(err)
	}
	if w.without != "" {
		a.Without(w.without)
	}
	ctx, cancel := context.WithCancel(w.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx, nil) }()
	w.agent = a
	w.stop = func() {
		cancel()
		if err := <-done; err != nil {
			w.Errorf("run: %v", err)
		}
		w.stop = func() {}
	}
}

// inWorld runs a story in a bubble of fake time.
func inWorld(t *testing.T, story func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		story(w)
		w.stop()
	})
}

func (w *world) state() wire.State {
	w.Helper()
	return w.agent.Status(w.Context()).State
}

func (w *world) wantState(word string, reason fault.Code) {
	w.Helper()
	if s := w.state(); s.State != word || reason != "" && s.Reason != reason {
		w.Errorf("state %s/%s (%s), want %s/%s", s.State, s.Reason, s.Text, word, reason)
	}
}

// within waits until the state is reached, in fake time.
func (w *world) within(limit time.Duration, word string) {
	w.Helper()
	for until := time.Now().Add(limit); ; time.Sleep(time.Second) {
		synctest.Wait()
		if s := w.agent.State(); s.State == word {
			return
		} else if time.Now().After(until) {
			w.Fatalf("after %s the state is %s/%s (%s), want %s", limit, s.State, s.Reason, s.Text, word)
		}
	}
}

func (w *world) wantEvents(want ...wire.Event) {
	w.Helper()
	time.Sleep(3 * time.Hour) // reports are sent again after a failure
	if got := w.server.Events(); !slices.Equal(got, want) {
		w.Errorf("events\n got %v\nwant %v", got, want)
	}
}

// publish offers a livepatch to the machine.
func (w *world) publish(s livepatch.Sequence) {
	w.server.OfferTarget(w.pub.Publish(w.machine.Kernel, s, "CVE-2026-0001"), s)
}

func TestAFixIsOfferedLoadedAndConfirmed(t *testing.T) {
	inWorld(t, func(w *world) {
		w.publish(1)
		w.start()
		w.within(2*time.Minute, "soaking")
		if h := w.state().Highest; h != 0 {
			w.Errorf("highest is %d before the soak is over", h)
		}
		w.within(20*time.Minute, "confirmed")
		s := w.state()
		if s.Sequence != 1 || s.Highest != 1 || len(s.Fixes) != 1 || s.Fixes[0].CVE != "CVE-2026-0001" || s.Phase != wire.Idle {
			w.Errorf("state %+v", s)
		}
		w.wantEvents(wire.EventBooted, wire.EventStaged, wire.EventLoading, wire.EventLoaded, wire.EventConfirmed)
		for _, r := range w.server.Reports() {
			if r.Event == wire.EventLoaded && (r.Took < 2000 || r.Took > 4000) {
				w.Errorf("the transition of two seconds is reported as %d ms", r.Took)
			}
		}

		w.publish(4)
		time.Sleep(3 * time.Hour)
		w.wantState("confirmed", "live_patched")
		if s := w.state(); s.Sequence != 4 || s.Highest != 4 {
			w.Errorf("after the second: %+v", s)
		}
		lps, err := facts.Machine{Root: w.machine.Root}.Livepatches()
		if err != nil || len(lps) != 1 || lps[0].Name != "klatch_4" {
			w.Errorf("in the kernel: %v, %v", lps, err)
		}
	})
}

func TestAStalledTransitionIsCanceledAndTriedAgain(t *testing.T) {
	inWorld(t, func(w *world) {
		w.machine.Set(func(m *agenttest.Machine) { m.Never = true })
		w.machine.Set(func(m *agenttest.Machine) {
			m.Blocking = []loaderapi.Blocker{
				{PID: 8, TID: 9, Stat: "9 (cat) S 1 8 8 0 -1 4194304", Stack: []string{"[<0>] wait_for_partner+0x1/0x2", "[<0>] fifo_open+0x1/0x2"}},
				{PID: 7, TID: 7, Stat: "7 (kworker/0:1) S 2 0 0 0 -1 2129984", Stack: []string{"[<0>] worker_thread+0x1/0x2"}},
			}
		})
		w.publish(1)
		w.start()
		w.within(5*time.Minute, "stalled")
		if s := w.state(); s.Sequence != 0 || !strings.Contains(s.Text, `kernel thread 7 ("kworker/0:1", state S) in worker_thread`) {
			w.Errorf("state %+v", s)
		}
		w.wantState("stalled", "kernel_thread")
		status := w.agent.Status(w.Context())
		if len(status.Blocking) != 2 || status.Blocking[0].Class != stall.KernelThread || status.Blocking[1].Name != "cat" ||
			status.Blocking[1].Class != stall.Unreliable || !strings.Contains(status.State.NextStep, "reboot into a corrected kernel") {
			w.Errorf("status %+v, next step %s", status.Blocking, status.State.NextStep)
		}
		w.machine.Set(func(m *agenttest.Machine) { m.Never = false })
		w.within(20*time.Minute, "soaking")
		w.within(20*time.Minute, "confirmed")
		w.wantEvents(wire.EventBooted, wire.EventStaged, wire.EventLoading, wire.EventStalled,
			wire.EventLoading, wire.EventLoaded, wire.EventConfirmed)
	})
}

func TestANewerOfferSupersedesAStalledOne(t *testing.T) {
	inWorld(t, func(w *world) {
		w.policy.StallRetry = 6 * time.Hour
		w.machine.Set(func(m *agenttest.Machine) { m.Never = true })
		w.publish(1)
		w.start()
		w.within(5*time.Minute, "stalled")
		w.machine.Set(func(m *agenttest.Machine) { m.Never = false })
		w.publish(2)
		w.within(3*time.Hour, "confirmed")
		if s := w.state(); s.Highest != 2 {
			w.Errorf("state %+v", s)
		}
	})
}

func TestTroubleDuringTheSoakMakesItSuspect(t *testing.T) {
	inWorld(t, func(w *world) {
		w.publish(1)
		w.start()
		w.within(2*time.Minute, "soaking")
		w.machine.Write("sys/kernel/warn_count", "1\n")
		w.within(time.Minute, "suspect")
		s := w.state()
		if s.Sequence != 1 || s.Highest != 0 || s.Advice != "required" {
			w.Errorf("it must stay loaded, unconfirmed: %+v", s)
		}
		time.Sleep(5 * time.Hour)
		w.wantState("suspect", "kernel_trouble")
		if n := w.machine.Loads(); n != 1 {
			w.Errorf("loaded %d times", n)
		}
		w.publish(2)
		time.Sleep(3 * time.Hour)
		w.wantState("confirmed", "")
	})
}

func TestARefusedLivepatchIsNotTriedAgain(t *testing.T) {
	inWorld(t, func(w *world) {
		w.machine.Set(func(m *agenttest.Machine) {
			m.Refuse = fault.New(fault.Untrusted, "key_rejected", "load module klatch_1: key not trusted by this kernel")
		})
		w.publish(1)
		w.start()
		w.within(2*time.Minute, "failed")
		w.wantState("failed", "key_rejected")
		w.machine.Set(func(m *agenttest.Machine) { m.Refuse = nil })
		time.Sleep(5 * time.Hour)
		w.wantState("failed", "key_rejected")
		if w.machine.Loads() != 0 {
			w.Error("tried again by itself")
		}
		if err := w.agent.Retry(w.Context()); err != nil {
			w.Fatal(err)
		}
		w.within(20*time.Minute, "confirmed")
		w.wantEvents(wire.EventBooted, wire.EventStaged, wire.EventLoading, wire.EventFailed,
			wire.EventStaged, wire.EventLoading, wire.EventLoaded, wire.EventConfirmed)
	})
}

func TestANewerOfferEndsAFailure(t *testing.T) {
	inWorld(t, func(w *world) {
		w.machine.Set(func(m *agenttest.Machine) {
			m.Refuse = fault.New(fault.Invalid, "module_refused", "load module klatch_1: exec format error")
		})
		w.publish(1)
		w.start()
		w.within(2*time.Minute, "failed")
		w.machine.Set(func(m *agenttest.Machine) { m.Refuse = nil })
		w.publish(2)
		w.within(3*time.Hour, "confirmed")
	})
}

func TestALoaderThatIsAwayIsWaitedFor(t *testing.T) {
	for _, tt := range []struct {
		name string
		away func(*agenttest.Machine)
	}{
		{"it says try later", func(m *agenttest.Machine) {
			m.Refuse = fault.New(fault.Unavailable, "loader_unreachable", "connect: refused")
		}},
		{"it died before it answered", func(m *agenttest.Machine) { m.Refuse = os.ErrDeadlineExceeded }},
		{"another transition runs", func(m *agenttest.Machine) {
			m.Refuse = fault.New(fault.Conflict, "transition_running", "the transition of other has not finished")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				tt.away(w.machine)
				w.publish(1)
				w.start()
				w.within(2*time.Minute, "staged")
				time.Sleep(20 * time.Minute)
				w.wantState("staged", "")
				w.machine.Set(func(m *agenttest.Machine) { m.Refuse = nil })
				w.within(3*time.Hour, "confirmed")
			})
		})
	}
	t.Run("it loaded and the answer was lost", func(t *testing.T) {
		inWorld(t, func(w *world) {
			w.machine.Set(func(m *agenttest.Machine) { m.Drop = true })
			w.publish(1)
			w.start()
			w.within(20*time.Minute, "confirmed")
			if n := w.machine.Loads(); n != 1 {
				w.Errorf("loaded %d times", n)
			}
		})
	})
}

func TestBoots(t *testing.T) {
	const soaking = 5 * time.Minute
	for _, tt := range []struct {
		name  string
		story func(w *world)
	}{
		{"a confirmed livepatch comes back, soaks and is confirmed again", func(w *world) {
			w.within(20*time.Minute, "confirmed")
			w.stop()
			w.machine.Reboot("boot-2")
			w.start()
			w.within(30*time.Second, "soaking")
			w.within(5*time.Minute, "confirmed")
			w.machine.Change(func(s *loaderapi.Status) {
				if s.Attempt != nil {
					w.Error("the breaker still counts this boot")
				}
			})
		}},
		{"it comes back although the server is away", func(w *world) {
			w.within(20*time.Minute, "confirmed")
			w.stop()
			w.server.Set(func(s *agenttest.Server) { s.Fail = fault.New(fault.Unavailable, "server_unavailable", "no route") })
			w.machine.Reboot("boot-2")
			w.start()
			w.within(5*time.Minute, "confirmed")
		}},
		{"a second quick reboot does not count against it", func(w *world) {
			w.within(20*time.Minute, "confirmed")
			w.stop()
			w.machine.Reboot("boot-2")
			w.start()
			w.within(30*time.Second, "soaking")
			w.stop()
			w.machine.Change(func(s *loaderapi.Status) {
				if s.Attempt != nil {
					w.Error("the orderly stop did not confirm it")
				}
			})
			w.start()
			w.within(time.Minute, "confirmed")
		}},
		{"an orderly reboot during the soak loads it again", func(w *world) {
			w.within(soaking, "soaking")
			w.stop()
			w.machine.Reboot("boot-2")
			w.start()
			w.within(20*time.Minute, "confirmed")
			if n := w.machine.Loads(); n != 2 {
				w.Errorf("loaded %d times", n)
			}
		}},
		{"a crash during the soak does not", func(w *world) {
			w.within(soaking, "soaking")
			w.crash()
			w.machine.Reboot("boot-2")
			w.start()
			w.within(time.Minute, "failed")
			w.wantState("failed", "died")
			time.Sleep(5 * time.Hour)
			if n := w.machine.Loads(); n != 1 {
				w.Errorf("loaded %d times", n)
			}
		}},
		{"after the breaker was cleared it is confirmed again", func(w *world) {
			w.within(20*time.Minute, "confirmed")
			w.stop()
			w.machine.Reboot("boot-2")
			w.start()
			w.within(30*time.Second, "soaking")
			w.crash()
			w.machine.Reboot("boot-3")
			w.machine.Change(func(s *loaderapi.Status) {
				s.Loaded, s.Attempt, s.Boot.Outcome = nil, nil, "off_breaker"
			})
			w.machine.Tick()
			w.start()
			w.within(time.Minute, "boot_stopped")
			w.wantState("boot_stopped", "off_breaker")
			w.stop()
			w.machine.Reboot("boot-4")
			w.start()
			w.within(30*time.Second, "soaking")
			w.within(5*time.Minute, "confirmed")
			w.machine.Change(func(s *loaderapi.Status) {
				if s.Attempt != nil {
					w.Error("nobody confirms it, and the breaker counts this boot")
				}
			})
		}},
		{"another kernel drops what was staged", func(w *world) {
			w.machine.Set(func(m *agenttest.Machine) {
				m.Refuse = fault.New(fault.Unavailable, "loader_unreachable", "connect: refused")
			})
			w.within(soaking, "staged")
			w.stop()
			w.machine.Set(func(m *agenttest.Machine) { m.Refuse = nil })
			w.server.Set(func(s *agenttest.Server) { s.Offer = nil; s.Reason = "no_livepatch" })
			w.machine.Reboot("boot-2")
			w.machine.Write("sys/kernel/notes", "\x04\x00\x00\x00\x14\x00\x00\x00\x03\x00\x00\x00GNU\x00"+strings.Repeat("x", 20))
			w.start()
			w.within(5*time.Minute, "no_livepatch")
			if n := w.machine.Loads(); n != 0 {
				w.Errorf("loaded %d times", n)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.publish(1)
				w.start()
				tt.story(w)
			})
		})
	}
}

// crash stops the agent as a lost machine does: without its last word.
func (w *world) crash() {
	w.Helper()
	path := filepath.Join(w.dir, "journal.json")
	before, err := os.ReadFile(path)
	if err != nil {
		w.Fatal(err)
	}
	w.stop()
	if err := os.WriteFile(path, before, 0o600); err != nil {
		w.Fatal(err)
	}
}

func TestTakenOutByHandStaysOutUntilTheReboot(t *testing.T) {
	inWorld(t, func(w *world) {
		w.publish(1)
		w.start()
		w.within(20*time.Minute, "confirmed")
		w.machine.TakeOut()
		w.wantState("disabled", "until_reboot")
		w.publish(2)
		time.Sleep(5 * time.Hour)
		w.wantState("disabled", "until_reboot")
		if s := w.state(); s.Advice != "required" || s.Sequence != 0 {
			w.Errorf("state %+v", s)
		}
		w.stop()
		w.machine.Reboot("boot-2")
		w.start()
		time.Sleep(3 * time.Hour)
		if s := w.state(); s.State != "confirmed" || s.Sequence != 2 {
			w.Errorf("state %+v", s)
		}
	})
}
