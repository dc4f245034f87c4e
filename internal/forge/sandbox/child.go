// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

// setupFailed and setupMark tell a sandbox that could not be made from a
// program that ended badly.
const (
	setupFailed = 125
	setupMark   = "klatch-sandbox: "
)

type spec struct {
	Tree, Upper, Work, Dir string
	Argv                   []string
	Drop                   bool
}

func (c Command) spec() spec {
	return spec{Tree: c.Tree, Upper: c.upper(), Work: c.work(), Dir: c.Dir, Argv: c.Argv, Drop: os.Getuid() == 0}
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
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if s.Tree != "" {
		options := "lowerdir=" + s.Tree + ",upperdir=" + s.Upper + ",workdir=" + s.Work
		if err := syscall.Mount("overlay", s.Tree, "overlay", syscall.MS_NODEV|syscall.MS_NOSUID, options); err != nil {
			return fmt.Errorf("lay scratch folder over %s: %w", s.Tree, err)
		}
	}
	if err := syscall.Mount("proc", "/proc", "proc", syscall.MS_NODEV|syscall.MS_NOSUID|syscall.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount own process table: %w", err)
	}
	for _, l := range []struct {
		what  int
		limit uint64
	}{{syscall.RLIMIT_FSIZE, maxFileBytes}, {syscall.RLIMIT_AS, maxMemory}, {syscall.RLIMIT_CORE, 0}} {
		if err := syscall.Setrlimit(l.what, &syscall.Rlimit{Cur: l.limit, Max: l.limit}); err != nil {
			return fmt.Errorf("limit resource %d: %w", l.what, err)
		}
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
	return syscall.Exec(program, s.Argv, os.Environ())
}
