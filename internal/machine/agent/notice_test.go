// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/notice"
	"klatch/internal/wire"
)

// dead is a notice that declares a kernel build dead and names a CVE.
func dead(k kernel.Build) notice.Notice {
	return notice.Notice{
		Format: notice.Format, Kernel: k, Support: notice.Support{Ended: "1999-12-31", Reason: "too many open CVEs", Instead: "6.1.0-56-cloud-amd64"},
		CVEs: []notice.CVE{{ID: "CVE-2026-0003", Code: "layout_changed", Text: "a type changes", Advice: notice.Reboot}},
	}
}

// TestAMachineIsToldWhatThePublisherKnows: a notice reaches status, reboot
// advice and the server, survives a restart and ends when it is taken back.
func TestAMachineIsToldWhatThePublisherKnows(t *testing.T) {
	inWorld(t, func(w *world) {
		w.publish(1)
		w.start()
		w.within(20*time.Minute, "confirmed")
		if s := w.agent.Status(w.Context()); s.Notice != nil || s.State.Notice != nil {
			w.Errorf("nothing was told, and this is known: %+v", s.Notice)
		}
		w.pub.Tell(dead(w.machine.Kernel))
		w.within(2*time.Hour, "kernel_ended")
		told := func(what string) {
			w.Helper()
			s := w.agent.Status(w.Context())
			n := s.Notice
			if n == nil || n.Support != notice.Ended || n.Instead != "6.1.0-56-cloud-amd64" || len(n.CVEs) != 1 || n.CVEs[0].Code != "layout_changed" {
				w.Fatalf("%s: %+v", what, n)
			}
			if !s.Act || s.State.State != "kernel_ended" || s.State.Reason != "declared_dead" || s.State.Sequence != 1 || !strings.Contains(s.State.NextStep, "6.1.0-56-cloud-amd64") {
				w.Errorf("%s: state %+v", what, s.State)
			}
			if s.Reboot.Level != "advised" || !slices.Equal(s.Reboot.Codes()[:2], []fault.Code{"kernel_ended", "cannot_livepatch"}) || !strings.Contains(s.Reboot.Reasons[1].Text, "CVE-2026-0003 (layout_changed)") {
				w.Errorf("%s: advice %+v", what, s.Reboot)
			}
		}
		told("at once")
		if n := w.machine.Loads(); n != 1 {
			w.Errorf("%d loads: what was loaded must stay", n)
		}
		time.Sleep(2 * time.Hour)
		q := w.server.Requests()
		if n := q[len(q)-1].State.Notice; n == nil || n.Support != "ended" || n.Reboots != 1 || n.CVEs[0] != "CVE-2026-0003" {
			w.Errorf("the server was told %+v", n)
		}

		w.stop()
		w.server.Set(func(s *agenttest.Server) { s.Fail = fault.New(fault.Unavailable, "server_unavailable", "away") })
		w.start()
		time.Sleep(time.Minute)
		told("after a restart without a server")

		w.server.Set(func(s *agenttest.Server) { s.Fail = nil })
		w.pub.Withdraw(notice.TargetPath(w.machine.Kernel))
		w.within(4*time.Hour, "confirmed")
		if s := w.agent.Status(w.Context()); s.Notice != nil {
			w.Errorf("taken back, and still known: %+v", s.Notice)
		}
		if _, err := os.Stat(filepath.Join(w.dir, "notice.json")); err == nil {
			w.Error("taken back, and still on disk")
		}
	})
}

// TestOnlyTheKernelBuildThatIsMeantIsTold: a machine with a newer build reads
// its own notice, and after a boot into another kernel the kept one is silent.
func TestOnlyTheKernelBuildThatIsMeantIsTold(t *testing.T) {
	inWorld(t, func(w *world) {
		older := w.machine.Kernel
		older.Release, older.ID = "6.1.0-47-cloud-amd64", kernel.BuildID{9}
		w.pub.Tell(dead(older))
		w.publish(1)
		w.start()
		w.within(20*time.Minute, "confirmed")
		time.Sleep(3 * time.Hour)
		if s := w.agent.Status(w.Context()); s.Notice != nil || s.State.State != "confirmed" {
			w.Errorf("told what is said of an older build: %+v, %s", s.Notice, s.State.State)
		}
		w.stop()
		// What an earlier kernel's klatchd kept.
		b, err := dead(older).Encode()
		if err != nil {
			w.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(w.dir, "notice.json"), b, 0o600); err != nil {
			w.Fatal(err)
		}
		w.server.Set(func(s *agenttest.Server) { s.Fail = fault.New(fault.Unavailable, "server_unavailable", "away") })
		w.start()
		time.Sleep(time.Minute)
		if s := w.agent.Status(w.Context()); s.Notice != nil || s.State.State != "confirmed" {
			w.Errorf("told what was kept of an older build: %+v, %s", s.Notice, s.State.State)
		}
	})
}

