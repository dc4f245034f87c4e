// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// errno is what the kernel itself says to a module; 0 is that it took it.
func errno(module string) error {
	f, err := os.Open(module)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	n := unix.Errno(0)
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.As(err, &n) {
		return err
	}
	_, err = fmt.Fprintln(os.Stdout, int(n))
	return err
}

// kexec does not return when it works.
func kexec(kernel, initrd, line string) error {
	k, err := os.Open(kernel)
	if err != nil {
		return err
	}
	defer k.Close() //nolint:errcheck // opened for reading only
	i, err := os.Open(initrd)
	if err != nil {
		return err
	}
	defer i.Close() //nolint:errcheck // opened for reading only
	if err := unix.KexecFileLoad(int(k.Fd()), int(i.Fd()), line, 0); err != nil {
		return fmt.Errorf("kexec_file_load: %w", err)
	}
	unix.Sync()
	return unix.Reboot(unix.LINUX_REBOOT_CMD_KEXEC)
}
