// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/demo"
	"klatch/internal/forge/lab"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/machine/local"
	"klatch/internal/trustsign"
	"klatch/internal/wire"
)

// machine is a guest; its tests are those of t.
type machine struct {
	lab.Machine
	t *testing.T
}

// quick makes a machine that asks every five seconds and soaks for two.
const quick = "check_interval = \"5s\"\nsoak = \"2s\"\n"

// hostile is the kit's program in the guest.
const hostile = lab.FilesDir + "/klatch-hostile"

// bootMachine boots a Debian guest in which our package is not installed yet.
func bootMachine(t *testing.T, m made, p *publisher, more ...lab.File) *machine {
	t.Helper()
	return bootFrom(t, m, p, nil, more...)
}

// bootFrom boots it from firmware.
func bootFrom(t *testing.T, m made, p *publisher, firmware *lab.Firmware, more ...lab.File) *machine {
	t.Helper()
	anchor, err := trustsign.Anchor(*p.Anchor)
	if err != nil {
		t.Fatal(err)
	}
	spec := m.image.Spec(strings.ToLower(t.Name()))
	spec.Network, spec.Firmware = lab.HostOnly, firmware
	spec.Files = append([]lab.File{
		{Name: "klatch.deb", Source: m.deb},
		{Name: "trust.json", Data: anchor},
		{Name: "klatch-hostile", Source: m.bin + "/klatch-hostile", Mode: 0o755},
	}, more...)
	for _, f := range demo.Fixes {
		spec.Files = append(spec.Files, lab.File{Name: "check-" + f.CVE, Source: m.bin + "/" + strings.TrimPrefix(f.Check, "./lab/checks/"), Mode: 0o755})
	}
	guest, err := m.rig.Boot(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	g := &machine{Machine: guest, t: t}
	t.Cleanup(func() {
		if t.Failed() {
			g.tell()
		}
		if err := guest.Close(); err != nil {
			t.Error(err)
		}
	})
	g.settled()
	return g
}

// tell shows what happened, for a person.
func (g *machine) tell() {
	ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
	defer cancel()
	res, err := g.Run(ctx, lab.Command{Argv: []string{"sh", "-c",
		"journalctl --no-pager -o short-monotonic -n 120 -u klatchd -u klatch-loader -u klatch-loader-boot; klatch status; klatch history | head -30"}})
	g.t.Logf("the guest says (%v):\n%s%s", err, res.Stdout, res.Stderr)
}

// settled waits for systemd: what a boot does must be done before it is
// judged.
func (g *machine) settled() {
	g.t.Helper()
	if _, err := g.Run(g.t.Context(), lab.Command{Argv: []string{"systemctl", "is-system-running", "--wait"}}); err != nil {
		g.t.Fatal(err)
	}
}

// try runs a program in the guest.
func (g *machine) try(argv ...string) lab.Result {
	g.t.Helper()
	res, err := g.Run(g.t.Context(), lab.Command{Argv: argv, Timeout: 2 * time.Minute})
	if err != nil {
		g.t.Fatalf("%v: %v", argv, err)
	}
	return res
}

// run is for one that must work.
func (g *machine) run(argv ...string) string {
	g.t.Helper()
	res := g.try(argv...)
	if res.Exit != 0 {
		g.t.Fatalf("%v ended with status %d:\n%s%s", argv, res.Exit, res.Stdout, res.Stderr)
	}
	return string(res.Stdout)
}

func (g *machine) sh(script string) string {
	g.t.Helper()
	return strings.TrimSpace(g.run("sh", "-c", script))
}

func (g *machine) put(path string, content []byte) {
	g.t.Helper()
	if err := g.Put(g.t.Context(), path, 0o644, bytes.NewReader(content)); err != nil {
		g.t.Fatal(err)
	}
}

// install puts our package in, as a person would; conf is klatchd's drop-in.
func (g *machine) install(conf string) {
	g.t.Helper()
	g.run("mkdir", "-p", "/etc/klatch/conf.d")
	g.put("/etc/klatch/conf.d/50-test.toml", []byte(conf))
	g.run("dpkg", "--install", lab.FilesDir+"/klatch.deb")
	g.run("klatch", "trust", "allow-lab")
	g.run("klatch", "trust", "install", lab.FilesDir+"/trust.json")
}

// configure changes klatchd's drop-in.
func (g *machine) configure(conf string) {
	g.t.Helper()
	g.put("/etc/klatch/conf.d/50-test.toml", []byte(conf))
	g.run("systemctl", "restart", "klatchd")
}

// enroll makes the machine known to a server; port is the server's on the
// host.
func (g *machine) enroll(port string, token wire.Token) {
	g.t.Helper()
	g.sh("echo " + string(token) + " | klatch enroll --server https://" + lab.HostAddress + ":" + port + " --token-file -")
}

// status is klatch status --json.
func (g *machine) status() agent.Status {
	g.t.Helper()
	var s agent.Status
	if err := json.Unmarshal([]byte(g.run("klatch", "status", "--json")), &s); err != nil {
		g.t.Fatal(err)
	}
	return s
}

// history is klatch history --json, oldest first.
func (g *machine) history() []agent.Entry {
	g.t.Helper()
	var h local.History
	if err := json.Unmarshal([]byte(g.run("klatch", "history", "--json")), &h); err != nil {
		g.t.Fatal(err)
	}
	slices.Reverse(h.Entries)
	return h.Entries
}

// events are the history's events of one sequence.
func (g *machine) events(n livepatch.Sequence) []wire.Event {
	g.t.Helper()
	var list []wire.Event
	for _, e := range g.history() {
		if e.Sequence == n && e.Event != wire.EventBooted {
			list = append(list, e.Event)
		}
	}
	return list
}

// until waits for a status.
func (g *machine) until(what string, ok func(agent.Status) bool) agent.Status {
	g.t.Helper()
	for deadline := time.Now().Add(90 * time.Second); ; <-time.After(200 * time.Millisecond) {
		res := g.try("klatch", "status", "--json")
		var s agent.Status
		if res.Exit == 0 && json.Unmarshal(res.Stdout, &s) == nil && ok(s) {
			return s
		}
		if time.Now().After(deadline) {
			g.t.Fatalf("not %s: %+v\n%s", what, s.State, res.Stderr)
		}
	}
}

// confirmed waits until livepatch n is loaded and confirmed, by klatchd and by
// the loader.
func (g *machine) confirmed(n livepatch.Sequence) agent.Status {
	g.t.Helper()
	return g.until(fmt.Sprintf("confirmed at %d", n), func(s agent.Status) bool {
		if s.State.State == "failed" || s.State.State == "suspect" {
			g.t.Fatalf("livepatch %d: %+v", n, s.State)
		}
		return s.State.State == "confirmed" && s.State.Phase == wire.Idle && s.State.Sequence == n && s.State.Highest == n &&
			s.Loader != nil && s.Loader.Attempt == nil
	})
}

// enabled lists the livepatches in the kernel that are enabled.
func (g *machine) enabled() string {
	g.t.Helper()
	return g.sh(`cd /sys/kernel/livepatch && for p in *; do [ "$(cat $p/enabled 2>/dev/null)" = 1 ] && echo $p; done; true`)
}

// checks runs the programs that show the flaws: true where a flaw shows.
func (g *machine) checks(want ...bool) {
	g.t.Helper()
	for i, f := range demo.Fixes {
		res := g.try(lab.FilesDir + "/check-" + f.CVE)
		if shows := res.Exit == 1; res.Exit > 1 || shows != want[i] {
			g.t.Errorf("%s: the check ended with %d, the flaw should show: %v\n%s%s", f.CVE, res.Exit, want[i], res.Stdout, res.Stderr)
		}
	}
}

// footprint is all that a load may change: the kernel, the loader's journal
// and its store.
func (g *machine) footprint() string {
	g.t.Helper()
	return g.sh(`cd /sys/kernel/livepatch && grep -r . . 2>/dev/null | sort; grep -o '^klatch[^ ]*' /proc/modules | sort
find /var/lib/klatch-loader -type f | sort | xargs sha256sum`)
}

// said is the answer of the kit's hostile client.
type said struct {
	Kind   fault.Kind       `json:"kind"`
	Code   fault.Code       `json:"code"`
	Text   string           `json:"text"`
	Status loaderapi.Status `json:"status"`
	Stacks int              `json:"stacks"`
}

// give hands two files to the loader as user klatch, past klatchd.
func (g *machine) give(b livepatch.Bundle) said {
	g.t.Helper()
	g.put("/tmp/manifest", b.Manifest)
	g.put("/tmp/module", b.Module)
	return g.hostile("klatch", "load", "/tmp/manifest", "/tmp/module")
}

// hostile runs the kit's program as a user.
func (g *machine) hostile(user string, args ...string) said {
	g.t.Helper()
	var a said
	out := g.run(append([]string{"runuser", "-u", user, "--", hostile}, args...)...)
	if err := json.Unmarshal([]byte(out), &a); err != nil {
		g.t.Fatalf("%v: %v: %s", args, err, out)
	}
	return a
}

// restart does one of the machine's restarts and waits for systemd.
func (g *machine) restart(how func(context.Context) error) {
	g.t.Helper()
	if err := how(g.t.Context()); err != nil {
		g.t.Fatal(err)
	}
	g.settled()
}
