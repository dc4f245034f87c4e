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
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/tracer"
	"klatch/internal/wire"
)

func TestOffersThatAreRefused(t *testing.T) {
	for _, tt := range []struct {
		name string
		code fault.Code
		evil func(w *world) (target string, s livepatch.Sequence)
	}{
		{"not in the signed list", "target_missing", func(w *world) (string, livepatch.Sequence) {
			return "debian-12/amd64/6.1.0-50-cloud-amd64/klatch_9.lpb", 9
		}},
		{"signed by another publisher", "manifest_untrusted", func(w *world) (string, livepatch.Sequence) {
			m, b := agenttest.NewPublisher(w).Livepatch(w.machine.Kernel, 5)
			w.pub.Put(m.TargetPath(), b)
			return m.TargetPath(), 5
		}},
		{"for the neighbor build of the same release", "wrong_build", func(w *world) (string, livepatch.Sequence) {
			k := w.machine.Kernel
			k.ID[0] ^= 1
			return w.pub.Publish(k, 5), 5
		}},
		{"for the neighbor release", "wrong_build", func(w *world) (string, livepatch.Sequence) {
			k := w.machine.Kernel
			k.Release, k.ID = "6.1.0-51-cloud-amd64", kernel.BuildID{1}
			return w.pub.Publish(k, 5), 5
		}},
		{"a flipped byte in the module", "module_digest", func(w *world) (string, livepatch.Sequence) {
			m, b := w.pub.Livepatch(w.machine.Kernel, 5)
			b[len(b)-1] ^= 1
			w.pub.Put(m.TargetPath(), b)
			return m.TargetPath(), 5
		}},
		{"a flipped byte in the manifest", "manifest_untrusted", func(w *world) (string, livepatch.Sequence) {
			m, b := w.pub.Livepatch(w.machine.Kernel, 5)
			b[60] ^= 1
			w.pub.Put(m.TargetPath(), b)
			return m.TargetPath(), 5
		}},
		{"truncated", "bundle_malformed", func(w *world) (string, livepatch.Sequence) {
			m, b := w.pub.Livepatch(w.machine.Kernel, 5)
			w.pub.Put(m.TargetPath(), b[:len(b)-1])
			return m.TargetPath(), 5
		}},
		{"an older one under a newer name", "wrong_target", func(w *world) (string, livepatch.Sequence) {
			_, b := w.pub.Livepatch(w.machine.Kernel, 5)
			target := "debian-12/amd64/6.1.0-50-cloud-amd64/klatch_8.lpb"
			w.pub.Put(target, b)
			return target, 8
		}},
		{"the right sequence under a name that is not its own", "wrong_target", func(w *world) (string, livepatch.Sequence) {
			_, b := w.pub.Livepatch(w.machine.Kernel, 5)
			target := "debian-12/amd64/6.1.0-51-cloud-amd64/klatch_5.lpb"
			w.pub.Put(target, b)
			return target, 5
		}},
		{"lower than what runs", "sequence_lower", func(w *world) (string, livepatch.Sequence) {
			return w.pub.Publish(w.machine.Kernel, 1), 1
		}},
		{"the same again from a server that does not listen", "sequence_same", func(w *world) (string, livepatch.Sequence) {
			return w.pub.Publish(w.machine.Kernel, 3), 3
		}},
		{"recalled by its publisher", "recalled", func(w *world) (string, livepatch.Sequence) {
			target := w.pub.Publish(w.machine.Kernel, 5)
			w.pub.Recall(recalls(w, 1))
			return target, 5
		}},
		{"signed by a key that its publisher recalled", "untrusted", func(w *world) (string, livepatch.Sequence) {
			target := w.pub.Publish(w.machine.Kernel, 5)
			r := recalls(w, 1)
			r.Entries, r.Keys = nil, []string{livepatch.KeyDigest([]byte(w.pub.Anchor.Manifest.Keys[0]))}
			w.pub.Recall(r)
			return target, 5
		}},
		{"recalls under the name of newer ones", "wrong_target", func(w *world) (string, livepatch.Sequence) {
			w.pub.Recall(recalls(w, 1))
			b, err := w.pub.Fetch(w.Context(), livepatch.RecallsPath(1), 1<<20)
			if err != nil {
				w.Fatal(err)
			}
			w.pub.Put(livepatch.RecallsPath(7), b)
			return w.pub.Publish(w.machine.Kernel, 5), 5
		}},
		{"sequence 0", "bad_sequence", func(w *world) (string, livepatch.Sequence) { return "x", 0 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			// What runs stays, whatever is shown.
			inWorld(t, func(w *world) {
				w.publish(3)
				w.start()
				w.within(20*time.Minute, "confirmed")
				reports := len(w.server.Reports())
				target, s := tt.evil(w)
				w.server.OfferTarget(target, s)
				if s == 3 {
					w.server.Set(func(s *agenttest.Server) { s.Offer.Sequence = 3 })
					w.machine.Change(func(s *loaderapi.Status) { s.Highest = 3 })
				}
				time.Sleep(5 * time.Hour)
				st := w.state()
				if s == 3 { // the agent says what it has, and so is not offered it
					if st.State != "confirmed" {
						w.Errorf("state %+v", st)
					}
					return
				}
				if st.State != "check_failed" || st.Reason != tt.code || st.Sequence != 3 || st.Highest != 3 {
					w.Errorf("state %+v, want check_failed/%s with livepatch 3", st, tt.code)
				}
				if n := w.machine.Loads(); n != 1 {
					w.Errorf("loaded %d times", n)
				}
				told := w.server.Reports()[reports:]
				if kind := fault.KindOf(livepatch.CheckReplace(3, s)); kind != fault.Invalid &&
					(len(told) != 1 || told[0].Event != wire.EventRefused || told[0].Code != tt.code) {
					w.Errorf("told %+v, want one refusal with code %s", told, tt.code)
				}
				entries, err := os.ReadDir(filepath.Join(w.dir, "staged"))
				if err != nil || slices.ContainsFunc(entries, func(e os.DirEntry) bool { return !strings.HasPrefix(e.Name(), "klatch_3.") }) {
					w.Errorf("left behind: %v, %v", entries, err)
				}
			})
		})
	}
}

