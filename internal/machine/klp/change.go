// SPDX-License-Identifier: Apache-2.0

package klp

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"klatch/internal/fault"
)

// Load gives a module to the kernel. With success the livepatch is enabled
// and its transition runs.
func (k *Kernel) Load(module *os.File) error {
	return LoadFault(unix.FinitModule(int(module.Fd()), "", 0))
}

// Disable asks the kernel to stop using a livepatch, or reverses its
// transition; its folder goes away when that is done. One that is gone or on
// its way out already is no error: the call may be a repetition.
func (k *Kernel) Disable(name string) error {
	path := k.livepatch(name, "enabled")
	enabled, err := readBit(path)
	if gone(err) || err == nil && !enabled {
		return nil
	}
	if err == nil {
		err = writeZero(path)
	}
	if errors.Is(err, unix.EBUSY) {
		return fault.New(fault.Conflict, "transition_running", "disable livepatch %s: %w", name, err).
			WithHint("wait until the running transition has finished, or cancel it")
	}
	if err != nil {
		return fmt.Errorf("disable livepatch %s: %w", name, err)
	}
	return nil
}

func writeZero(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString("0")
	return errors.Join(err, f.Close())
}

// Remove takes a module out that nothing uses any more (delete_module(2)). A
// module that is gone, or still in use, is no error: the next call finds it.
func (k *Kernel) Remove(name string) error {
	err := unix.DeleteModule(name, unix.O_NONBLOCK)
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EBUSY) {
		return nil
	}
	return fmt.Errorf("remove module %s: %w", name, err)
}

// LoadFault explains what finit_module answered. Measured on Debian's 6.1:
// under enforcement every damage shows as EKEYREJECTED, with lockdown as EPERM,
// because the signature is checked first; without it a damaged file is ENOEXEC.
func LoadFault(err error) error {
	if err == nil {
		return nil
	}
	const seeLog = "the kernel log has the reason: journalctl -k"
	for _, f := range []struct {
		errnos []error
		kind   fault.Kind
		code   fault.Code
		why    string
		hint   string
	}{
		{[]error{unix.EKEYREJECTED, unix.ENOKEY, unix.ENOPKG, unix.EBADMSG, unix.ENODATA}, fault.Untrusted, "kernel_key_rejected",
			"key not trusted by this kernel", "enroll the publisher's module key, then reboot: docs/howto/secure-boot.md"},
		{[]error{unix.EPERM}, fault.Denied, "kernel_lockdown", "the kernel takes no such module from anybody",
			"with lockdown the publisher's module key must be enrolled; kernel.modules_disabled=1 forbids all modules until a reboot"},
		{[]error{unix.ENOEXEC}, fault.Conflict, "kernel_format", "not a livepatch module for this kernel", seeLog},
		{[]error{unix.EEXIST}, fault.Conflict, "kernel_exists", "a module of this name is in the kernel", "remove it, or wait until the kernel has"},
		{[]error{unix.EBUSY}, fault.Conflict, "kernel_busy", "another livepatch is on its way, or a tracer has a function for itself", "try again when the transition is over; klatch status names tracers"},
		{[]error{unix.EINVAL}, fault.Conflict, "kernel_refused", "the kernel does not find what the livepatch replaces", seeLog},
		{[]error{unix.ENOENT}, fault.Conflict, "kernel_symbol", "the kernel lacks a symbol that the livepatch needs", seeLog},
		{[]error{unix.ENOMEM}, fault.Unavailable, "kernel_memory", "no memory for the module", "free memory, then try again"},
	} {
		for _, e := range f.errnos {
			if errors.Is(err, e) {
				return fault.New(f.kind, f.code, "load module: %s: %w", f.why, err).WithHint("%s", f.hint)
			}
		}
	}
	return fault.New(fault.Internal, "kernel_error", "load module: %w", err).WithHint(seeLog)
}
