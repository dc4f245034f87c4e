// SPDX-License-Identifier: Apache-2.0

// Package klp is the only code that touches the running kernel. It runs as
// root in klatch-loader. It may not start programs, open network connections
// or take a path from a caller, and it never writes "force", which would mark
// tasks as moved that are not (Documentation/livepatch/livepatch.rst).
//
// Read Look first: it is everything the loader knows of the kernel.
package klp

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"klatch/internal/durable"
	"klatch/internal/kernel"
	"klatch/internal/machine/loaderapi"
)

// Kernel is the kernel behind /proc, /sys and three system calls.
type Kernel struct{ root string }

// Running is the kernel of this machine.
func Running() *Kernel { return &Kernel{"/"} }

// At reads the same files below another folder. Only the fake kernel does so.
func At(root string) *Kernel { return &Kernel{root} }

// State is what the kernel says of itself at one moment.
type State struct {
	Build       kernel.Build // distro is empty
	BootID      string
	CommandLine []string
	Livepatches []Livepatch // all, whoever put them in, by name
	Modules     []string    // all loadable modules that are in
}

// Livepatch is one folder of /sys/kernel/livepatch
// (Documentation/ABI/testing/sysfs-kernel-livepatch). The attributes patched
// (6.1), replace (6.11) and stack_order (6.14) are optional; only the first is
// used, and where it is missing the end of the transition has to say it.
type Livepatch struct {
	Name       string
	Enabled    bool
	Transition bool
	Patched    bool // every object that is loaded
}

// maxFile limits one file of /proc or /sys, in bytes; /proc/modules is the
// largest, about 100 bytes a module.
const maxFile = 1 << 20

// Look reads the state.
func (k *Kernel) Look() (State, error) {
	var s State
	var failed error
	read := func(name string) string {
		b, err := durable.ReadFile(filepath.Join(k.root, name), maxFile)
		failed = errors.Join(failed, err)
		return strings.TrimSpace(string(b))
	}
	release := read("proc/sys/kernel/osrelease")
	s.BootID = read("proc/sys/kernel/random/boot_id")
	s.CommandLine = strings.Fields(read("proc/cmdline"))
	modules, err := durable.ReadFile(filepath.Join(k.root, "proc/modules"), maxFile)
	if !errors.Is(err, fs.ErrNotExist) { // a kernel without CONFIG_MODULES has no such file
		failed = errors.Join(failed, err)
	}
	for line := range strings.Lines(string(modules)) {
		name, _, _ := strings.Cut(line, " ")
		s.Modules = append(s.Modules, name)
	}
	notes, err := durable.ReadFile(filepath.Join(k.root, "sys/kernel/notes"), kernel.MaxNotes)
	if failed = errors.Join(failed, err); failed != nil {
		return s, fmt.Errorf("look at the kernel: %w", failed)
	}
	if s.Build.ID, err = kernel.ParseNotes(notes); err != nil {
		return s, err
	}
	if s.Build.Release, err = kernel.ParseRelease(release); err != nil {
		return s, err
	}
	s.Build.Arch = kernel.Arch(runtime.GOARCH) // a 64-bit program runs on no other kernel; Debian's and Go's names agree
	return s, k.livepatches(&s)
}

// livepatches fills in the livepatches. One that goes away meanwhile is left
// out: the kernel removes the folder at the end of the transition.
func (k *Kernel) livepatches(s *State) error {
	names, err := os.ReadDir(k.livepatch())
	if errors.Is(err, fs.ErrNotExist) {
		return nil // kernel without CONFIG_LIVEPATCH
	}
	if err != nil {
		return err
	}
	loaded := map[string]bool{"vmlinux": true}
	for _, m := range s.Modules {
		loaded[m] = true
	}
	for _, n := range names {
		p, err := k.readLivepatch(n.Name(), loaded)
		if gone(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("look at livepatch %s: %w", n.Name(), err)
		}
		s.Livepatches = append(s.Livepatches, p)
	}
	return nil
}

