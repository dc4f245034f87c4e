// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/forge/lab"
	"klatch/internal/livepatch"
	"klatch/internal/wire"
)

// whole is what a journey leaves in the history and on the server, whatever
// was killed meanwhile.
var whole = []wire.Event{wire.EventStaged, wire.EventLoading, wire.EventLoaded, wire.EventConfirmed}

const (
	daemonJournal = "/var/lib/klatch/journal.json"
	loaderJournal = "/var/lib/klatch-loader/journal.json"
)

// TestVMKilled kills klatchd and the loader with SIGKILL at every step of
// journeys that are otherwise undisturbed. Each ends as if nothing had
// happened: confirmed, one livepatch enabled, each step once in the history
// and once on the server.
func TestVMKilled(t *testing.T) {
	s := newStory(t, "check_interval = \"5s\"\nsoak = \"1s\"\n")
	// Systemd waits ten seconds before it starts klatchd again; the last case
	// has that.
	const short = "/run/systemd/system/klatchd.service.d"
	s.run("mkdir", "-p", short)
	s.put(short+"/short.conf", []byte("[Service]\nRestartSec=500ms\n"))
	s.run("systemctl", "daemon-reload")
	s.offer(1)
	s.confirmed(1)
	n := livepatch.Sequence(1)
	for _, c := range []struct {
		name string
		// kill is a word of the kit's program with its arguments.
		kill []string
		// again: the loader was taken away under a load, which may be put
		// off, tried again and so told of again.
		again bool
	}{
		{"klatchd when staged", []string{"kill-at", daemonJournal, `"phase":"staged"`, "klatchd.service"}, false},
		{"klatchd when loading", []string{"kill-at", daemonJournal, `"phase":"loading"`, "klatchd.service"}, false},
		{"klatchd when transitioning", []string{"kill-at", daemonJournal, `"phase":"transitioning"`, "klatchd.service"}, false},
		{"klatchd when soaking", []string{"kill-at", daemonJournal, `"phase":"soaking"`, "klatchd.service"}, false},
		{"klatchd when confirmed", []string{"kill-at", daemonJournal, `"phase":"confirmed"`, "klatchd.service"}, false},
		{"loader when the attempt is written down", []string{"kill-at", loaderJournal, `"attempt": {`, "klatch-loader.service"}, true},
		{"loader again and again", []string{"kill-often", "klatch-loader.service", "4711", "200", "900", "4"}, true},
		{"klatchd again and again", []string{"kill-often", "klatchd.service", "4712", "300", "900", "4"}, false},
	} {
		if t.Failed() {
			break // each goes on where the one before ended
		}
		n++
		t.Run(c.name, func(t *testing.T) {
			s.t = t
			defer func() { s.t = s.server.t }()
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Second)
			defer cancel()
			killed := make(chan string, 1)
			go func() {
				res, err := s.Run(ctx, lab.Command{Argv: append([]string{hostile}, c.kill...), Timeout: 90 * time.Second})
				if err != nil {
					res.Stderr = []byte(err.Error())
				}
				killed <- string(res.Stdout) + string(res.Stderr)
			}()
			s.offer(n)
			s.try("klatch", "check")
			if said := <-killed; !strings.HasSuffix(said, "killed\n") {
				t.Fatalf("nothing was killed: %s", said)
			}
			if c.again {
				s.try("klatch", "retry") // or half a minute later by itself
			}
			s.confirmed(n)
			if got := s.enabled(); got != n.ModuleName() {
				t.Errorf("enabled: %q", got)
			}
			s.checks(false, n < 2)
			s.wantOnce(n, c.again)
		})
	}
	t.Run("systemd starts both again by itself", func(t *testing.T) {
		s.t = t
		s.run("rm", "-r", short)
		s.run("systemctl", "daemon-reload")
		s.run("systemctl", "kill", "-s", "KILL", "klatchd.service")
		s.run("systemctl", "kill", "-s", "KILL", "klatch-loader.service")
		s.confirmed(n)
	})
	s.t = t
}

// wantOnce compares history and reports with those of an undisturbed journey.
// A load that was put off is told of again; nothing else is.
func (s *story) wantOnce(n livepatch.Sequence, again bool) {
	s.t.Helper()
	for deadline := time.Now().Add(45 * time.Second); len(s.server.events(n)) < len(s.events(n)); <-time.After(time.Second) {
		if time.Now().After(deadline) {
			break
		}
	}
	for where, got := range map[string][]wire.Event{"history": s.events(n), "server": s.server.events(n)} {
		if again { // only the loading may be repeated
			got = slices.Compact(got)
		}
		if !slices.Equal(got, whole) {
			s.t.Errorf("%s of sequence %d: %v, want %v", where, n, got, whole)
		}
	}
}
