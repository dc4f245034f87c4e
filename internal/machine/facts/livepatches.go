// SPDX-License-Identifier: Apache-2.0

package facts

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"klatch/internal/fault"
	"klatch/internal/livepatch"
)

// Livepatch is one livepatch in the kernel as sysfs shows it to everybody
// (Documentation/ABI/testing/sysfs-kernel-livepatch).
type Livepatch struct {
	Name       string
	Enabled    bool
	Transition bool
	// Patched says that every object that is loaded is patched. It is true
	// where the kernel is too old to tell (the files came in 6.1).
	Patched bool
}

// Livepatches lists what is in the kernel. A kernel without the folder has
// none, provided that /sys is there at all.
func (m Machine) Livepatches() ([]Livepatch, error) {
	entries, err := os.ReadDir(m.path("sys/kernel/livepatch"))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(m.path("sys/kernel")); err != nil {
			return nil, fault.New(fault.Internal, "sysfs_unreadable", "list livepatches: %w", err)
		}
		return nil, nil
	}
	if err != nil {
		return nil, fault.New(fault.Internal, "sysfs_unreadable", "list livepatches: %w", err)
	}
	var lps []Livepatch
	for _, e := range entries {
		lp, err := m.livepatch(e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // gone while we looked
		}
		if err != nil {
			return nil, err
		}
		lps = append(lps, lp)
	}
	return lps, nil
}

// Livepatch reads our livepatch of one sequence; ok is false where it is not
// in the kernel.
func (m Machine) Livepatch(s livepatch.Sequence) (lp Livepatch, ok bool, err error) {
	lp, err = m.livepatch(s.ModuleName())
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(m.path("sys/kernel")); err != nil {
			return lp, false, fault.New(fault.Internal, "sysfs_unreadable", "read state of %s: %w", s.ModuleName(), err)
		}
		return lp, false, nil
	}
	return lp, err == nil, err
}

func (m Machine) livepatch(name string) (Livepatch, error) {
	lp := Livepatch{Name: name, Patched: true}
	dir := filepath.Join("sys/kernel/livepatch", name)
	var err error
	if lp.Enabled, err = m.flag(filepath.Join(dir, "enabled")); err != nil {
		return lp, err
	}
	if lp.Transition, err = m.flag(filepath.Join(dir, "transition")); err != nil {
		return lp, err
	}
	objects, err := os.ReadDir(m.path(dir))
	if err != nil {
		return lp, err
	}
	for _, o := range objects {
		if !o.IsDir() || o.Name() == "power" {
			continue
		}
		patched, err := m.flag(filepath.Join(dir, o.Name(), "patched"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return lp, err
		}
		if !patched && m.objectLoaded(o.Name()) {
			lp.Patched = false
		}
	}
	return lp, nil
}

// Replaced lists the functions that the livepatches in the kernel replace, or
// are about to: the folders FUNCTION,NUMBER of each object.
func (m Machine) Replaced() ([]livepatch.Function, error) {
	lps, err := m.Livepatches()
	if err != nil {
		return nil, err
	}
	var fs []livepatch.Function
	for _, lp := range lps {
		dirs, err := filepath.Glob(m.path(filepath.Join("sys/kernel/livepatch", lp.Name, "*", "*,*")))
		if err != nil {
			return nil, err
		}
		for _, d := range dirs {
			name, _, _ := strings.Cut(filepath.Base(d), ",")
			fs = append(fs, livepatch.Function{Object: filepath.Base(filepath.Dir(d)), Name: name})
		}
	}
	return fs, nil
}

// objectLoaded says whether an object is in the kernel now; a module that is
// not loaded is patched when it comes.
func (m Machine) objectLoaded(object string) bool {
	if object == "vmlinux" {
		return true
	}
	_, err := os.Stat(m.path(filepath.Join("sys/module", object, "initstate")))
	return err == nil
}

func (m Machine) flag(rel string) (bool, error) {
	b, err := m.read(rel)
	if err != nil {
		return false, err
	}
	switch string(b) {
	case "0\n", "0":
		return false, nil
	case "1\n", "1":
		return true, nil
	}
	return false, fault.New(fault.Internal, "sysfs_unreadable", "read %s: %.20q is neither 0 nor 1", m.path(rel), b)
}
