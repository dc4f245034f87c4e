// SPDX-License-Identifier: Apache-2.0

//go:build system

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/forge/catalog"
	"klatch/internal/forge/flood"
	"klatch/internal/kernel"
	"klatch/internal/machine/agent"
	"klatch/internal/machine/agent/agenttest"
	"klatch/internal/machine/local"
	"klatch/internal/notice"
	"klatch/internal/testkit"
	"klatch/internal/tufrepo"
	"klatch/internal/wire"
)

// programs are real ones in a folder.
type programs struct {
	t   *testing.T
	dir string
}

func buildPrograms(t *testing.T, names ...string) programs {
	t.Helper()
	p := programs{t, t.TempDir()}
	args := []string{"build", "-o", p.dir}
	for _, n := range names {
		args = append(args, "klatch/cmd/"+n)
	}
	if out, err := exec.CommandContext(t.Context(), "go", args...).CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return p
}

// run runs one to its end and wants an exit status.
func (p programs) run(want int, name string, args ...string) string {
	p.t.Helper()
	out, err := exec.CommandContext(p.t.Context(), filepath.Join(p.dir, name), args...).CombinedOutput()
	status := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		status = exit.ExitCode()
	} else if err != nil {
		p.t.Fatal(err)
	}
	if status != want {
		p.t.Fatalf("%s %s: exit status %d, want %d\n%s", name, strings.Join(args, " "), status, want, out)
	}
	return string(out)
}

// running gives a captured machine another kernel.
func running(t *testing.T, release string, first byte) *agenttest.Machine {
	t.Helper()
	m := agenttest.NewMachine(t)
	m.Kernel.Release, m.Kernel.ID[0] = kernel.Release(release), first
	m.Write("proc/sys/kernel/osrelease", release+"\n")
	m.Write("sys/kernel/notes", "\x04\x00\x00\x00\x14\x00\x00\x00\x03\x00\x00\x00GNU\x00"+string(m.Kernel.ID[:]))
	m.Write("boot/vmlinuz-"+release, "")
	return m
}

