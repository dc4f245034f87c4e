// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/livepatch"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/machine/loaderclient"
	"klatch/internal/testkit"
	"klatch/internal/testkit/klpfake"
	"klatch/internal/testkit/signed"
	"klatch/internal/trustsign"
)

var build = kernel.Build{Arch: kernel.AMD64, Release: "6.1.0-56-cloud-amd64", ID: kernel.BuildID{7}}

// TestKill kills the loader at each call of each kind that changes something,
// one run for each, starts it again and lets the daemon repeat its step. The
// machine must end as if nothing had happened. TestFullDisk lets the same
// calls fail instead.
// In go test a sample runs, with the build tag system all of them.
func TestKill(t *testing.T)     { everyCall(t, "signal=SIGKILL") }
func TestFullDisk(t *testing.T) { everyCall(t, "error=ENOSPC") }

func everyCall(t *testing.T, injection string) {
	testkit.Need(t, "strace")
	t.Parallel()
	w := newWorld(t)
	calm, hit := w.journey(t, "")
	if hit {
		t.Fatal("disturbed without an injection")
	}
	calls := []string{"fsync", "renameat", "unlinkat", "mkdirat", "fchmod", "write", "openat"}
	if injection != "signal=SIGKILL" {
		calls = []string{"fsync", "renameat", "mkdirat", "write", "openat"}
	}
	for _, call := range calls {
		step := every
		if call == "openat" { // mostly opened for reading
			step *= 4
		}
		n := 1
		for ; ; n += step {
			end, hit := w.journey(t, fmt.Sprintf("%s:%s:when=%d", call, injection, n))
			if end != calm {
				t.Errorf("%s number %d: the machine ends differently\n--- calm\n%s\n--- disturbed\n%s", call, n, calm, end)
			}
			if !hit {
				break
			}
			if t.Failed() {
				return
			}
		}
		t.Logf("%s: disturbed at %d places", call, (n-1+step-1)/step)
	}
}

