// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"syscall"
	"time"

	"klatch/internal/forge/lab"
)

// KillForTest kills the emulator behind the machine's back.
func KillForTest(m lab.Machine) { signal(m, syscall.SIGKILL) }

// StopForTest freezes the emulator.
func StopForTest(m lab.Machine) { signal(m, syscall.SIGSTOP) }

// StopFirstForTest freezes the first machine in the middle of its boot; the rig
// waits so long for each.
func StopFirstForTest(r *Rig, patience time.Duration) (boots func() int) {
	n := 0
	r.patience = patience
	r.started = func(m *machine) {
		if n++; n > 1 {
			return
		}
		for { // until the kernel speaks
			if text, err := m.Console(); err == nil && text != "" {
				StopForTest(m)
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return func() int { return n }
}

func signal(m lab.Machine, s syscall.Signal) {
	p, err := m.(*machine).process()
	if err != nil {
		panic(err)
	}
	_ = syscall.Kill(p.cmd.Process.Pid, s)
}
