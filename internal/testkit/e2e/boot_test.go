// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/lab"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/wire"
)

// back is how a boot ended: what the loader did, and what a person sees.
type back struct {
	outcome string
	loaded  livepatch.Sequence
	state   string // empty: not asked
	reason  fault.Code
}

// after looks at the machine after a boot, as soon as klatchd has looked too.
func (g *machine) after(want back) agent.Status {
	g.t.Helper()
	s := g.until(fmt.Sprintf("%+v after the boot", want), func(s agent.Status) bool {
		return s.Loader != nil && s.Facts.BootID == g.BootID() && (want.state == "" || s.State.State == want.state)
	})
	if s.Loader.Boot.Outcome != want.outcome || s.State.Sequence != want.loaded {
		g.t.Errorf("boot outcome %s (%s), sequence %d; want %+v", s.Loader.Boot.Outcome, s.Loader.Boot.Text, s.State.Sequence, want)
	}
	if got := g.enabled(); want.loaded == 0 && got != "" || want.loaded != 0 && got != want.loaded.ModuleName() {
		g.t.Errorf("enabled in the kernel: %q, want sequence %d", got, want.loaded)
	}
	if want.state != "" && (s.State.State != want.state || s.State.Reason != want.reason) {
		g.t.Errorf("state %s, reason %s; want %+v", s.State.State, s.State.Reason, want)
	}
	return s
}

// monotonic is a time stamp of a unit, in microseconds since the kernel began;
// 0 where it never came to that.
func (g *machine) monotonic(unit, stamp string) int {
	g.t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(g.run("systemctl", "show", "-P", stamp, unit)))
	if err != nil {
		g.t.Fatal(err)
	}
	return n
}

// TestVMBoot: a confirmed livepatch comes back before the network without one;
// boot parameter, flag file and breaker each keep it out and say so; what was
// not confirmed when the machine died stays out.
func TestVMBoot(t *testing.T) {
	s := newStory(t, quick)
	sub := func(name string, f func(t *testing.T)) {
		if !t.Failed() { // each goes on where the one before ended
			t.Run(name, func(t *testing.T) { s.t = t; f(t) })
		}
		s.t = t
	}
	sub("the first livepatch dies unconfirmed and stays out", func(*testing.T) {
		s.configure("check_interval = \"5s\"\nsoak = \"2m\"\n")
		s.offer(1)
		s.until("loaded and not confirmed", func(s agent.Status) bool { return s.State.Phase == wire.Soaking })
		s.checks(false, true)
		s.restart(s.PowerCut)
		s.after(back{"nothing_stored", 0, "failed", "died"})
		s.checks(true, true)
		// It stays so: the server still offers it.
		s.until("checked again", func(s agent.Status) bool { return s.Check.Code == "blocked" })
		s.after(back{"nothing_stored", 0, "failed", "died"})
		s.configure(quick)
		s.run("klatch", "retry")
		s.confirmed(1)
	})
	sub("before the network, without one", func(t *testing.T) {
		s.offer(2)
		s.confirmed(2)
		s.server.stop()
		if err := s.Link(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		s.restart(s.Reboot)
		s.after(back{outcome: "loaded", loaded: 2})
		s.checks(false, false)
		loaded := s.monotonic("klatch-loader-boot.service", "ActiveEnterTimestampMonotonic")
		if loaded == 0 {
			t.Error("klatch-loader-boot.service was not active")
		}
		for unit, stamp := range map[string]string{
			"network-pre.target": "ActiveEnterTimestampMonotonic", "network.target": "ActiveEnterTimestampMonotonic",
			"sysinit.target": "ActiveEnterTimestampMonotonic", "systemd-networkd.service": "InactiveExitTimestampMonotonic",
			"klatchd.service": "InactiveExitTimestampMonotonic",
		} {
			if at := s.monotonic(unit, stamp); at <= loaded {
				t.Errorf("%s at %d µs, the livepatch at %d µs", unit, at, loaded)
			}
		}
		if err := s.Link(t.Context(), true); err != nil {
			t.Fatal(err)
		}
		s.server.start()
		s.confirmed(2)
	})
	sub("boot parameter", func(t *testing.T) {
		s.Machine.(lab.Tunable).Append("klatch=off")
		s.restart(s.Reboot)
		s.after(back{"off_parameter", 0, "boot_stopped", "off_parameter"})
		s.checks(true, true)
		s.Machine.(lab.Tunable).Append()
	})
	sub("flag file", func(*testing.T) {
		s.run("touch", "/etc/klatch/off")
		s.restart(s.Reboot)
		s.after(back{"off_flag", 0, "boot_stopped", "off_flag"})
		s.run("rm", "/etc/klatch/off")
	})
	sub("breaker", func(t *testing.T) {
		s.configure("check_interval = \"5s\"\nsoak = \"2m\"\n")
		for range 2 { // two boots that die three seconds after the insertion
			s.restart(s.Reset)
			s.after(back{outcome: "loaded", loaded: 2})
			<-time.After(3 * time.Second)
		}
		s.restart(s.PowerCut)
		got := s.after(back{"off_breaker", 0, "boot_stopped", "off_breaker"})
		if len(got.Loader.Boot.Stops) != 1 || got.Loader.Boot.Stops[0] != "breaker" {
			t.Errorf("stops %v", got.Loader.Boot.Stops)
		}
		s.run("klatch-loader", "clear-breaker")
		s.configure(quick)
		s.restart(s.Reboot)
		s.after(back{outcome: "loaded", loaded: 2})
		s.confirmed(2)
	})
	sub("a newer one dies three seconds after insertion, the confirmed one comes back", func(t *testing.T) {
		s.configure("check_interval = \"5s\"\nsoak = \"2m\"\n")
		s.offer(3)
		s.until("inserted", func(s agent.Status) bool { return s.State.Sequence == 3 })
		<-time.After(3 * time.Second)
		s.restart(s.PowerCut)
		s.after(back{"loaded", 2, "", ""})
		s.until("told why", func(s agent.Status) bool { return s.State.State == "failed" && s.State.Reason == "died" })
		s.after(back{"loaded", 2, "failed", "died"})
		if got := s.events(3); got[len(got)-1] != wire.EventFailed {
			t.Errorf("history of sequence 3: %v", got)
		}
	})
}