// world is what does not differ between runs.
type world struct {
	program string
	anchor  []byte
	files   map[livepatch.Sequence][2][]byte
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{program: filepath.Join(t.TempDir(), "klatch-loader-fake"), files: map[livepatch.Sequence][2][]byte{}}
	if out, err := exec.Command("go", "build", "-o", w.program, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	p, err := signed.NewPublisher("kill test")
	check(t, err)
	w.anchor, err = trustsign.Anchor(p.Anchor())
	check(t, err)
	for n := range livepatch.Sequence(3) {
		manifest, module, err := p.Livepatch(build, n+1)
		check(t, err)
		w.files[n+1] = [2][]byte{manifest, module}
	}
	return w
}

// machine is one run.
type machine struct {
	*testing.T
	*world
	dir, inject string
	hit         bool // the injection showed
	process     *exec.Cmd
	says        *bufio.Reader
	died        chan struct{}
	client      *loaderclient.Client
}

// journey loads 1 and 2, cancels 3, reboots, and tells how the machine ends.
func (w *world) journey(t *testing.T, inject string) (end string, hit bool) {
	t.Helper()
	dir, err := os.MkdirTemp("", "klatch-kill-")
	check(t, err)
	defer os.RemoveAll(dir)
	for _, d := range []string{"kernel", "state", "etc"} {
		check(t, os.Mkdir(filepath.Join(dir, d), 0o700))
	}
	check(t, os.WriteFile(filepath.Join(dir, "etc/trust.json"), w.anchor, 0o600))
	for n, f := range w.files {
		check(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.manifest", n)), f[0], 0o600))
		check(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.ko", n)), f[1], 0o600))
	}
	k, err := klpfake.New(filepath.Join(dir, "kernel"), build, "boot-1")
	check(t, err)
	m := &machine{T: t, world: w, dir: dir, inject: inject, client: loaderclient.Dial(filepath.Join(dir, "sock"))}
	defer m.stop()

	m.load(1)
	m.confirm(1)
	m.load(2)
	m.confirm(2)
	check(t, k.Change(func(s *klpfake.State) { s.Hold = true }))
	m.load(3)
	m.step("cancel", "not_loaded", func(ctx context.Context) (loaderapi.Status, error) { return m.client.Cancel(ctx, 3) })
	check(t, k.Change(func(s *klpfake.State) { s.Hold = false }))
	m.settle(2)

	m.stop()
	check(t, k.Reboot("boot-2"))
	m.boot()
	m.confirm(2)
	m.stop()
	return m.end(k), m.hit
}

func (m *machine) load(n livepatch.Sequence) {
	m.step("load", "sequence_same", func(ctx context.Context) (loaderapi.Status, error) {
		manifest, err := os.Open(filepath.Join(m.dir, fmt.Sprintf("%d.manifest", n)))
		check(m, err)
		defer manifest.Close()
		module, err := os.Open(filepath.Join(m.dir, fmt.Sprintf("%d.ko", n)))
		check(m, err)
		defer module.Close()
		return m.client.Load(ctx, manifest, module)
	})
}

func (m *machine) confirm(n livepatch.Sequence) {
	m.settle(n)
	m.step("confirm", "", func(ctx context.Context) (loaderapi.Status, error) { return m.client.Confirm(ctx, n) })
}

func (m *machine) settle(n livepatch.Sequence) {
	for range 20 {
		st := m.step("status", "", func(ctx context.Context) (loaderapi.Status, error) { return m.client.Status(ctx) })
		if l := st.Loaded; l != nil && l.Sequence == n && !l.Transition {
			return
		}
	}
	m.Fatalf("%s: sequence %d does not settle", m.inject, n)
}

// step does one request as klatchd does: a loader that is gone is started
// again and asked again; the code says that it was done the first time.
func (m *machine) step(name string, done fault.Code, ask func(context.Context) (loaderapi.Status, error)) loaderapi.Status {
	m.Helper()
	var err error
	for range 4 {
		m.start()
		ctx, cancel := context.WithTimeout(m.Context(), 20*time.Second)
		var st loaderapi.Status
		st, err = ask(ctx)
		cancel()
		if err == nil || done != "" && m.hit && fault.CodeOf(err) == done {
			return st
		}
		if m.inject == "" {
			break
		}
		m.hit = true
		m.stop()
		m.inject = "" // once is enough
	}
	m.Fatalf("%s: %v", name, err)
	return loaderapi.Status{}
}

// start starts the loader if it does not run, and waits for its socket.
func (m *machine) start() {
	m.Helper()
	if m.process != nil {
		return
	}
	for range 3 {
		if m.run("serve", filepath.Join(m.dir, "sock")); m.listens() {
			return
		}
		m.hit, m.inject = true, ""
		m.stop()
	}
	m.Fatal("the loader does not listen")
}

func (m *machine) boot() {
	m.Helper()
	for range 3 {
		m.run("boot")
		<-m.died
		ok := m.process.ProcessState.Success()
		m.stop()
		if ok {
			return
		}
		m.hit, m.inject = true, ""
	}
	m.Fatal("boot does not succeed")
}

func (m *machine) run(args ...string) {
	m.Helper()
	args = append([]string{m.program, m.dir}, args...)
	if m.inject != "" {
		call, _, _ := strings.Cut(m.inject, ":")
		args = append([]string{"strace", "-f", "-qq", "-o", filepath.Join(m.dir, "trace"), "-e", "trace=" + call, "-e", "inject=" + m.inject}, args...)
	}
	m.process = exec.Command(args[0], args[1:]...)
	m.process.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, in, err := os.Pipe()
	check(m, err)
	m.process.Stdout, m.says = in, bufio.NewReader(out)
	check(m, m.process.Start())
	check(m, in.Close())
	m.died = make(chan struct{})
	go func(p *exec.Cmd, died chan struct{}) {
		_ = p.Wait()
		close(died)
	}(m.process, m.died)
}

// listens waits until the loader says so; false where it died before.
func (m *machine) listens() bool {
	line, _ := m.says.ReadString('\n')
	return line == "listening\n"
}

func (m *machine) stop() {
	if m.process == nil {
		return
	}
	_ = syscall.Kill(-m.process.Process.Pid, syscall.SIGKILL) // the group that run made
	<-m.died
	m.process = nil
	if b, err := os.ReadFile(filepath.Join(m.dir, "trace")); err == nil && strings.Contains(string(b), "(INJECTED)") {
		m.hit = true
	}
}

// end describes the machine without what may differ.
func (m *machine) end(k *klpfake.Kernel) string {
	m.Helper()
	var all strings.Builder
	s, err := k.Read()
	check(m, err)
	s.Left = 0
	b, err := json.MarshalIndent(s, "", " ")
	check(m, err)
	all.Write(b)
	check(m, filepath.WalkDir(filepath.Join(m.dir, "state"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		text := strconv.Itoa(len(b)) + " bytes"
		if strings.HasSuffix(path, ".json") {
			text = string(b)
		}
		name, _ := filepath.Rel(m.dir, path)
		fmt.Fprintf(&all, "%s: %s\n", name, text)
		return err
	}))
	return all.String()
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatal(err)
	}
}
