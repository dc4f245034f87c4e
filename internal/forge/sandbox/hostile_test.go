// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"klatch/internal/fault"
	"klatch/internal/testkit"
)

// small are limits that a hostile build reaches soon.
var small = Limits{Memory: 300 << 20, Disk: 40 << 20, Processes: 60}

// A makefile or a compiler plug-in of a hostile fix can do anything that a
// program can. Each of these ends by a limit, soon, and blames the build.
func TestAHostileBuildEndsByALimit(t *testing.T) {
	testkit.Need(t, "python3")
	python := func(script string) string { return "exec python3 -c '" + script + "'" }
	const hold = "import time, os, mmap\nM = b\"x\" * 1048576\n"
	for _, c := range []struct {
		name, script string
		code         fault.Code
	}{
		{"one process eats memory", python(hold + "a = []\nwhile True: a.append(bytearray(M))"), "memory_limit"},
		{"many small processes eat memory", "for i in 1 2 3 4 5 6 7 8; do python3 -c '" + hold + "a = M * 60\ntime.sleep(60)' & done; wait", "memory_limit"},
		{"shared memory without a file", python(hold + "m = mmap.mmap(-1, 1 << 30)\nwhile True:\n m.write(M)"), "memory_limit"},
		{"files in memory, open only", python(hold + "f = [os.memfd_create(\"x\") for i in range(12)]\nfor i in range(30): [os.write(g, M) for g in f]\ntime.sleep(60)"), "memory_limit"},
		{"temporary files", "for i in $(seq 12); do head -c 30M /dev/zero > $TMPDIR/$i; done; sleep 60", "memory_limit"},
		{"a removed temporary file", "for i in 3 4 5 6 7 8 9; do eval \"exec $i> $TMPDIR/x\"; rm $TMPDIR/x; head -c 35M /dev/zero >&$i; done; " + python(hold+"a = M * 90\ntime.sleep(60)"), "memory_limit"},
		{"a fork bomb", "f() { f | f & }; f; sleep 60", "process_limit"},
		{"a fork bomb whose parents end", "(for i in $(seq 100); do (sleep 60 &) ; done); sleep 60", "process_limit"},
		{"one file fills the disk", "head -c 30M /dev/zero > a; head -c 30M /dev/zero > b; sleep 60", "disk_limit"},
		{"a file without a name fills the disk", python(hold + "f = os.open(\"x\", os.O_RDWR | os.O_CREAT)\nos.unlink(\"x\")\ng = os.open(\"y\", os.O_RDWR | os.O_CREAT)\nos.unlink(\"y\")\n" +
			"for i in range(30): os.write(f, M); os.write(g, M)\ntime.sleep(60)"), "disk_limit"},
		{"files without content fill the disk", python(hold + "for i in range(12000): os.mknod(str(i))\ntime.sleep(60)"), "disk_limit"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Second)
			defer cancel()
			cmd := command(t, c.script)
			cmd.Limits = small
			res, err := Run(ctx, cmd)
			if fault.CodeOf(err) != c.code || fault.KindOf(err) != fault.Unavailable {
				t.Errorf("ended with status %d, %v, want %s: %s", res.Exit, err, c.code, res.Output)
			}
			if fault.HintOf(err) == "" {
				t.Errorf("no hint: %v", err)
			}
		})
	}
}

// What a limit is for must not stop what compilers do.
func TestAnHonestBuildStaysUnderTheLimits(t *testing.T) {
	cmd := command(t, "for i in 1 2 3 4 5 6 7 8; do (head -c 1M /dev/zero > f$i; cat f$i > $TMPDIR/$i; rm $TMPDIR/$i; sleep 0.5) & done; wait; echo done")
	cmd.Limits = small
	res, err := Run(t.Context(), cmd)
	if err != nil || string(res.Output) != "done\n" {
		t.Errorf("status %d, %v: %s", res.Exit, err, res.Output)
	}
}

