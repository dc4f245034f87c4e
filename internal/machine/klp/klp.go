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
	"strings"

	"golang.org/x/sys/unix"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/kernel"
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
	for line := range strings.Lines(read("proc/modules")) {
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
	if s.Build.Arch, err = arch(); err != nil {
		return s, err
	}
	return s, k.livepatches(&s)
}

func arch() (kernel.Arch, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	if m := unix.ByteSliceToString(u.Machine[:]); m != "x86_64" {
		return "", fault.New(fault.Invalid, "bad_arch", "machine %q is not supported", m)
	}
	return kernel.AMD64, nil
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
