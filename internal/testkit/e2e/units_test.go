// SPDX-License-Identifier: Apache-2.0

//go:build vm

package e2e

import (
	"regexp"
	"strconv"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
	"klatch/internal/machine/agent"
)

// capabilities by their number (capability.h).
var capabilities = map[int]string{2: "dac_read_search", 16: "sys_module", 19: "sys_ptrace", 21: "sys_admin"}

// capsOf names the capabilities of a set of /proc/PID/status; one that is not
// ours keeps its number.
func capsOf(t *testing.T, status, set string) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + set + `:\s*([0-9a-f]+)$`).FindStringSubmatch(status)
	if m == nil {
		t.Fatalf("no %s in\n%s", set, status)
	}
	bits, err := strconv.ParseUint(m[1], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for i := range 64 {
		if bits&(1<<i) != 0 {
			name, known := capabilities[i]
			if !known {
				name = strconv.Itoa(i)
			}
			names = append(names, name)
		}
	}
	return strings.Join(names, " ")
}

// TestVMUnits: what systemd made of the unit files, by the processes that run.
func TestVMUnits(t *testing.T) {
	m := everything(t)
	p := newPublisher(t, "e2e", m)
	s := newServer(t, m)
	s.init(p)
	s.sync(p.Dir)
	s.start()
	g := bootMachine(t, m, p)
	g.install("check_interval = \"0\"\n") // what happens, somebody has asked for
	process := func(unit string) string {
		return "/proc/" + strings.TrimSpace(g.run("systemctl", "show", "-P", "MainPID", unit))
	}

	t.Run("klatchd has no privilege", func(t *testing.T) {
		status := g.run("cat", process("klatchd.service")+"/status")
		for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
			if got := capsOf(t, status, set); got != "" {
				t.Errorf("%s: %s", set, got)
			}
		}
		uid := strings.TrimSpace(g.run("id", "-u", "klatch"))
		if uid == "0" || !strings.Contains(status, "Uid:\t"+uid+"\t"+uid+"\t"+uid+"\t"+uid+"\n") || !strings.Contains(status, "NoNewPrivs:\t1\n") || !strings.Contains(status, "Seccomp:\t2\n") {
			t.Errorf("status of klatchd, uid %s:\n%s", uid, status)
		}
		if got := g.sh("stat -c '%a %U' /var/lib/klatch"); got != "700 klatch" {
			t.Errorf("its folder: %s", got)
		}
	})
	t.Run("the loader has four capabilities and no network", func(t *testing.T) {
		g.run("klatch", "status") // wakes it
		proc := process("klatch-loader.service")
		status := g.run("cat", proc+"/status")
		const want = "dac_read_search sys_module sys_ptrace sys_admin"
		for set, want := range map[string]string{"CapInh": "", "CapPrm": want, "CapEff": want, "CapBnd": want, "CapAmb": ""} {
			if got := capsOf(t, status, set); got != want {
				t.Errorf("%s: %q, want %q", set, got, want)
			}
		}
		if !strings.Contains(status, "NoNewPrivs:\t1\n") || !strings.Contains(status, "Seccomp:\t2\n") {
			t.Errorf("status of the loader:\n%s", status)
		}
		if got := g.sh("grep -c : " + proc + "/net/dev; grep -o '^ *[^: ]*:' " + proc + "/net/dev"); strings.Join(strings.Fields(got), " ") != "1 lo:" {
			t.Errorf("its network: %q", got)
		}
		if got := g.sh("readlink " + proc + "/ns/net; readlink /proc/1/ns/net"); strings.Count(got, strings.Fields(got)[0]) != 1 {
			t.Error("it is in the machine's network namespace")
		}
		if got := g.sh("stat -c '%a %U' /var/lib/klatch-loader; stat -c '%a %U %G' /run/klatch/loader.sock"); got != "700 root\n660 root klatch" {
			t.Errorf("its folder and socket: %q", got)
		}
	})
	t.Run("systemd's own score", func(t *testing.T) {
		for unit, most := range map[string]float64{"klatchd.service": 2, "klatch-loader.service": 3, "klatch-loader-boot.service": 3} {
			out := g.run("systemd-analyze", "security", "--no-pager", unit)
			f := regexp.MustCompile(`exposure level for \S+: ([0-9.]+)`).FindStringSubmatch(out)
			if f == nil {
				t.Fatalf("%s: %s", unit, out)
			}
			score, err := strconv.ParseFloat(f[1], 64)
			if err != nil || score > most {
				t.Errorf("%s: exposure %s, at most %v\n%s", unit, f[1], most, out)
			}
			t.Logf("%s: exposure %s", unit, f[1])
		}
	})
	t.Run("an unprivileged user is refused", func(t *testing.T) {
		g.t = t
		for _, q := range [][]string{{"status"}, {"disable"}, {"load", "/etc/passwd", "/etc/passwd"}} {
			if got := g.hostile("nobody", q...); got.Code != "loader_denied" {
				t.Errorf("loader, %v: %+v", q, got)
			}
		}
		if got := g.hostile("klatch", "disable"); got.Code != "not_root" {
			t.Errorf("disable by user klatch: %+v", got)
		}
		for _, user := range []string{"nobody", "klatch"} {
			for _, path := range []string{"/v1/check", "/v1/enroll", "/v1/retry"} {
				if got := g.hostile(user, "api", "POST", path); got.Code != "root_only" {
					t.Errorf("%s to klatchd by %s: %+v", path, user, got)
				}
			}
		}
		if got := g.hostile("nobody", "api", "GET", "/v1/status"); got.Code != "" {
			t.Errorf("status for everybody: %+v", got)
		}
		if s := g.status(); s.Identity != nil || s.Check.Result != "" {
			t.Errorf("something was done: %+v", s)
		}
	})
	t.Run("klatchd works without its loader and says so", func(t *testing.T) {
		g.t = t
		g.enroll(s.fleet, s.token())
		g.run("systemctl", "stop", "klatchd.service", "klatch-loader.socket", "klatch-loader.service")
		g.run("systemctl", "mask", "--runtime", "klatch-loader.socket", "klatch-loader.service")
		g.run("systemctl", "start", "klatchd.service")
		g.try("klatch", "check")
		got := g.until("aware", func(s agent.Status) bool { return s.State.State == "check_failed" && s.Check.Result != "" })
		if got.State.Reason != "loader_unreachable" || len(got.Problems) == 0 || got.Facts.Kernel.ID.IsZero() {
			t.Errorf("status %+v, problems %v", got.State, got.Problems)
		}
		g.run("systemctl", "unmask", "--runtime", "klatch-loader.socket", "klatch-loader.service")
		g.run("systemctl", "start", "klatch-loader.socket")
		g.run("klatch", "check")
		if got := g.status(); got.State.State != "no_livepatch" {
			t.Errorf("with it again: %+v", got.State)
		}
	})
	t.Run("what loads and lists takes two capabilities", func(t *testing.T) {
		g.t = t
		const less = "/run/systemd/system/klatch-loader.service.d"
		g.run("mkdir", "-p", less)
		n := livepatch.Sequence(0)
		for _, c := range []struct {
			set  string
			kind fault.Kind // of what fails
			code fault.Code
		}{
			{"CAP_DAC_READ_SEARCH CAP_SYS_ADMIN CAP_SYS_PTRACE", fault.Denied, "kernel_lockdown"}, // no load
			{"CAP_SYS_MODULE CAP_SYS_ADMIN CAP_SYS_PTRACE", fault.Internal, ""},                   // no list of blocking tasks
			{"CAP_SYS_MODULE CAP_DAC_READ_SEARCH", "", ""},                                        // no stacks: TestVMStalled
		} {
			g.put(less+"/less.conf", []byte("[Service]\nCapabilityBoundingSet=\nCapabilityBoundingSet="+c.set+"\n"))
			g.run("systemctl", "daemon-reload")
			g.run("systemctl", "stop", "klatch-loader.service")
			var got said
			for range 3 { // until it asks while the transition runs
				n++
				b := p.livepatch(n)
				g.put("/tmp/manifest", b.Manifest)
				g.put("/tmp/module", b.Module)
				got = g.hostile("klatch", "blockers", "/tmp/manifest", "/tmp/module")
				g.sh("while grep -q 1 /sys/kernel/livepatch/*/transition 2>/dev/null; do sleep 0.2; done")
				if got.Kind != "" || got.Status.Loaded.Transition {
					break
				}
			}
			if got.Kind != c.kind || got.Code != c.code {
				t.Errorf("with %s: %+v, want kind %q, code %q", c.set, got, c.kind, c.code)
			}
		}
		g.run("rm", "-r", less)
		g.run("systemctl", "daemon-reload")
		g.run("systemctl", "stop", "klatch-loader.service")
	})
	g.t = t
}
