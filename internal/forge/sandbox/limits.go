// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"klatch/internal/fault"
)

// Limits bound a build, beside the time of its context. Zero means the
// default. Each is of everything that one Run starts, taken together.
type Limits struct {
	Memory    int64 // bytes: processes, their shared memory and their temporary files
	Disk      int64 // bytes in the scratch folder and the writable folders, those of earlier commands too
	Processes int
}

// The defaults. A kernel object takes under 1 GiB of memory and a few MiB of
// disk; objtool on large ones is the worst case. A prepared tree, which is
// made in a writable folder, has 2 GB.
const (
	memoryBase      = 4 << 30
	memoryPerCPU    = 1 << 30
	defaultDisk     = 16 << 30
	defaultProcs    = 1024
	freeDisk        = 256 << 20 // what a build leaves for others on the scratch folder's disk
	maxFileBytes    = 4 << 30
	maxMemory       = 8 << 30 // of one process: address space
	leastSpace      = 4 << 30 // and not less: programs reserve more than they use
	maxOutput       = 4 << 20
	maxTemp         = 4 << 30 // of memory, for temporary files
	otherProcs      = 256     // of the build user, in other builds
	niceness        = 19      // lowest: a fork bomb must not starve the watch that ends it
	leastMemory     = 256 << 20
	leastDisk       = 16 << 20
	outOfMemoryPref = "1000" // proc(5), oom_score_adj: the kernel ends a build before anything else
)

// WithDefaults fills in what is zero.
func (l Limits) WithDefaults() Limits {
	if l.Memory == 0 {
		l.Memory = memoryBase + memoryPerCPU*int64(runtime.NumCPU())
	}
	if l.Disk == 0 {
		l.Disk = defaultDisk
	}
	if l.Processes == 0 {
		l.Processes = defaultProcs
	}
	return l
}

// Check refuses limits that no build fits in.
func (l Limits) Check() error {
	switch {
	case l.Memory != 0 && l.Memory < leastMemory:
		return fault.New(fault.Invalid, "usage", "a memory limit of %d bytes is too small for a compiler", l.Memory).WithHint("give at least 256M")
	case l.Disk != 0 && l.Disk < leastDisk:
		return fault.New(fault.Invalid, "usage", "a disk limit of %d bytes is too small for a build", l.Disk).WithHint("give at least 16M")
	case l.Processes < 0:
		return fault.New(fault.Invalid, "usage", "a limit of %d processes", l.Processes)
	}
	return nil
}

func overMemory(have, limit int64) error {
	return fault.New(fault.Unavailable, "memory_limit", "the build uses %d MiB of memory, limit %d MiB", have>>20, limit>>20).
		WithHint("give more with --memory, if the fix is not hostile")
}

func overDisk(have, limit int64) error {
	return fault.New(fault.Unavailable, "disk_limit", "the build wrote %d MiB, limit %d MiB", have>>20, limit>>20).
		WithHint("give more with --disk, if the fix is not hostile")
}

func overProcesses(have, limit int) error {
	return fault.New(fault.Unavailable, "process_limit", "the build has %d processes, limit %d", have, limit).
		WithHint("this is what a fork bomb looks like: look at the makefiles that the fix touches")
}

func noSpace(path string, free int64) error {
	return fault.New(fault.Unavailable, "disk_full", "the disk of %s has %d MiB left", path, free>>20).
		WithHint("make room, then run the command again")
}

// resources are the kernel's own limits, of one process each (getrlimit(2)).
// They stop at once what the watch stops in a moment.
func (s spec) resources() map[int]uint64 {
	r := map[int]uint64{
		unix.RLIMIT_FSIZE: uint64(min(maxFileBytes, s.Limits.Disk)), //nolint:gosec // checked: positive
		unix.RLIMIT_AS:    uint64(min(maxMemory, max(leastSpace, s.Limits.Memory))),
		unix.RLIMIT_CORE:  0,
	}
	if s.Drop { // the kernel counts by user; without root that is all of the caller's
		r[unix.RLIMIT_NPROC] = uint64(2*s.Limits.Processes + otherProcs) //nolint:gosec // as above
	}
	return r
}

// tempOptions are those of the tmpfs for temporary files.
func (s spec) tempOptions() string {
	return "mode=1777,size=" + strconv.FormatInt(min(maxTemp, s.Limits.Memory), 10)
}

// preferred makes the build the first to be ended where the whole machine has
// no memory left, and the last to get the processor. Where that is not allowed
// the other limits still hold.
func preferred() {
	_ = syscall.Setpriority(syscall.PRIO_PROCESS, 0, niceness)
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte(outOfMemoryPref), 0) //nolint:forbidigo // no file on a disk
}

// endWithCaller makes the program, and with it all of its process namespace,
// end when the thread ends that called Run: kill -9 leaves no build running.
// Run asks for that too, but a change of user makes the kernel forget it
// (prctl(2), PR_SET_PDEATHSIG).
func endWithCaller() error {
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("end with the caller: %w", err)
	}
	return nil
}
