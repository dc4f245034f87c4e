// SPDX-License-Identifier: Apache-2.0

// Command klatch-loader-fake is klatch-loader over a kernel in a folder: the
// real loader, the real socket, nothing changed on the machine. Tests kill it
// at every step; tests of klatchd may use it as their loader.
//
//	klatch-loader-fake DIR serve SOCKET   until nobody asks for a minute;
//	                                      says "listening" when it does
//	klatch-loader-fake DIR boot
//
// DIR holds kernel/ (made by klpfake.New), state/ and etc/ (trust.json).
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"klatch/internal/machine/loader"
	"klatch/internal/machine/loaderapi"
	"klatch/internal/testkit/klpfake"
)

func main() {
	// All requests run on the main thread, so that strace, which counts the
	// calls of each thread, can kill at the n-th.
	runtime.LockOSThread()
	if err := run(os.Args[1:]); err != nil {
		_, _ = fmt.Fprintln(os.Stderr, "klatch-loader-fake:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return errors.New("want DIR serve SOCKET, or DIR boot")
	}
	l := &loader.Loader{
		Kernel:  klpfake.Open(filepath.Join(args[0], "kernel")),
		State:   filepath.Join(args[0], "state"),
		Etc:     filepath.Join(args[0], "etc"),
		Daemon:  uint32(os.Getuid()),
		Log:     slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Overdue: func() { os.Exit(75) },
	}
	switch {
	case args[1] == "boot" && len(args) == 2:
		_, err := l.Boot()
		return err
	case args[1] == "serve" && len(args) == 3:
		if err := os.Remove(args[2]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: args[2]}), unix.Listen(fd, 16)); err != nil {
			return err
		}
		on, err := loaderapi.On(fd)
		if err != nil {
			return err
		}
		if _, err := os.Stdout.WriteString("listening\n"); err != nil {
			return err
		}
		return l.Serve(on, time.Minute)
	}
	return fmt.Errorf("unknown arguments %q", args[1:])
}
