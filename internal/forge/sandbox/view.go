// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// rootFolders are what a program sees of a root folder: programs, libraries,
// settings. The rest of it, such as devices and package records, stays out.
var rootFolders = []string{"usr", "etc", "bin", "sbin", "lib", "lib64"}

// devices are the host's device files that a program sees; each is harmless.
var devices = []string{"null", "zero", "full", "random", "urandom"}

// usualTemp is the same folder as private, for programs that do not read
// TMPDIR. Only with a root folder: the host's may hold a tree.
const usualTemp = "/tmp"

// enterRoot builds the program's file system in memory: the root folder's
// parts, a few devices, its own process table and temporary folder, and the
// named folders of the host at their own paths. Then it makes that the root and
// lets go of the host's.
func (s spec) enterRoot() error {
	for _, d := range slices.Concat([]string{s.Root, s.Tree}, s.Visible, s.Writable) {
		if within(d, private) {
			return fmt.Errorf("folder %s is below %s, which each program has for itself", d, private)
		}
	}
	// The staging place must be a folder that exists everywhere; nothing in it
	// is needed any more.
	const stage = private
	if err := syscall.Mount("tmpfs", stage, "tmpfs", syscall.MS_NODEV|syscall.MS_NOSUID, "mode=755,size=1m"); err != nil {
		return fmt.Errorf("mount a file system for the root: %w", err)
	}
	for _, step := range []func(string) error{s.rootParts, makeDevices, s.ownFolders, s.hostFolders} {
		if err := step(stage); err != nil {
			return err
		}
	}
	// pivot_root(2), "pivot_root(\".\", \".\")": the old root ends up above the new
	// one, where umount finds it.
	if err := os.Chdir(stage); err != nil {
		return err
	}
	if err := syscall.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("make %s the root: %w", s.Root, err)
	}
	if err := syscall.Unmount(".", syscall.MNT_DETACH); err != nil {
		return fmt.Errorf("let go of the host's files: %w", err)
	}
	return os.Chdir("/")
}

func (s spec) rootParts(stage string) error {
	for _, name := range rootFolders {
		from, to := filepath.Join(s.Root, name), filepath.Join(stage, name)
		st, err := os.Lstat(from)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return err
		case st.Mode()&fs.ModeSymlink != 0: // bin -> usr/bin
			target, err := os.Readlink(from)
			if err == nil {
				err = os.Symlink(target, to)
			}
			if err != nil {
				return err
			}
		case st.IsDir():
			if err := mountPoint(from, to); err != nil {
				return err
			}
		}
	}
	if _, err := os.Stat(filepath.Join(stage, "usr")); err != nil {
		return fmt.Errorf("root folder %s has no usr: %w", s.Root, err)
	}
	return nil
}

func makeDevices(stage string) error {
	dev := filepath.Join(stage, "dev")
	if err := os.Mkdir(dev, 0o755); err != nil {
		return err
	}
	for _, d := range devices {
		to := filepath.Join(dev, d)
		f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
		if err := bind(filepath.Join("/dev", d), to); err != nil {
			return err
		}
	}
	for name, to := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(to, filepath.Join(dev, name)); err != nil {
			return err
		}
	}
	return nil
}

func (s spec) ownFolders(stage string) error {
	for _, d := range []string{"proc", private} {
		if err := os.Mkdir(filepath.Join(stage, d), 0o755); err != nil {
			return err
		}
	}
	if err := syscall.Mount("proc", filepath.Join(stage, "proc"), "proc", syscall.MS_NODEV|syscall.MS_NOSUID|syscall.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount own process table: %w", err)
	}
	if err := s.mountPrivate(filepath.Join(stage, private)); err != nil {
		return err
	}
	return mountPoint(filepath.Join(stage, private), filepath.Join(stage, usualTemp))
}

// hostFolders mounts the named folders, outer ones first. One inside another is
// mounted again over it, so that it can have its own rights.
func (s spec) hostFolders(stage string) error {
	folders := append(slices.Clone(s.Visible), s.Writable...)
	if s.Tree != "" {
		folders = append(folders, s.Tree) // with the scratch folder over it
	}
	slices.Sort(folders)
	for _, d := range slices.Compact(folders) {
		for _, r := range rootFolders {
			if within(d, "/"+r) {
				return fmt.Errorf("folder %s would hide a part of root folder %s", d, s.Root)
			}
		}
		if err := mountPoint(d, filepath.Join(stage, d)); err != nil {
			return err
		}
	}
	return nil
}

func mountPoint(from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	return bind(from, to)
}

// within says whether a clean path is a folder or in it.
func within(path, folder string) bool {
	return path == folder || strings.HasPrefix(path, folder+"/")
}
