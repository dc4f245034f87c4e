// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// setupFailed and setupMark tell a sandbox that could not be made from a
// program that ended badly.
const (
	setupFailed = 125
	setupMark   = "klatch-sandbox: "
)

type spec struct {
	Tree, Upper, Work, Dir string
	Root                   string
	Visible, Writable      []string
	Argv                   []string
	Drop                   bool
	Limits                 Limits
}

// private is the folder that each program has for itself: for temporary files,
// and empty otherwise, so that no socket of the host's services is in reach.
const private = "/run"

func (c Command) spec() spec {
	return spec{Tree: c.Tree, Upper: c.upper(), Work: c.work(), Dir: c.Dir, Root: c.Root, Visible: c.Visible, Writable: c.Writable,
		Argv: c.Argv, Drop: os.Getuid() == 0, Limits: c.Limits.WithDefaults()}
}

// Child turns this process into the program of a sandbox if it was started as
// one, and does not return then. Every main that may call Run calls it first.
func Child() {
	if len(os.Args) != 2 || os.Args[0] != Argv0 {
		return
	}
	err := enter(os.Args[1])
	fmt.Fprintf(os.Stderr, "%s%v\n", setupMark, err)
	os.Exit(setupFailed)
}

func enter(arg string) error {
	var s spec
	if err := json.Unmarshal([]byte(arg), &s); err != nil {
		return err
	}
	preferred()
	runtime.LockOSThread() // some of what follows is of one thread, and that one executes the program
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if s.Tree != "" {
		options := "lowerdir=" + s.Tree + ",upperdir=" + s.Upper + ",workdir=" + s.Work
		if err := syscall.Mount("overlay", s.Tree, "overlay", syscall.MS_NODEV|syscall.MS_NOSUID, options); err != nil {
			return fmt.Errorf("lay scratch folder over %s: %w", s.Tree, err)
		}
	}
	if err := s.see(); err != nil {
		return err
	}
	if err := s.readOnly(); err != nil {
		return err
	}
	if err := s.limit(); err != nil {
		return err
	}
	if s.Drop {
		if err := syscall.Setgroups(nil); err != nil {
			return fmt.Errorf("drop groups: %w", err)
		}
		if err := syscall.Setgid(GID); err != nil {
			return fmt.Errorf("drop group: %w", err)
		}
		if err := syscall.Setuid(UID); err != nil {
			return fmt.Errorf("drop user: %w", err)
		}
	}
	if err := os.Chdir(s.Dir); err != nil {
		return err
	}
	program, err := exec.LookPath(s.Argv[0])
	if err != nil {
		return err
	}
	if err := endWithCaller(); err != nil {
		return err
	}
	return syscall.Exec(program, s.Argv, append(os.Environ(), "TMPDIR="+private))
}

// see gives the program its view of the file system, all of it still writable:
// its own process table, its own temporary folder, and the folders it was
// given, each a mount. With a root folder there is nothing else.
func (s spec) see() error {
	if s.Root != "" {
		return s.enterRoot()
	}
	if err := syscall.Mount("proc", "/proc", "proc", syscall.MS_NODEV|syscall.MS_NOSUID|syscall.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount own process table: %w", err)
	}
	if err := s.mountPrivate(private); err != nil {
		return err
	}
	for _, w := range s.Writable {
		if err := bind(w, w); err != nil {
			return err
		}
	}
	return nil
}

func (s spec) mountPrivate(at string) error {
	if err := syscall.Mount("tmpfs", at, "tmpfs", syscall.MS_NODEV|syscall.MS_NOSUID, s.tempOptions()); err != nil {
		return fmt.Errorf("mount own temporary folder: %w", err)
	}
	return nil
}

func bind(from, to string) error {
	if err := syscall.Mount(from, to, "", syscall.MS_BIND|syscall.MS_REC, ""); err != nil {
		return fmt.Errorf("make %s a mount: %w", from, err)
	}
	return nil
}

// readOnly takes away the right to write anywhere but in the tree and in the
// folders that the caller named. All builds have one user, who owns every tree
// and the unpacked tools: without this, one bad build could change the next.
func (s spec) readOnly() error {
	writable := append([]string{private}, s.Writable...)
	if s.Tree != "" {
		writable = append(writable, s.Tree)
	}
	if s.Root != "" {
		writable = append(writable, usualTemp)
	}
	set := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID}
	if err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &set); err != nil {
		return fmt.Errorf("make the file system read only: %w", err)
	}
	clr := unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}
	for _, w := range writable {
		if err := unix.MountSetattr(unix.AT_FDCWD, w, unix.AT_SYMLINK_NOFOLLOW, &clr); err != nil {
			return fmt.Errorf("make %s writable: %w", w, err)
		}
	}
	return nil
}

// limit sets resource limits and closes the ways to more rights: programs with
// set-user-id, capabilities of a user namespace, descriptors left open.
func (s spec) limit() error {
	for what, n := range s.resources() {
		if err := syscall.Setrlimit(what, &syscall.Rlimit{Cur: n, Max: n}); err != nil {
			return fmt.Errorf("limit resource %d: %w", what, err)
		}
	}
	for c := 0; c <= unix.CAP_LAST_CAP; c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil && err != unix.EINVAL {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid new privileges: %w", err)
	}
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close descriptors: %w", err)
	}
	return nil
}
