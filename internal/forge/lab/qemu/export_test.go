// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"syscall"

	"klatch/internal/forge/lab"
)

// KillForTest kills the emulator behind the machine's back.
func KillForTest(m lab.Machine) { signal(m, syscall.SIGKILL) }

// StopForTest freezes the emulator.
func StopForTest(m lab.Machine) { signal(m, syscall.SIGSTOP) }

func signal(m lab.Machine, s syscall.Signal) {
	p, err := m.(*machine).process()
	if err != nil {
		panic(err)
	}
	_ = syscall.Kill(p.cmd.Process.Pid, s)
}