func TestMuchOutputIsCut(t *testing.T) {
	res, err := Run(t.Context(), command(t, "echo first; yes 0123456789 | head -c 20000000"))
	if err != nil || res.Exit != 0 {
		t.Errorf("status %d, %v", res.Exit, err)
	}
	if n := len(res.Output); n < 1<<20 || n > 2*maxOutput || strings.HasPrefix(string(res.Output), "first") {
		t.Errorf("kept %d bytes, want the last %d", n, maxOutput)
	}
}

// A program that ends leaves nothing behind, whatever it did to hide.
func TestNothingRunsOnAfterTheProgram(t *testing.T) {
	mark := fmt.Sprintf("%d.%d", 86400+os.Getpid(), time.Now().UnixNano()%1e6)
	res, err := Run(t.Context(), command(t, "setsid nohup sleep "+mark+" >/dev/null 2>&1 </dev/null & (sleep "+mark+" &) ; sleep 0.2; echo done"))
	if err != nil || !strings.HasSuffix(string(res.Output), "done\n") {
		t.Fatalf("status %d, %v: %s", res.Exit, err, res.Output)
	}
	if left := running(mark); len(left) > 0 {
		t.Errorf("left running: %v", left)
	}
}

func running(mark string) []string {
	var out []string
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), mark) {
			out = append(out, fmt.Sprintf("%s: %q", f, b))
		}
	}
	return out
}

const callerEnv = "KLATCH_TEST_CALLER"

// kill -9 of the one who builds ends what it started, though that runs as
// another user by then.
func TestAKilledCallerLeavesNothing(t *testing.T) {
	mark := fmt.Sprintf("%d.%d", 86400+os.Getpid(), time.Now().UnixNano()%1e6)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), callerEnv+"=sleep "+mark+" & exec sleep "+mark)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	withinTime(t, "the programs to start", func() bool { return len(running("sleep\x00"+mark)) == 2 })
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	withinTime(t, "the programs to end", func() bool { return len(running("sleep\x00"+mark)) == 0 })
}

func withinTime(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func TestNoSecretsAndNoNetwork(t *testing.T) {
	testkit.Need(t, "root", "python3")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	reached := make(chan bool, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			reached <- true
			_ = c.Close()
		}
	}()
	keys := filepath.Join(tempDir(t), "keys")
	if err := errors.Join(os.Mkdir(keys, 0o700), os.WriteFile(filepath.Join(keys, "module.key"), []byte("SECRET"), 0o600)); err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	cmd := command(t, fmt.Sprintf(`
		cat /etc/shadow && echo READ
		cat %[1]s/module.key && echo READ
		ln -s %[1]s/module.key link; cat link && echo READ
		cat /proc/1/root%[1]s/module.key && echo READ
		ls %[1]s && echo READ
		python3 -c 'import socket; socket.create_connection(("127.0.0.1", %[2]d), 2)' && echo REACHED
		python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b"x", ("8.8.8.8", 53))' && echo REACHED
		python3 -c 'import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)' && echo REACHED
		unshare -Ur true && echo "NEW USER NAMESPACE WITH RIGHTS"
		mount -t tmpfs none /mnt && echo MOUNTED
		echo x > /proc/sys/kernel/core_pattern && echo WROTE
		true`, keys, port))
	res, err := Run(t.Context(), cmd)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"READ", "SECRET", "REACHED", "MOUNTED", "WROTE"} {
		if strings.Contains(string(res.Output), bad) {
			t.Errorf("a build could do what it must not:\n%s", res.Output)
		}
	}
	select {
	case <-reached:
		t.Error("a build reached a service of the host")
	default:
	}
}

func TestLimitsThatNothingFitsInAreRefused(t *testing.T) {
	for _, l := range []Limits{{Memory: 1 << 20}, {Disk: 1}, {Processes: -1}, {Memory: -1}} {
		if err := l.Check(); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%+v: %v", l, err)
		}
	}
	if err := (Limits{}).WithDefaults().Check(); err != nil {
		t.Errorf("the defaults: %v", err)
	}
}
