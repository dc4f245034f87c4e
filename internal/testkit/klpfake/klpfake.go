// SPDX-License-Identifier: Apache-2.0

// Package klpfake is a kernel in a folder: it behaves to the loader as the
// real one does (both pass the suite of package klptest), and it keeps its
// state in one file, so that a loader that was killed and started again finds
// the same kernel. It changes nothing on the machine.
package klpfake

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"klatch/internal/fault"
	"klatch/internal/kernel"
	"klatch/internal/machine/klp"
	"klatch/internal/machine/loaderapi"
)

// State is the kernel's state and what a test wants of it.
type State struct {
	Now  klp.State
	Left int // looks until the running transition finishes

	Hold     bool                // transitions do not finish
	Refuse   syscall.Errno       // what the next loads answer; 0 for none
	Blockers []loaderapi.Blocker // told while a transition runs
	Tracers  string              // told at any time
	Loads    int                 // modules taken since the beginning
}

// Kernel is a fake kernel. OnLoad, if set, runs before a module is taken.
type Kernel struct {
	path   string
	OnLoad func(module *os.File)
}

// New makes a kernel of that build in a folder.
func New(dir string, b kernel.Build, bootID string) (*Kernel, error) {
	k := Open(dir)
	return k, k.write(State{Now: klp.State{Build: b, BootID: bootID}})
}

// Open finds the kernel in a folder again.
func Open(dir string) *Kernel { return &Kernel{path: filepath.Join(dir, "kernel.json")} }

// Change lets a test change the state.
func (k *Kernel) Change(change func(*State)) error {
	s, err := k.Read()
	if err != nil {
		return err
	}
	change(&s)
	return k.write(s)
}

// Reboot empties the kernel.
func (k *Kernel) Reboot(bootID string) error {
	return k.Change(func(s *State) {
		s.Now.BootID, s.Now.Livepatches, s.Now.Modules, s.Left = bootID, nil, nil, 0
	})
}

// Read gives the state; nothing moves on.
func (k *Kernel) Read() (State, error) {
	var s State
	b, err := os.ReadFile(k.path)
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(b, &s)
}

// write is atomic, as an effect in a kernel is. It needs no sync: only the
// loader is killed, not the machine.
func (k *Kernel) write(s State) error {
	b, err := json.MarshalIndent(s, "", " ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(k.path+".new", b, 0o600); err != nil { //nolint:forbidigo // renamed below
		return err
	}
	return os.Rename(k.path+".new", k.path)
}

// transitionLooks is how long a transition takes, in looks.
const transitionLooks = 2

// Look gives the state and lets the running transition go on.
func (k *Kernel) Look() (klp.State, error) {
	s, err := k.Read()
	if err != nil {
		return klp.State{}, err
	}
	now := s.Now
	now.Livepatches = slices.Clone(s.Now.Livepatches)
	i := slices.IndexFunc(s.Now.Livepatches, moves)
	if i < 0 || s.Hold && s.Now.Livepatches[i].Enabled {
		return now, nil
	}
	if s.Left--; s.Left <= 0 {
		if p := &s.Now.Livepatches[i]; p.Enabled { // it replaces all others
			p.Transition = false
			s.Now.Livepatches = []klp.Livepatch{*p}
		} else {
			s.Now.Livepatches = slices.Delete(s.Now.Livepatches, i, i+1)
		}
	}
	return now, k.write(s)
}

func moves(p klp.Livepatch) bool { return p.Transition }

const allSeals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// Load takes a module from a sealed memory file.
func (k *Kernel) Load(module *os.File) error {
	if k.OnLoad != nil {
		k.OnLoad(module)
	}
	got, err := unix.FcntlInt(module.Fd(), unix.F_GET_SEALS, 0)
	if err != nil || got&allSeals != allSeals {
		return fault.New(fault.Internal, "fake_not_sealed", "the module can still be changed: seals %#x", got)
	}
	b, err := io.ReadAll(io.NewSectionReader(module, 0, 1<<30))
	if err != nil {
		return err
	}
	s, err := k.Read()
	if err != nil {
		return err
	}
	if err := take(&s, b); err != nil {
		return klp.LoadFault(err)
	}
	return k.write(s)
}

func take(s *State, b []byte) error {
	if s.Refuse != 0 {
		return s.Refuse
	}
	if len(b) == 0 {
		return unix.EINVAL
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return errors.Join(unix.ENOEXEC, err)
	}
	words, err := f.Section(".modinfo").Data()
	if err != nil {
		return unix.ENOEXEC
	}
	name := ""
	for w := range strings.SplitSeq(string(words), "\x00") {
		if v, ok := strings.CutPrefix(w, "name="); ok {
			name = v
		}
	}
	switch {
	case slices.Contains(s.Now.Modules, name):
		return unix.EEXIST
	case slices.ContainsFunc(s.Now.Livepatches, moves):
		return unix.EBUSY
	}
	s.Now.Modules = append(s.Now.Modules, name)
	s.Now.Livepatches = append(s.Now.Livepatches, klp.Livepatch{Name: name, Enabled: true, Transition: true, Patched: true})
	s.Left = transitionLooks
	s.Loads++
	return nil
}

// Disable begins to take a livepatch out, or reverses its transition.
func (k *Kernel) Disable(name string) error {
	s, err := k.Read()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(s.Now.Livepatches, func(p klp.Livepatch) bool { return p.Name == name })
	if i < 0 || !s.Now.Livepatches[i].Enabled {
		return nil
	}
	if p := &s.Now.Livepatches[i]; !p.Transition && slices.ContainsFunc(s.Now.Livepatches, moves) {
		return fault.New(fault.Conflict, "transition_running", "disable livepatch %s: %w", name, unix.EBUSY)
	}
	s.Now.Livepatches[i].Enabled = false
	s.Now.Livepatches[i].Transition = true
	s.Left = transitionLooks
	return k.write(s)
}

// Remove takes a module out that no livepatch uses.
func (k *Kernel) Remove(name string) error {
	s, err := k.Read()
	if err != nil {
		return err
	}
	if slices.ContainsFunc(s.Now.Livepatches, func(p klp.Livepatch) bool { return p.Name == name }) {
		return nil
	}
	n := len(s.Now.Modules)
	s.Now.Modules = slices.DeleteFunc(s.Now.Modules, func(m string) bool { return m == name })
	if len(s.Now.Modules) == n {
		return nil
	}
	return k.write(s)
}

// Blockers gives what the test put there.
func (k *Kernel) Blockers() ([]loaderapi.Blocker, error) {
	s, err := k.Read()
	if err != nil || !slices.ContainsFunc(s.Now.Livepatches, moves) {
		return nil, err
	}
	return s.Blockers, nil
}

// Tracers gives what the test put there.
func (k *Kernel) Tracers() (string, error) {
	s, err := k.Read()
	return s.Tracers, err
}