func TestMetadataThatIsRefusedChangesNothing(t *testing.T) {
	inWorld(t, func(w *world) {
		w.publish(1)
		w.start()
		w.within(20*time.Minute, "confirmed")
		w.publish(2)
		w.pub.Set(func(p *agenttest.Publisher) {
			p.Fail = fault.New(fault.Untrusted, "metadata_expired", "timestamp metadata is expired")
		})
		time.Sleep(3 * time.Hour)
		if s := w.state(); s.State != "check_failed" || s.Reason != "metadata_expired" || s.Sequence != 1 || !strings.Contains(s.Text, "last good check was") {
			w.Errorf("state %+v", s)
		}
		w.pub.Set(func(p *agenttest.Publisher) { p.Fail = nil })
		time.Sleep(3 * time.Hour)
		if s := w.state(); s.State != "confirmed" || s.Sequence != 2 {
			w.Errorf("state %+v", s)
		}
	})
}

func TestAStagedFileThatWasDamagedIsFetchedAgain(t *testing.T) {
	inWorld(t, func(w *world) {
		w.machine.Set(func(m *agenttest.Machine) {
			m.Refuse = fault.New(fault.Unavailable, "loader_unreachable", "connect: refused")
		})
		w.publish(1)
		w.start()
		w.within(5*time.Minute, "staged")
		path := filepath.Join(w.dir, "staged", "klatch_1.ko")
		if err := os.WriteFile(path, []byte("damaged"), 0o600); err != nil {
			w.Fatal(err)
		}
		w.machine.Set(func(m *agenttest.Machine) { m.Refuse = nil })
		w.within(4*time.Hour, "confirmed")
	})
}

// The kernel would refuse the livepatch; the machine names the tracer, waits,
// and loads when it is gone. What harms nobody is told and does not hold.
func TestATracerHoldsALivepatchUntilItIsGone(t *testing.T) {
	inWorld(t, func(w *world) {
		const probe, post = "-  k  unix_ioctl+0x0    [FTRACE]\n", "unix_ioctl (1) R I  \ttramp: - (kprobe_ftrace_handler+0x0/0x1b0)\n"
		w.machine.Set(func(m *agenttest.Machine) { m.Traced = probe + post })
		w.publish(1)
		w.start()
		w.within(5*time.Minute, "held")
		w.wantState("held", "tracer_in_the_way")
		time.Sleep(3 * time.Hour) // it looks again and again, and tells once
		w.wantState("held", "tracer_in_the_way")
		s := w.agent.Status(w.Context())
		if !s.Act || len(s.Tracers) != 1 || s.Tracers[0].Effect != tracer.Refused || w.machine.Loads() != 0 ||
			!strings.Contains(s.State.Text, "kprobe on vmlinux:unix_ioctl: the kernel will refuse the livepatch") {
			w.Errorf("status %+v, tracers %v, %d loads", s.State, s.Tracers, w.machine.Loads())
		}
		w.machine.Set(func(m *agenttest.Machine) { m.Traced = probe + strings.ReplaceAll(post, "I", " ") })
		w.within(3*time.Hour, "soaking")
		if s := w.agent.Status(w.Context()); len(s.Tracers) != 1 || s.Tracers[0].Effect != tracer.Both {
			w.Errorf("tracers %v", s.Tracers)
		}
		w.within(20*time.Minute, "confirmed")
		w.wantEvents(wire.EventBooted, wire.EventStaged, wire.EventRefused, wire.EventLoading, wire.EventLoaded, wire.EventConfirmed)
		for _, r := range w.server.Reports() {
			if want := r.Event == wire.EventRefused || r.Event == wire.EventLoading; want != (len(r.Tracers) == 1) {
				w.Errorf("report of %s has tracers %v", r.Event, r.Tracers)
			}
		}
	})
}

// A kernel that does not say who traces keeps no fix out.
func TestTracersThatCannotBeLookedForAreNotNone(t *testing.T) {
	inWorld(t, func(w *world) {
		w.machine.Set(func(m *agenttest.Machine) { m.NoTracers = true })
		w.publish(1)
		w.start()
		w.within(30*time.Minute, "confirmed")
		for _, r := range w.server.Reports() {
			if r.Event == wire.EventLoading && (len(r.Tracers) > 0 || !strings.Contains(r.Text, "were not looked for: no debugfs")) {
				w.Errorf("report %+v", r)
			}
		}
	})
}
