// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

const (
	// Marker is the file that makes a root file system a small guest's.
	Marker = "/.klatch-lab-guest"
	// AgentName is the program name under which the same binary is the
	// agent and nothing else.
	AgentName = "klatch-lab-agent"
	// agentTTY is the guest's end of the line when nobody says otherwise;
	// ttyS0 is the console.
	agentTTY = "/dev/ttyS1"
)

// IsInit reports whether this process is the init of a small guest, its load,
// its tracer, its sleeper, or the agent of any guest. A program that may be put into a guest calls it first,
// and then Main. It is false everywhere else, also for process 1 of a
// container.
func IsInit() bool {
	if filepath.Base(os.Args[0]) == AgentName {
		return true
	}
	if os.Getpid() != 1 && !isLoad() && !isTrace() && !isWait() {
		return false
	}
	_, err := os.Stat(Marker)
	return err == nil
}

func isLoad() bool  { return len(os.Args) == 3 && os.Args[1] == LoadArg }
func isTrace() bool { return len(os.Args) == 5 && os.Args[1] == TraceArg }
func isWait() bool  { return len(os.Args) == 2 && os.Args[1] == WaitArg }

// Main is the life of the guest side. It does not return. As init it sets
// the guest up, starts itself again as the agent and collects the dead; as
// the agent it serves the line. Called with LoadArg it puts load on the guest,
// with TraceArg it attaches a BPF program, with WaitArg it sleeps.
func Main() {
	if os.Getpid() == 1 {
		initMain()
	}
	if isLoad() {
		d, err := time.ParseDuration(os.Args[2])
		if err == nil {
			err = load(d, os.Stdout)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "klatch lab load:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if isTrace() {
		fmt.Fprintln(os.Stderr, "klatch lab trace:", trace(os.Args[2], os.Args[3], os.Args[4]))
		os.Exit(1)
	}
	if isWait() {
		fmt.Fprintln(os.Stderr, "klatch lab wait:", wait())
		os.Exit(1)
	}
	err := agentMain()
	fmt.Fprintln(os.Stderr, "klatch lab agent:", err)
	os.Exit(1)
}

// initMain is process 1. When it cannot go on it switches the machine off,
// with the reason on the console: init must not end.
func initMain() {
	err := setUp()
	for err == nil {
		err = superviseAgent()
	}
	fmt.Fprintln(os.Stderr, "klatch lab init:", err)
	syscall.Sync()
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// setUp makes the few things a program expects of a Linux system.
func setUp() error {
	os.Clearenv()
	for k, v := range map[string]string{"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"} {
		if err := os.Setenv(k, v); err != nil {
			return err
		}
	}
	mounts := []struct{ kind, at, options string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", "mode=0755"},
		{"devpts", "/dev/pts", "mode=0620,gid=5"},
		{"tmpfs", "/dev/shm", "mode=1777"},
		{"tmpfs", "/tmp", "mode=1777"},
		{"tmpfs", "/run", "mode=0755"},
		{"securityfs", "/sys/kernel/security", ""},
		{"debugfs", "/sys/kernel/debug", ""},
		{"tracefs", "/sys/kernel/tracing", ""},
		{"cgroup2", "/sys/fs/cgroup", ""},
	}
	for i, m := range mounts {
		_ = os.MkdirAll(m.at, 0o755) // below /sys the kernel has made it, or there is no such thing
		err := syscall.Mount(m.kind, m.at, m.kind, 0, m.options)
		if err != nil && i < 3 {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	for name, to := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0",
		"stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		_ = os.Symlink(to, "/dev/"+name)
	}
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("loopback up: %w", err)
	}
	if err := syscall.Sethostname([]byte("lab")); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	// Makes /bin/ls and its like. A guest without busybox is allowed: it
	// runs only what it was given.
	if out, err := exec.CommandContext(context.Background(), "/bin/busybox", "--install", "-s").CombinedOutput(); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("install busybox: %w: %s", err, out)
	}
	return nil
}

// loopbackUp brings lo up; the kernel gives it 127.0.0.1 then.
func loopbackUp() error {
	s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(s) //nolint:errcheck // nothing was written
	var req struct {       // struct ifreq of netdevice(7)
		name  [16]byte
		flags uint16
		_     [22]byte
	}
	copy(req.name[:], "lo")
	req.flags = syscall.IFF_UP | syscall.IFF_RUNNING
	return ioctl(s, syscall.SIOCSIFFLAGS, unsafe.Pointer(&req))
}

// superviseAgent starts the agent and collects dead processes until it ends.
// Only this process waits for arbitrary children, and it starts none but the
// agent, so that the agent's own waits are not disturbed.
func superviseAgent() error {
	pid, err := syscall.ForkExec("/proc/self/exe", append([]string{AgentName}, lineWords()...), &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start agent: %w", err)
	}
	for {
		var status syscall.WaitStatus
		dead, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return fmt.Errorf("wait for agent: %w", err)
		case dead == pid:
			fmt.Fprintln(os.Stderr, "klatch lab init: agent ended, starting it again:", status)
			return nil
		}
	}
}

func agentMain() error {
	runtime.GOMAXPROCS(2)
	line, err := openLine(os.Args[1:])
	if err != nil {
		return err
	}
	protectFromOOM()
	err = Serve(line)
	if errors.Is(err, io.EOF) {
		return errors.New("line closed")
	}
	return err
}

// protectFromOOM keeps the kernel from choosing the agent when the load of a
// scenario eats the memory. Programs it starts get the normal value back.
func protectFromOOM() {
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0o644) //nolint:forbidigo // no file of ours
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); e != 0 {
		return e
	}
	return nil
}

func readTrimmed(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
