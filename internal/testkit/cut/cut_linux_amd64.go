// SPDX-License-Identifier: Apache-2.0

// Package cut runs a program and ends it, or lets it fail, at one of the calls
// by which it changes files below a folder, counted over all its threads.
// strace counts per thread, and the threads of a Go program take turns, so
// strace cannot name each call once. Tests only. Start with Run.
package cut

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// How the n-th call ends.
type How string

// The ways. A kill comes before the call has its effect.
const (
	Kill How = "kill"
	Fail How = "fail" // with an input/output error, without an effect
)

// Call is a system call that changes a file: what it is, and on what.
type Call struct{ Name, File string }

func (c Call) String() string { return c.Name + " " + c.File }

// names are the calls that are counted, with the argument that holds the name
// or the descriptor of what is changed.
var names = map[uint64]struct {
	name string
	at   func(r *unix.PtraceRegs) uint64
	fd   bool
}{
	unix.SYS_RENAMEAT:  {"renameat", func(r *unix.PtraceRegs) uint64 { return r.R10 }, false},
	unix.SYS_RENAMEAT2: {"renameat2", func(r *unix.PtraceRegs) uint64 { return r.R10 }, false},
	unix.SYS_LINKAT:    {"linkat", func(r *unix.PtraceRegs) uint64 { return r.R10 }, false},
	unix.SYS_UNLINKAT:  {"unlinkat", func(r *unix.PtraceRegs) uint64 { return r.Rsi }, false},
	unix.SYS_MKDIRAT:   {"mkdirat", func(r *unix.PtraceRegs) uint64 { return r.Rsi }, false},
	unix.SYS_OPENAT:    {"openat", func(r *unix.PtraceRegs) uint64 { return r.Rsi }, false},
	unix.SYS_WRITE:     {"write", func(r *unix.PtraceRegs) uint64 { return r.Rdi }, true},
	unix.SYS_FSYNC:     {"fsync", func(r *unix.PtraceRegs) uint64 { return r.Rdi }, true},
	unix.SYS_FTRUNCATE: {"ftruncate", func(r *unix.PtraceRegs) uint64 { return r.Rdi }, true},
	unix.SYS_FCHMOD:    {"fchmod", func(r *unix.PtraceRegs) uint64 { return r.Rdi }, true},
}

// Outcome is how a run ended.
type Outcome struct {
	Calls  []Call // up to the one that was cut
	Cut    bool
	Exit   int // -1 where a signal ended it
	Output string
}

// Run starts the command and cuts the first call for which at says so, among
// those that change something below dir; files are named from there on. It
// needs no rights beyond those of a debugger.
func Run(cmd *exec.Cmd, dir string, how How, at func(Call) bool) (Outcome, error) {
	type answer struct {
		o   Outcome
		err error
	}
	done := make(chan answer)
	go func() {
		runtime.LockOSThread() // the tracer is a thread; it ends with this goroutine
		o, err := run(cmd, dir, how, at)
		done <- answer{o, err}
	}()
	a := <-done
	return a.o, a.err
}

func run(cmd *exec.Cmd, dir string, how How, at func(Call) bool) (o Outcome, err error) {
	out, err := os.CreateTemp("", "klatch-cut-")
	if err != nil {
		return o, err
	}
	defer func() {
		b, rerr := os.ReadFile(out.Name())
		o.Output = string(b)
		err = errors.Join(err, rerr, out.Close(), os.Remove(out.Name()))
	}()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return o, err
	}
	main := cmd.Process.Pid
	defer func() {
		if err != nil {
			_ = syscall.Kill(-main, syscall.SIGKILL) // the group that this function made
		}
		_ = cmd.Process.Release()
	}()
	var st unix.WaitStatus
	if _, err := unix.Wait4(main, &st, unix.WALL, nil); err != nil {
		return o, fmt.Errorf("wait for the first stop: %w", err)
	}
	const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_EXITKILL
	if err := unix.PtraceSetOptions(main, options); err != nil {
		return o, err
	}
	if err := unix.PtraceSyscall(main, 0); err != nil {
		return o, err
	}
	inside, failing := map[int]bool{}, map[int]bool{} // by thread
	for {
		tid, err := unix.Wait4(-main, &st, unix.WALL, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return o, fmt.Errorf("wait: %w", err)
		}
		if st.Exited() || st.Signaled() {
			if tid == main {
				o.Exit = st.ExitStatus() // -1 after a signal
				return o, nil
			}
			continue
		}
		signal := 0
		switch {
		case st.StopSignal() == unix.SIGTRAP|0x80: // TRACESYSGOOD: a call begins or ends
			inside[tid] = !inside[tid]
			if err := atCall(tid, dir, how, at, inside[tid], failing, &o); err != nil {
				return o, err
			}
			if o.Cut && how == Kill {
				if err := syscall.Kill(-main, syscall.SIGKILL); err != nil {
					return o, err
				}
				continue // dead threads cannot be sent on
			}
		case st.StopSignal() == unix.SIGTRAP, st.StopSignal() == unix.SIGSTOP: // a new thread, or its first stop
		default:
			signal = int(st.StopSignal())
		}
		if err := unix.PtraceSyscall(tid, signal); err != nil && !errors.Is(err, unix.ESRCH) {
			return o, fmt.Errorf("go on: %w", err)
		}
	}
}

// atCall counts a call that begins, and makes the chosen one fail.
func atCall(tid int, dir string, how How, at func(Call) bool, begins bool, failing map[int]bool, o *Outcome) error {
	if !begins && !failing[tid] {
		return nil
	}
	var r unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &r); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return err
	}
	if !begins {
		delete(failing, tid)
		r.Rax = ^uint64(unix.EIO) + 1 // -EIO
		return unix.PtraceSetRegs(tid, &r)
	}
	if o.Cut {
		return nil
	}
	c, ok := callOf(tid, &r)
	if !ok || !strings.HasPrefix(c.File, dir) {
		return nil
	}
	c.File = strings.TrimPrefix(c.File, dir)
	o.Calls = append(o.Calls, c)
	if !at(c) {
		return nil
	}
	o.Cut = true
	if how == Fail {
		failing[tid] = true
		r.Orig_rax = 1<<64 - 1 // no such call: the kernel does nothing
		return unix.PtraceSetRegs(tid, &r)
	}
	return nil
}

// callOf says what a call changes; false for one that changes no file.
func callOf(tid int, r *unix.PtraceRegs) (Call, bool) {
	k, ok := names[r.Orig_rax]
	if !ok || k.name == "openat" && r.Rdx&unix.O_CREAT == 0 {
		return Call{}, false
	}
	if k.fd {
		file, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", tid, int32(k.at(r))))
		return Call{k.name, file}, err == nil && filepath.IsAbs(file)
	}
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", tid))
	if err != nil {
		return Call{}, false
	}
	defer memory.Close() //nolint:errcheck // opened for reading only
	b := make([]byte, unix.PathMax)
	got, _ := memory.ReadAt(b, int64(k.at(r))) // short at the end of what is mapped
	file, _, _ := strings.Cut(string(b[:got]), "\x00")
	return Call{k.name, file}, got > 0
}
