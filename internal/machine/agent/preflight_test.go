// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"testing"
	"time"

	"klatch/internal/livepatch"
	"klatch/internal/wire"
)

const debianBanner = "Linux version 6.1.0-50-cloud-amd64 (debian-kernel@lists.debian.org) (gcc-12) #1 SMP Debian 6.1.176-1\n"

// locked makes the machine one whose kernel takes only known keys.
func (w *world) locked(banner string) {
	w.machine.Write("proc/version", banner)
	w.machine.Write("sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
	w.machine.Write("sys/module/module/parameters/sig_enforce", "Y\n")
}

// TestNothingIsDownloadedThatTheKernelWouldRefuse: it is a stay, not a failure;
// the server is told; and it goes on by itself when the kernel has changed.
func TestNothingIsDownloadedThatTheKernelWouldRefuse(t *testing.T) {
	inWorld(t, func(w *world) {
		w.locked(debianBanner)
		w.publish(1)
		w.pub.Lost = w.server.Offer.Target // a download would fail the check
		w.start()
		time.Sleep(3 * time.Hour)
		w.wantState("key_untrusted", "module_key_missing")
		s := w.agent.Status(w.Context())
		if s.Check.Result != "current" || s.Check.Code != "module_key_missing" || !s.Act || s.ModuleKey == nil || s.ModuleKey.HowTo == "" {
			t.Errorf("status %+v, %+v", s.Check, s.ModuleKey)
		}
		asked := w.server.Requests()
		last := asked[len(asked)-1]
		if last.State.State != "key_untrusted" || last.State.Reason != "module_key_missing" || last.Facts.KeyTrust != "refused" || last.Facts.SecureBoot != "off" {
			t.Errorf("the server saw %+v, %+v", last.State, last.Facts)
		}
		if n := w.machine.Loads(); n != 0 {
			t.Errorf("%d loads", n)
		}
		for _, e := range w.server.Events() {
			if e != wire.EventBooted {
				t.Errorf("event %s", e)
			}
		}

		w.machine.Write("sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
		w.machine.Write("sys/module/module/parameters/sig_enforce", "N\n")
		w.pub.Lost = ""
		w.within(3*time.Hour, "confirmed")
	})
}

// TestWhatIsUnknownIsTried: somebody's own kernel may have the key in it.
func TestWhatIsUnknownIsTried(t *testing.T) {
	inWorld(t, func(w *world) {
		w.locked("Linux version 6.1.0-50-cloud-amd64 (me@here) (gcc-12) #1 SMP\n")
		w.publish(1)
		w.start()
		w.within(3*time.Hour, "confirmed")
		if s := w.agent.Status(w.Context()); s.ModuleKey == nil || s.ModuleKey.Word != "unknown" || s.Facts.KeyTrust != "unknown" {
			t.Errorf("%+v", s.ModuleKey)
		}
	})
}

// TestARecalledKeyIsNoTrustedOne: the status knows, and the check stays.
func TestARecalledKeyIsNoTrustedOne(t *testing.T) {
	inWorld(t, func(w *world) {
		w.locked(debianBanner)
		r := recalls(w, 1)
		r.Keys = []string{livepatch.KeyDigest(w.pub.Anchor.ModuleKeys[0].Modulus)}
		w.pub.Recall(r)
		w.publish(6)
		w.pub.Lost = w.server.Offer.Target
		w.start()
		time.Sleep(3 * time.Hour)
		w.wantState("key_untrusted", "module_key_none")
		if s := w.agent.Status(w.Context()); s.Check.Result != "current" || s.Check.Code != "module_key_none" {
			t.Errorf("check %+v", s.Check)
		}
	})
}