// TestANoticeThatIsRefused: the one before stays, it is told once, and no good
// livepatch is held up.
func TestANoticeThatIsRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		code fault.Code
		evil func(w *world) []byte
	}{
		"on the neighbor build": {"wrong_build", func(w *world) []byte {
			k := w.machine.Kernel
			k.ID[0] ^= 1
			return encoded(w, dead(k))
		}},
		"on another release": {"wrong_build", func(w *world) []byte {
			k := w.machine.Kernel
			k.Release = "6.1.0-51-cloud-amd64"
			return encoded(w, dead(k))
		}},
		"a byte more":     {"notice_malformed", func(w *world) []byte { return append(encoded(w, dead(w.machine.Kernel)), ' ') }},
		"another version": {"notice_malformed", func(w *world) []byte { return []byte(`{"format":"klatch-notice/2"}`) }},
		"nothing":         {"notice_malformed", func(*world) []byte { return nil }},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.publish(1)
				good := dead(w.machine.Kernel)
				good.Support = notice.Support{Until: "2999-12-31"}
				w.pub.Tell(good)
				w.start()
				w.within(20*time.Minute, "confirmed")
				w.pub.Put(notice.TargetPath(w.machine.Kernel), tt.evil(w))
				w.publish(2)
				time.Sleep(3 * time.Hour)
				s := w.agent.Status(w.Context())
				if s.State.State != "check_failed" || s.State.Reason != tt.code || s.State.Sequence != 2 || s.State.Highest != 2 {
					w.Errorf("state %+v, want check_failed/%s with livepatch 2", s.State, tt.code)
				}
				if s.Notice == nil || s.Notice.Support != notice.Supported || len(s.Notice.CVEs) != 1 {
					w.Errorf("notice %+v, want the one before", s.Notice)
				}
				refused := 0
				for _, r := range w.server.Reports() {
					if r.Event == wire.EventRefused && r.Code == tt.code {
						refused++
					}
				}
				if refused != 1 {
					w.Errorf("told %d refusals, want 1", refused)
				}
				w.pub.Tell(good)
				w.within(3*time.Hour, "confirmed")
			})
		})
	}
}

func encoded(w *world, n notice.Notice) []byte {
	w.Helper()
	b, err := n.Encode()
	if err != nil {
		w.Fatal(err)
	}
	return b
}

// TestAMirrorThatLacksTheNotice: the check is good, what was known stays, and
// status says that it may be old.
func TestAMirrorThatLacksTheNotice(t *testing.T) {
	inWorld(t, func(w *world) {
		w.pub.Tell(dead(w.machine.Kernel))
		w.start()
		w.within(20*time.Minute, "kernel_ended")
		w.pub.Set(func(p *agenttest.Publisher) { p.Lost = notice.TargetPath(w.machine.Kernel) })
		w.publish(1)
		time.Sleep(3 * time.Hour)
		s := w.agent.Status(w.Context())
		if s.State.State != "kernel_ended" || s.State.Sequence != 1 || s.Check.Result != "current" || s.Notice == nil ||
			!slices.ContainsFunc(s.Problems, func(p string) bool { return strings.Contains(p, "says of this kernel") }) {
			w.Errorf("state %+v, check %+v, notice %+v, problems %q", s.State, s.Check, s.Notice, s.Problems)
		}
		w.pub.Set(func(p *agenttest.Publisher) { p.Lost = "" })
		time.Sleep(3 * time.Hour)
		if s := w.agent.Status(w.Context()); len(s.Problems) != 0 {
			w.Errorf("problems %q", s.Problems)
		}
	})
}

// TestAKeptNoticeThatIsDamagedIsFetchedAgain: it stops nothing.
func TestAKeptNoticeThatIsDamagedIsFetchedAgain(t *testing.T) {
	inWorld(t, func(w *world) {
		if err := os.WriteFile(filepath.Join(w.dir, "notice.json"), []byte("{"), 0o600); err != nil {
			w.Fatal(err)
		}
		w.pub.Tell(dead(w.machine.Kernel))
		w.start()
		w.within(20*time.Minute, "kernel_ended")
		b, err := os.ReadFile(filepath.Join(w.dir, "notice.json"))
		if n, perr := notice.Parse(b); err != nil || perr != nil || n.Fits(w.machine.Kernel) != nil {
			w.Errorf("on disk: %v, %v", err, perr)
		}
	})
}

// TestANoticeThatCannotBeKeptIsNotUsed: what status says must still be known
// after a restart.
func TestANoticeThatCannotBeKeptIsNotUsed(t *testing.T) {
	inWorld(t, func(w *world) {
		path := filepath.Join(w.dir, "notice.json")
		if err := os.MkdirAll(filepath.Join(path, "in the way"), 0o700); err != nil {
			w.Fatal(err)
		}
		w.pub.Tell(dead(w.machine.Kernel))
		w.start()
		w.within(20*time.Minute, "check_failed")
		if s := w.agent.Status(w.Context()); s.Notice != nil || s.Check.Kind != fault.Internal {
			w.Errorf("notice %+v, check %+v", s.Notice, s.Check)
		}
		if err := os.RemoveAll(path); err != nil {
			w.Fatal(err)
		}
		w.within(3*time.Hour, "kernel_ended")
	})
}