func (k *Kernel) readLivepatch(name string, loaded map[string]bool) (Livepatch, error) {
	p := Livepatch{Name: name, Patched: true}
	var err error
	if p.Enabled, err = readBit(k.livepatch(name, "enabled")); err != nil {
		return p, err
	}
	if p.Transition, err = readBit(k.livepatch(name, "transition")); err != nil {
		return p, err
	}
	objects, err := os.ReadDir(k.livepatch(name))
	if err != nil {
		return p, err
	}
	for _, o := range objects {
		if !o.IsDir() || !loaded[o.Name()] {
			continue
		}
		patched, err := readBit(k.livepatch(name, o.Name(), "patched"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return p, err
		}
		p.Patched = p.Patched && (patched || err != nil)
	}
	return p, nil
}

func (k *Kernel) livepatch(parts ...string) string {
	return filepath.Join(append([]string{k.root, "sys/kernel/livepatch"}, parts...)...)
}

func readBit(path string) (bool, error) {
	b, err := durable.ReadFile(path, 16)
	if err != nil {
		return false, err
	}
	switch string(b) {
	case "0\n":
		return false, nil
	case "1\n":
		return true, nil
	}
	return false, fmt.Errorf("read %s: got %q, want 0 or 1", path, b)
}

// gone tells that the thing behind a file of /proc or /sys went away.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH)
}

// Limits of what Blockers tells; a stalled transition has a handful.
const (
	maxBlockers = 64
	maxStack    = 32
)

// Blockers lists the tasks whose patch_state is not what the running
// transition wants: 1 while a livepatch comes in, 0 while it goes, -1 outside
// of a transition (proc(5)). The idle tasks have no folder and are not seen.
func (k *Kernel) Blockers() ([]loaderapi.Blocker, error) {
	var now State
	if err := k.livepatches(&now); err != nil {
		return nil, err
	}
	target := ""
	for _, p := range now.Livepatches {
		if p.Transition {
			target = map[bool]string{true: "1", false: "0"}[p.Enabled]
		}
	}
	if target == "" {
		return nil, nil
	}
	tasks, err := filepath.Glob(filepath.Join(k.root, "proc/[1-9]*/task/[1-9]*"))
	if err != nil {
		return nil, err
	}
	var list []loaderapi.Blocker
	for _, t := range tasks {
		state, err := readLine(t, "patch_state")
		if gone(err) || err == nil && (state == target || state == "-1") {
			continue
		}
		if err != nil {
			return list, fmt.Errorf("look for blocking tasks: %w", err)
		}
		if len(list) == maxBlockers {
			break
		}
		list = append(list, describe(t))
	}
	return list, nil
}

// describe tells what can be read of a task that may end meanwhile; the stack
// needs CAP_SYS_ADMIN (fs/proc/base.c, proc_pid_stack) and may stay empty.
func describe(task string) (b loaderapi.Blocker) {
	b.TID, _ = strconv.Atoi(filepath.Base(task))
	b.PID, _ = strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(task))))
	b.Stat, _ = readLine(task, "stat")
	stack, _ := readLine(task, "stack")
	for line := range strings.Lines(stack) {
		if len(b.Stack) < maxStack {
			b.Stack = append(b.Stack, strings.TrimSpace(line))
		}
	}
	return b
}

// address is what klatchd need not know.
var address = regexp.MustCompile(`(?m)^[0-9a-f]{8,16}\b|\b0x[0-9a-f]{9,16}\b`)

// Tracers gives the lists of kprobes and of functions that ftrace is attached
// to, one after the other, without addresses. Debugfs and tracefs may be away.
func (k *Kernel) Tracers() (string, error) {
	var text strings.Builder
	for _, f := range []string{"debug/kprobes/list", "tracing/enabled_functions"} {
		b, err := durable.ReadFile(filepath.Join(k.root, "sys/kernel", f), maxFile)
		if err != nil {
			return "", fmt.Errorf("look for tracers: %w", err)
		}
		text.Write(address.ReplaceAll(b, []byte("-")))
	}
	return text.String(), nil
}

func readLine(task, name string) (string, error) {
	b, err := durable.ReadFile(filepath.Join(task, name), 64<<10)
	return strings.TrimSpace(string(b)), err
}
