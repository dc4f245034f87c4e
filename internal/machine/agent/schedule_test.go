// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"klatch/internal/fault"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/wire"
)

func TestChecksComeAtTheirIntervalWithJitter(t *testing.T) {
	inWorld(t, func(w *world) {
		begin := time.Now()
		w.start()
		time.Sleep(48 * time.Hour)
		checks := w.server.Checks()
		if first := checks[0].Sub(begin); first > 30*time.Second {
			w.Errorf("the first check came after %s", first)
		}
		if n := len(checks); n < 45 || n > 53 {
			w.Errorf("%d checks in two days", n)
		}
		gaps := map[time.Duration]bool{}
		for i := range checks[1:] {
			gap := checks[i+1].Sub(checks[i])
			if gap < 54*time.Minute || gap > 66*time.Minute+time.Second {
				w.Errorf("gap of %s", gap)
			}
			gaps[gap] = true
		}
		if len(gaps) < 10 {
			w.Errorf("only %d different gaps: no jitter", len(gaps))
		}
	})
}

func TestAnIntervalOfZeroChecksOnlyOnDemand(t *testing.T) {
	inWorld(t, func(w *world) {
		w.policy.CheckInterval = 0
		w.publish(1)
		w.start()
		time.Sleep(48 * time.Hour)
		if n := len(w.server.Checks()); n != 0 {
			w.Errorf("%d checks", n)
		}
		w.wantState("idle_current", "not_checked")
		if err := w.agent.CheckNow(w.Context()); err != nil {
			w.Fatal(err)
		}
		w.within(20*time.Minute, "confirmed")
		if n := len(w.server.Checks()); n != 1 {
			w.Errorf("%d checks", n)
		}
	})
}

func TestACheckOnDemandMakesOneRequestAtOnce(t *testing.T) {
	inWorld(t, func(w *world) {
		w.start()
		time.Sleep(10 * time.Minute)
		before := len(w.server.Checks())
		now := time.Now()
		if err := w.agent.CheckNow(w.Context()); err != nil {
			w.Fatal(err)
		}
		checks := w.server.Checks()
		if len(checks) != before+1 || checks[before].Sub(now) > time.Second {
			w.Errorf("checks %v", checks[before:])
		}
	})
}

func TestAServerThatIsAwayIsTriedSoonerAndThenLessOften(t *testing.T) {
	inWorld(t, func(w *world) {
		w.server.Fail = fault.New(fault.Unavailable, "server_unavailable", "no route to host")
		w.start()
		time.Sleep(24 * time.Hour)
		checks := w.server.Checks()
		want := 30 * time.Second
		for i := range checks[1:] {
			gap := checks[i+1].Sub(checks[i])
			if gap < want*3/4-time.Second || gap > want+time.Second {
				w.Errorf("gap %d is %s, want about %s", i, gap, want)
			}
			want = min(2*want, time.Hour)
		}
		w.wantState("check_failed", "server_unavailable")

		// A short absence of a server that was there before is no alarm.
		w.server.Set(func(s *agenttest.Server) { s.Fail = nil })
		time.Sleep(2 * time.Hour)
		w.wantState("idle_current", "current")
		w.server.Set(func(s *agenttest.Server) {
			s.Fail = fault.New(fault.Unavailable, "server_unavailable", "no route to host")
		})
		time.Sleep(70 * time.Minute)
		w.wantState("idle_current", "")
		time.Sleep(3 * time.Hour)
		w.wantState("check_failed", "server_unavailable")
	})
}

func TestReportsWaitForTheServerAndArriveOnce(t *testing.T) {
	inWorld(t, func(w *world) {
		w.publish(1)
		w.start()
		w.within(2*time.Minute, "soaking")
		w.server.Set(func(s *agenttest.Server) { s.Fail = fault.New(fault.Unavailable, "server_unavailable", "gone") })
		w.within(20*time.Minute, "confirmed")
		w.stop() // the queue survives the daemon
		w.server.Set(func(s *agenttest.Server) { s.Fail, s.Twice = nil, true })
		w.start()
		w.wantEvents(wire.EventBooted, wire.EventStaged, wire.EventLoading, wire.EventLoaded, wire.EventConfirmed)
		reports := w.server.Reports()
		if !slices.IsSortedFunc(reports, func(a, b wire.Report) int { return a.At.Compare(b.At) }) {
			w.Error("the reports arrived out of order")
		}
		for _, r := range reports {
			if r.Facts.Kernel != w.machine.Kernel || r.State.State == "" || r.Key == "" {
				w.Errorf("report %+v", r)
			}
		}
		if n := w.agent.Status(w.Context()).Queued; n != 0 {
			w.Errorf("%d still queued", n)
		}
	})
}

func TestTheQueueOfReportsIsBounded(t *testing.T) {
	inWorld(t, func(w *world) {
		w.server.Fail = fault.New(fault.Unavailable, "server_unavailable", "gone")
		w.start()
		synctest.Wait()
		for i := range wire.MaxQueuedReports + 10 {
			w.stop()
			w.machine.Reboot(time.Unix(int64(i), 0).String())
			w.start()
			synctest.Wait()
		}
		if n := w.agent.Status(w.Context()).Queued; n != wire.MaxQueuedReports {
			w.Errorf("%d queued, want %d", n, wire.MaxQueuedReports)
		}
	})
}

func TestEnroll(t *testing.T) {
	inWorld(t, func(w *world) {
		w.server.Forget()
		w.publish(1)
		w.start()
		time.Sleep(3 * time.Hour)
		w.wantState("not_enrolled", "not_enrolled")
		if _, err := w.agent.Enroll(w.Context(), "https://server", "bad"); fault.CodeOf(err) != "token_unknown" {
			w.Errorf("with a wrong token: %v", err)
		}
		id, err := w.agent.Enroll(w.Context(), "https://server", "good")
		if err != nil || id.MachineID != agenttest.MachineID {
			w.Fatalf("%+v, %v", id, err)
		}
		if _, err := w.agent.Enroll(w.Context(), "https://other", "good"); fault.CodeOf(err) != "enrolled" {
			w.Errorf("enrolled twice: %v", err)
		}
		w.within(20*time.Minute, "confirmed")
		w.wantEvents(wire.EventEnrolled, wire.EventStaged, wire.EventLoading, wire.EventLoaded, wire.EventConfirmed)
	})
}

func TestACheckIsNotMadeWhileALivepatchIsUnderWay(t *testing.T) {
	inWorld(t, func(w *world) {
		w.publish(1)
		w.start()
		w.within(2*time.Minute, "soaking")
		if err := w.agent.CheckNow(w.Context()); fault.CodeOf(err) != "under_way" {
			w.Errorf("err = %v", err)
		}
	})
}
