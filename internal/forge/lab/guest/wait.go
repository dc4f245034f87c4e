// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"fmt"
	"syscall"
)

// WaitArg is the argument that makes a guest's init program sleep in the
// kernel's function kernel_clone instead, until it is killed: "/proc/1/exe
// WaitArg". Unlike most sleeps it is one that the kernel's own signal to tasks
// that hold a transition up does not end (TASK_KILLABLE, vfork(2)).
const WaitArg = "klatch-lab-wait"

// wait makes a child that neither ends nor starts another program.
func wait() error {
	pid, _, e := syscall.RawSyscall6(syscall.SYS_CLONE, syscall.CLONE_VFORK|uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
	if e != 0 {
		return e
	}
	for pid == 0 { // the child; nothing but system calls may be done here
		_, _, _ = syscall.RawSyscall(syscall.SYS_PAUSE, 0, 0, 0)
	}
	return fmt.Errorf("the child %d ended", pid)
}
