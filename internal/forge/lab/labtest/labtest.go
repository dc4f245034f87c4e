// SPDX-License-Identifier: Apache-2.0

// Package labtest is the conformance suite of rigs: a driver that passes it
// may be used for the gate. Start with Run.
package labtest

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"klatch/internal/forge/lab"
)

// limit of one test. Emulated machines on a busy host are slow.
const limit = 4 * time.Minute

// Run runs the suite. The spec must be good; its rig makes the small guest
// or a full one.
func Run(t *testing.T, rig lab.Rig, good lab.Spec) {
	content := bytes.Repeat([]byte("a line of a file\n"), 1000)
	good.Files = append(good.Files, lab.File{Name: "conformance/data", Data: content},
		lab.File{Name: "conformance/tool", Data: []byte("#!/bin/sh\necho \"tool says $1\"\n"), Mode: 0o755})
	if good.Network == lab.NoNetwork && good.Root != "" {
		good.Network = lab.Isolated
	}
	ctx := withLimit(t)
	m, err := rig.Boot(ctx, good)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})

	t.Run("a program's output, status and input arrive", func(t *testing.T) { testRun(t, m) })
	t.Run("files of the spec are in the guest", func(t *testing.T) {
		if got := sh(t, m, "wc -c < /lab/conformance/data; /lab/conformance/tool hello"); got != "17000\ntool says hello\n" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("a put file is complete and has its mode", func(t *testing.T) { testPut(t, m) })
	t.Run("a program over its time limit is killed with its children", func(t *testing.T) { testTimeout(t, m) })
	t.Run("output over its limit is cut, not waited for", func(t *testing.T) { testTruncate(t, m) })
	t.Run("commands run side by side", func(t *testing.T) { testParallel(t, m) })
	t.Run("the console holds what the kernel printed", func(t *testing.T) {
		sh(t, m, "echo 'klatch conformance mark' > /dev/kmsg")
		text, err := m.Console()
		if err != nil || !strings.Contains(text, "Linux version ") || !strings.Contains(text, "klatch conformance mark") {
			t.Errorf("console (error %v):\n%s", err, text)
		}
	})
	t.Run("a clean boot is no trouble", func(t *testing.T) {
		text, err := m.Console()
		if err != nil {
			t.Fatal(err)
		}
		if v, troubles := lab.Judge(nil, text); v != lab.Pass {
			t.Errorf("verdict %s: %+v", v, troubles)
		}
	})
	for name, restart := range map[string]func(context.Context) error{
		"reboot": m.Reboot, "reset": m.Reset, "power cut": m.PowerCut,
	} {
		t.Run(name+" gives another boot id", func(t *testing.T) {
			before := m.BootID()
			if err := restart(withLimit(t)); err != nil {
				t.Fatal(err)
			}
			after := strings.TrimSpace(sh(t, m, "cat /proc/sys/kernel/random/boot_id"))
			if before == "" || before == after || m.BootID() != after {
				t.Errorf("boot id %q, then %q, BootID says %q", before, after, m.BootID())
			}
		})
	}
	if tunable, ok := m.(lab.Tunable); ok {
		t.Run("the next start's command line ends with other words", func(t *testing.T) {
			tunable.Append("klatch.test=1")
			if err := m.Reset(withLimit(t)); err != nil {
				t.Fatal(err)
			}
			if got := sh(t, m, "cat /proc/cmdline"); !strings.HasSuffix(got, " klatch.test=1\n") {
				t.Errorf("command line %q", got)
			}
			tunable.Append(good.Append...)
		})
	}
	t.Run("a guest that crashes fails the livepatch, not the lab", func(t *testing.T) { testCrash(t, m) })
	t.Run("a closed machine is broken", func(t *testing.T) {
		if err := errors.Join(m.Close(), m.Close()); err != nil {
			t.Fatal(err)
		}
		_, err := m.Run(withLimit(t), lab.Command{Argv: []string{"true"}})
		Broken(t, err)
	})
}

func testRun(t *testing.T, m lab.Machine) {
	res, err := m.Run(withLimit(t), lab.Command{Argv: []string{"sh", "-c", "cat; echo err >&2; echo $WORD; exit 7"},
		Stdin: []byte("in\n"), Env: []string{"WORD=word"}})
	if err != nil {
		t.Fatal(err)
	}
	if res.Exit != 7 || string(res.Stdout) != "in\nword\n" || string(res.Stderr) != "err\n" || res.TimedOut || res.Truncated {
		t.Errorf("got %+v", res)
	}
	res, err = m.Run(withLimit(t), lab.Command{Argv: []string{"no-such-program"}})
	if err != nil || res.Exit != 127 || len(res.Stderr) == 0 {
		t.Errorf("program that does not exist: %+v, %v", res, err)
	}
	res, err = m.Run(withLimit(t), lab.Command{Argv: []string{"sh", "-c", "kill -9 $$"}})
	if err != nil || res.Exit != 128+9 {
		t.Errorf("killed program: %+v, %v", res, err)
	}
	large := bytes.Repeat([]byte("0123456789abcdef"), 16<<10) // 256 KiB in both directions
	res, err = m.Run(withLimit(t), lab.Command{Argv: []string{"cat"}, Stdin: large})
	if err != nil || !bytes.Equal(res.Stdout, large) {
		t.Errorf("large input: %d bytes back, want %d, %v", len(res.Stdout), len(large), err)
	}
}

func testPut(t *testing.T, m lab.Machine) {
	content := bytes.Repeat([]byte{0, 1, 2, '\n', 0xff, 0x11, 0x13}, 20_000)
	for _, c := range [][]byte{content, nil} {
		began := time.Now()
		if err := m.Put(withLimit(t), "/tmp/put", 0o750, bytes.NewReader(c)); err != nil {
			t.Fatal(err)
		}
		t.Logf("put of %d bytes took %v", len(c), time.Since(began).Round(time.Millisecond))
		res, err := m.Run(withLimit(t), lab.Command{Argv: []string{"cat", "/tmp/put"}})
		if err != nil || !bytes.Equal(res.Stdout, c) {
			t.Errorf("%d bytes came back, want %d, %v", len(res.Stdout), len(c), err)
		}
	}
	if got := sh(t, m, "stat -c %a /tmp/put"); got != "750\n" {
		t.Errorf("mode %q", got)
	}
}

func testTimeout(t *testing.T, m lab.Machine) {
	res, err := m.Run(withLimit(t), lab.Command{Argv: []string{"sh", "-c", "echo started; sleep 4711 & sleep 4711"},
		Timeout: 2 * time.Second})
	if err != nil || !res.TimedOut || string(res.Stdout) != "started\n" || res.Exit != 128+9 {
		t.Errorf("got %+v, %v", res, err)
	}
	if got := sh(t, m, "pidof sleep | wc -w"); got != "0\n" {
		t.Errorf("still there: %q", got)
	}
}

func testTruncate(t *testing.T, m lab.Machine) {
	res, err := m.Run(withLimit(t), lab.Command{Argv: []string{"sh", "-c", "i=0; while [ $i -lt 2000 ]; do echo 0123456789; i=$((i+1)); done"},
		MaxOutput: 1000})
	if err != nil || res.Exit != 0 || !res.Truncated || len(res.Stdout) != 1000 {
		t.Errorf("exit %d, truncated %v, %d bytes, %v", res.Exit, res.Truncated, len(res.Stdout), err)
	}
}

func testParallel(t *testing.T, m lab.Machine) {
	began := time.Now()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if res, err := m.Run(withLimit(t), lab.Command{Argv: []string{"sleep", "3"}}); err != nil || res.Exit != 0 {
				t.Errorf("got %+v, %v", res, err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("4 sleeps of 3 s took %v", took)
	}
}

// testCrash: the guest's end under a command is told by the console.
func testCrash(t *testing.T, m lab.Machine) {
	before, err := m.Console()
	if err != nil {
		t.Fatal(err)
	}
	bootID := m.BootID()
	_, err = m.Run(withLimit(t), lab.Command{Argv: []string{"sh", "-c", "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger"}})
	if !errors.Is(err, lab.ErrGuestRebooted) {
		t.Fatalf("got %v, want %v", err, lab.ErrGuestRebooted)
	}
	if err := m.Await(withLimit(t), bootID); err != nil {
		t.Fatal(err)
	}
	text, cerr := m.Console()
	if cerr != nil {
		t.Fatal(cerr)
	}
	v, troubles := lab.Judge(err, strings.TrimPrefix(text, before))
	if v != lab.Fail || len(troubles) == 0 {
		t.Errorf("verdict %s: %+v", v, troubles)
	}
}

// RunBroken checks that a lab that is broken on purpose says so. Each case
// breaks a good machine in its own way and gives the error.
func RunBroken(t *testing.T, rig lab.Rig, cases map[string]func(ctx context.Context, rig lab.Rig) error) {
	for name, breakIt := range cases {
		t.Run(name, func(t *testing.T) { Broken(t, breakIt(withLimit(t), rig)) })
	}
}

// Broken fails the test unless the error blames the lab and nobody else.
func Broken(t *testing.T, err error) {
	t.Helper()
	if err == nil {
		t.Fatal("a broken lab gave no error")
	}
	t.Log(err)
	if _, ok := errors.AsType[*lab.BrokenError](err); !ok {
		t.Errorf("not a BrokenError: %v", err)
	}
	if v, _ := lab.Judge(err, ""); v != lab.Broken {
		t.Errorf("verdict %s, want broken: %v", v, err)
	}
}

// GuestProgram builds the smallest guest program and gives its path.
func GuestProgram(t testing.TB) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "guestmain")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out,
		"klatch/internal/forge/lab/guest/testdata/guestmain")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build guest program: %v\n%s", err, msg)
	}
	return out
}

func sh(t *testing.T, m lab.Machine, script string) string {
	t.Helper()
	res, err := m.Run(withLimit(t), lab.Command{Argv: []string{"sh", "-c", script}})
	if err != nil || res.Exit != 0 {
		t.Fatalf("%s: exit status %d, %v\n%s", script, res.Exit, err, res.Stderr)
	}
	return string(res.Stdout)
}

func withLimit(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}