// TestAPublishersNoticeReachesItsMachines goes through every program: the
// publisher declares a kernel and those before it dead and has a CVE that was
// refused, klatch-server copies, klatchd verifies, klatch status says so on
// the two kernels that are meant, and on no newer one.
func TestAPublishersNoticeReachesItsMachines(t *testing.T) {
	testkit.Need(t, "root") // enrolling is for root
	p := buildPrograms(t, "klatch-forge", "klatch-server", "klatch-fleet", "klatch")
	data, serverData := filepath.Join(p.dir, "publisher"), filepath.Join(p.dir, "server")
	tokenFile := filepath.Join(p.dir, "admin-token")
	forge := func(args ...string) string {
		t.Helper()
		return p.run(0, "klatch-forge", append([]string{"--dir", data}, args...)...)
	}
	p.run(0, "klatch-forge", "init", data, "--profile", "lab")
	machines := map[string]*agenttest.Machine{
		"older": running(t, "6.1.0-48-cloud-amd64", 48), "dead": running(t, "6.1.0-50-cloud-amd64", 50), "newer": running(t, "6.1.0-54-cloud-amd64", 54),
	}
	for who, version := range map[string]string{"older": "6.1.172-1", "dead": "6.1.176-1", "newer": "6.1.190-1"} {
		k := machines[who].Kernel
		if err := catalog.Save(data, catalog.Entry{Release: k.Release, Distro: k.Distro, Arch: k.Arch, BuildID: k.ID,
			Series: "debian-6.1", Version: version, SourceV: version}); err != nil {
			t.Fatal(err)
		}
	}
	refuse := func(ids ...flood.Entry) {
		t.Helper()
		k := machines["dead"].Kernel
		b, err := json.Marshal(flood.Ledger{Version: 1, Kernel: k.Release, BuildID: k.ID, From: "6.1.176-1", To: "6.1.190-1", Policy: "default", Entries: ids})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.MkdirAll(filepath.Join(data, "ledger"), 0o755), os.WriteFile(filepath.Join(data, "ledger", "x.json"), b, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	refuse(flood.Entry{CVE: "CVE-2026-0003", Status: flood.Refused, Code: "layout_changed", Reason: "the layout of a type changes", File: "net/unix/af_unix.c"})
	forge("kernel", "support", "--kernel", "6.1.0-54-cloud-amd64", "--until", time.Now().AddDate(0, 0, 30).UTC().Format(time.DateOnly))
	forge("kernel", "end", "--kernel", "6.1.0-50-cloud-amd64", "--older", "--reason", "too many open CVEs", "--instead", "6.1.0-54-cloud-amd64")
	forge("publish")
	if out := forge("publish"); !strings.Contains(out, "unchanged") {
		t.Errorf("publishing the same again: %s", out)
	}

	p.run(0, "klatch-server", "init", "--data", serverData, "--name", "127.0.0.1", "--anchor", filepath.Join(data, "trust.json"), "--allow-lab", "--admin-token-file", tokenFile)
	sync := func() {
		t.Helper()
		p.run(0, "klatch-server", "sync", "--data", serverData, "--from", filepath.Join(data, "repository"))
	}
	sync()
	server := exec.CommandContext(t.Context(), filepath.Join(p.dir, "klatch-server"), "serve", "--data", serverData, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0")
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Process.Kill(); _ = server.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	at := ready.FindStringSubmatch(line)
	if err != nil || at == nil {
		t.Fatalf("ready line %q, %v", line, err)
	}
	anchor, err := os.ReadFile(filepath.Join(data, "trust.json"))
	if err != nil {
		t.Fatal(err)
	}
	rigs := map[string]*rig{}
	for who, m := range machines {
		r := &rig{t: t, machine: m, state: filepath.Join(t.TempDir(), "state"), socket: filepath.Join(agenttest.ShortDir(t), "klatchd.sock")}
		m.Write("etc/klatch/trust.json", string(anchor))
		m.Write("etc/klatch/allow-lab-keys", "")
		m.Write("etc/klatch/conf.d/50-test.toml", "check_interval = \"5s\"\n")
		r.loader = agenttest.ServeLoader(t, m)
		t.Cleanup(r.kill)
		r.start()
		r.until("not enrolled", func(s agent.Status) bool { return s.State.State == "not_enrolled" })
		created := p.run(0, "klatch-fleet", "token", "create", "--server", at[2], "--token-file", tokenFile)
		token := regexp.MustCompile(`klatch1\.\S+`).FindString(created)
		if _, err := local.Dial(r.socket).Enroll(t.Context(), local.EnrollRequest{Server: at[1], Token: wire.Token(token)}); err != nil {
			t.Fatal(err)
		}
		rigs[who] = r
	}
	status := func(who string, want int, args ...string) string {
		t.Helper()
		r := rigs[who]
		return p.run(want, "klatch", append([]string{"--root", r.machine.Root, "--daemon", r.socket, "status"}, args...)...)
	}
	for who, r := range rigs {
		r.until("told", func(s agent.Status) bool { return s.Notice != nil })
		var s agent.Status
		if err := json.Unmarshal([]byte(status(who, 0, "--json")), &s); err != nil || s.Notice == nil {
			t.Fatalf("%s: %v", who, err)
		}
		text := status(who, map[bool]int{true: 4, false: 0}[who != "newer"], "--check")
		ends := strings.Contains(text, "kernel upgrade required") && strings.Contains(text, "too many open CVEs") && strings.Contains(text, "run 6.1.0-54-cloud-amd64 or newer")
		refused := strings.Contains(text, "CVE-2026-0003 (layout_changed): net/unix/af_unix.c: the layout of a type changes; update and reboot")
		switch who {
		case "newer":
			if s.State.State != "no_livepatch" || s.Notice.Support != notice.Ending || len(s.Notice.CVEs) != 0 || s.Reboot.Level != "none" ||
				strings.Contains(text, "upgrade") || strings.Contains(text, "CVE-2026-0003") || !strings.Contains(text, "supported only until "+s.Notice.Until) {
				t.Errorf("a newer kernel was told %+v\n%s", s.Notice, text)
			}
		default:
			if s.State.State != "kernel_ended" || s.State.Reason != "declared_dead" || !ends || refused != (who == "dead") ||
				s.Notice.Through != "6.1.0-50-cloud-amd64" || s.Notice.Instead != "6.1.0-54-cloud-amd64" {
				t.Errorf("%s: %+v\n%s", who, s.Notice, text)
			}
		}
	}
	// The server hears of it at the next check.
	told := regexp.MustCompile(`"support":\s*"ended",\s*"ended":\s*"[-0-9]{10}",\s*"instead":\s*"6.1.0-54-cloud-amd64",\s*"reboots":\s*1,\s*"cves":\s*\[\s*"CVE-2026-0003"\s*\]`)
	list := ""
	for until := time.Now().Add(time.Minute); (!told.MatchString(list) || strings.Count(list, `"support":`) < len(rigs)) && time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
		list = p.run(0, "klatch-fleet", "machines", "--server", at[2], "--token-file", tokenFile, "--json")
	}
	if !told.MatchString(list) {
		t.Errorf("the fleet says\n%s", list)
	}

	for days, want := range map[string]string{"10": "2 of 3 machines must get another kernel within 10 days; of 0 nothing is known", "40": "3 of 3 machines must"} {
		if list := p.run(4, "klatch-fleet", "machines", "--ending", days, "--server", at[2], "--token-file", tokenFile); !strings.Contains(list, want) {
			t.Errorf("forecast of %s days:\n%s", days, list)
		}
	}

	// Said anew; but the server's copy was changed on its disk.
	old := notice.TargetPath(machines["dead"].Kernel)
	blobs := func() []string {
		found, err := filepath.Glob(filepath.Join(serverData, "repository", "targets", filepath.Dir(old), "*."+filepath.Base(old)))
		if err != nil || len(found) == 0 {
			t.Fatalf("blobs: %v, %v", found, err)
		}
		return found
	}
	before := blobs()
	refuse(flood.Entry{CVE: "CVE-2026-0004", Status: flood.Refused, Code: "init_code", Reason: "runs at boot only"})
	forge("publish")
	// Tampered before klatchd can see it: sync verifies what it copies, and the
	// file is changed while klatchd is stopped.
	rigs["dead"].kill()
	sync()
	for _, b := range blobs() {
		if b == before[0] {
			continue
		}
		content, err := os.ReadFile(b)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(b, []byte(strings.Replace(string(content), "CVE-2026-0004", "CVE-2026-0005", 1)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	rigs["dead"].start()
	s := rigs["dead"].until("refused", func(s agent.Status) bool { return s.State.State == "check_failed" && s.Check.Kind == fault.Untrusted })
	if s.State.Reason != "target_digest" || s.Notice == nil || len(s.Notice.CVEs) != 1 || s.Notice.CVEs[0].ID != "CVE-2026-0003" {
		t.Errorf("state %+v, notice %+v; want the one before", s.State, s.Notice)
	}
}

// TestNoticesThatARealDaemonRefuses: what a publisher signed and is wrong, and
// what a mirror does not have.
func TestNoticesThatARealDaemonRefuses(t *testing.T) {
	signed := func(r *rig, n notice.Notice, path kernel.Build) {
		r.t.Helper()
		n.Format = notice.Format
		b, err := n.Encode()
		if err != nil {
			r.t.Fatal(err)
		}
		r.fleet.Repo.Publish(time.Now(), tufrepo.Target{Path: notice.TargetPath(path), Content: b, Replace: true})
	}
	dead := func(k kernel.Build) notice.Notice {
		return notice.Notice{Kernel: k, Support: notice.Support{Ended: "2026-01-01", Reason: "for another"}}
	}
	for _, tt := range []struct {
		name string
		lie  func(r *rig)
		good func(s agent.Status) bool
	}{
		{"on another kernel build", func(r *rig) {
			k := r.machine.Kernel
			k.ID[5] ^= 1
			signed(r, dead(k), r.machine.Kernel)
		}, func(s agent.Status) bool { return s.State.State == "check_failed" && s.State.Reason == "wrong_build" }},
		{"in a form that nobody wrote", func(r *rig) {
			r.fleet.Repo.Publish(time.Now(), tufrepo.Target{Path: notice.TargetPath(r.machine.Kernel), Content: []byte("{}"), Replace: true})
		}, func(s agent.Status) bool {
			return s.State.State == "check_failed" && s.State.Reason == "notice_malformed"
		}},
		{"signed and not on the mirror", func(r *rig) {
			signed(r, dead(r.machine.Kernel), r.machine.Kernel)
			path := notice.TargetPath(r.machine.Kernel)
			found, err := filepath.Glob(filepath.Join(r.fleet.Repo.Dir, "targets", filepath.Dir(path), "*."+filepath.Base(path)))
			if err != nil {
				r.t.Fatal(err)
			}
			for _, f := range found {
				rel, err := filepath.Rel(r.fleet.Repo.Dir, f)
				if err != nil {
					r.t.Fatal(err)
				}
				r.fleet.Repo.Lie("/"+filepath.ToSlash(rel), http.NotFound)
			}
		}, func(s agent.Status) bool {
			return confirmed(s) && len(s.Problems) == 1 && strings.Contains(s.Problems[0], "what the publisher says of this kernel")
		}},
		{"on no mirror and by no publisher", func(r *rig) { r.fleet.Repo.Publish(time.Now()) }, confirmed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.enroll()
			tt.lie(r)
			r.fleet.Publish(r.machine.Kernel, 1, "CVE-2026-0001")
			r.start()
			s := r.until(tt.name, func(s agent.Status) bool { return s.State.Sequence == 1 && s.State.Highest == 1 && tt.good(s) })
			if s.Notice != nil || s.State.Notice != nil {
				t.Errorf("believed %+v", s.Notice)
			}
			if _, err := os.Stat(filepath.Join(r.state, "notice.json")); err == nil {
				t.Error("what was refused is on disk")
			}
		})
	}
}
