// SPDX-License-Identifier: Apache-2.0

// Package sandbox runs the programs of a build: foreign makefiles, compilers
// and differs. They get no network, no keys, their own process table, a user
// of their own and limits; the kernel tree they work on stays untouched,
// because all writes go to a scratch folder laid over it. All else is read
// only. Without root there is no other user: then a build can read whatever
// the caller can, keys too, so keep keys on another host.
//
// With a root folder the programs are those of that folder, another release's
// compiler for instance, and of the host's files a program sees only what the
// command names; all other guarantees are the same.
//
// How: Run starts this program again under the name Argv0 in new mount,
// network, process and IPC namespaces (as root; else in a user namespace
// too). Child, which main must call first, lays an overlay file system over
// the tree, moves into the root folder if there is one (view.go), drops to UID
// and executes the program.
package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"klatch/internal/fault"
)

// Argv0 is the name under which a program is started to be the sandbox.
const Argv0 = "klatch-sandbox"

// UID and GID own kernel trees and run builds when we are root. No account of
// a Debian system has this number (Debian Policy 9.2.2: 60000-64999 is for
// packages that ask; 62100 is given to none; no entry in passwd is needed).
const (
	UID = 62100
	GID = 62100
)

// killGrace is how long a program's output is waited for after its end.
const killGrace = 5 * time.Second

// Command is one program to run.
type Command struct {
	// Tree is laid under Scratch and appears at its own path, writable.
	// Empty: no overlay, Dir is used as it is.
	Tree string
	// Scratch takes what the program writes into Tree; it survives, so that a
	// later command sees it.
	Scratch string
	// Writable lists folders besides Tree that the program may write to.
	// Everything else is read only for it, whoever owns it.
	Writable []string
	// Root is the folder that the program has as its root (package buildroot);
	// empty means the host's. Tree, Writable and Visible appear in it at their
	// own paths.
	Root string
	// Visible lists folders of the host that the program reads. Only with a
	// root folder does it need them named.
	Visible []string
	Dir     string   // working folder, seen from inside
	Argv    []string // program by absolute path or found in PATH
	Env     []string // the whole environment; nil means BaseEnv
	Stdin   io.Reader
	Limits  Limits
}

// BaseEnv is the environment of every build: nothing of the caller's but the
// search path, so that two machines build alike.
func BaseEnv() []string {
	return []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "TZ=UTC", "HOME=/nonexistent",
		"KBUILD_BUILD_TIMESTAMP=1970-01-01", "KBUILD_BUILD_USER=klatch", "KBUILD_BUILD_HOST=klatch"}
}

// Result is how a program ended.
type Result struct {
	Exit   int
	Output []byte // standard output and error, the last maxOutput bytes
}

// Run runs one program. A program that ends by itself gives no error, whatever
// its exit status; an error means that it could not be run, was killed, or went
// over a limit or out of time. Nothing that it started is left then.
func Run(ctx context.Context, c Command) (Result, error) {
	if os.Args[0] == Argv0 { // a main without Child would start itself without end
		return Result{}, fault.New(fault.Internal, "no_child", "main of %s does not call sandbox.Child before all else", filepath.Base(os.Args[0]))
	}
	if err := c.Limits.Check(); err != nil {
		return Result{}, err
	}
	spec, err := json.Marshal(c.spec())
	if err != nil {
		return Result{}, err
	}
	self, err := os.Executable()
	if err != nil {
		return Result{}, fmt.Errorf("find own program: %w", err)
	}
	if err := c.makeScratch(); err != nil {
		return Result{}, err
	}
	// Pdeathsig follows the thread that starts the child, so keep that thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	cmd := exec.CommandContext(ctx, self)
	cmd.Args = []string{Argv0, string(spec)}
	if cmd.Env = c.Env; cmd.Env == nil { // never the caller's own
		cmd.Env = BaseEnv()
	}
	cmd.Stdin = c.Stdin
	out := &tail{limit: maxOutput}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = killGrace
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig:  syscall.SIGKILL,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC,
	}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	if err = cmd.Start(); err == nil {
		var watcher sync.WaitGroup
		watching, enough := context.WithCancel(ctx)
		watcher.Go(func() { c.watch(watching, cmd.Process.Pid, stop) })
		err = cmd.Wait()
		enough()
		watcher.Wait() // it must not look at a stranger who gets the number next
	}
	res := Result{Output: out.buf.Bytes()}
	if ctx.Err() != nil {
		return res, fmt.Errorf("run %s: %w", c.Argv[0], context.Cause(ctx))
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		res.Exit = exit.ExitCode()
		if res.Exit == setupFailed && bytes.Contains(res.Output, []byte(setupMark)) {
			return res, fault.New(fault.Internal, "sandbox", "set up build sandbox: %s", bytes.TrimSpace(res.Output)).
				WithHint("run as root, or allow unprivileged user namespaces with overlay file systems")
		}
		return res, nil
	}
	if err != nil {
		return res, fmt.Errorf("run %s: %w", c.Argv[0], err)
	}
	return res, nil
}

// Own gives a file or folder to the build user; without root it is already.
func Own(path string) error {
	if os.Getuid() != 0 {
		return nil
	}
	return os.Lchown(path, UID, GID)
}

func (c Command) makeScratch() error {
	if c.Tree == "" {
		return nil
	}
	for _, d := range []string{c.Scratch, c.upper(), c.work()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return fmt.Errorf("make scratch folder: %w", err)
		}
		if err := Own(d); err != nil {
			return fmt.Errorf("make scratch folder: %w", err)
		}
	}
	return nil
}

func (c Command) upper() string { return filepath.Join(c.Scratch, "upper") }
func (c Command) work() string  { return filepath.Join(c.Scratch, "work") }

// Upper is where a path of the tree is found after a program wrote it.
func (c Command) Upper(rel string) string { return filepath.Join(c.upper(), rel) }

// tail keeps the last bytes written to it: the end of a build log says why.
type tail struct {
	buf   bytes.Buffer
	limit int
}

func (t *tail) Write(p []byte) (int, error) {
	t.buf.Write(p)
	if over := t.buf.Len() - t.limit; over > t.limit {
		t.buf.Next(over)
	}
	return len(p), nil
}
