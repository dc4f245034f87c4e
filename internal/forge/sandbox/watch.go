// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// How often a build is looked at. What it can take beyond a limit is what it
// gets in that time; looking must cost little beside the compiler.
const (
	watchEvery = 100 * time.Millisecond
	watchShare = 20 // of the time, at most one part in so many for counting files
)

// watch looks at a running build and stops it when it is over a limit. It
// needs no right that the caller lacks and no control group: ADR 0017.
func (c Command) watch(ctx context.Context, pid int, stop func(error)) {
	l := c.Limits.WithDefaults()
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	var nextWalk time.Time
	var files int64
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		u := usageOf(pid, l.Processes)
		if now := time.Now(); now.After(nextWalk) {
			files = c.written(l.Disk)
			nextWalk = time.Now().Add(watchShare * time.Since(now))
		}
		switch free, ok := c.free(); {
		case u.processes > l.Processes:
			stop(overProcesses(u.processes, l.Processes))
		case u.memory > l.Memory:
			stop(overMemory(u.memory, l.Memory))
		case files+u.removed > l.Disk:
			stop(overDisk(files+u.removed, l.Disk))
		case ok && free < freeDisk:
			stop(noSpace(c.Scratch, free))
		default:
			continue
		}
		return
	}
}

// usage is what all processes of one sandbox hold.
type usage struct {
	processes int
	memory    int64 // bytes: private and shared pages, files in memory
	removed   int64 // bytes on disk of files that have no name anymore
}

// usageOf adds up the process and all that descend from it. In its process
// namespace it is the parent of every orphan, so none can leave. Memory that
// several processes share counts for each: hostile builds share much, honest
// ones little.
func usageOf(pid, most int) usage {
	var u usage
	tree := descendants(pid)
	u.processes = len(tree)
	if u.processes > most {
		return u // that is enough to end it, and looking at each takes time
	}
	seen := map[fileID]bool{}
	for _, p := range tree {
		dir := filepath.Join("/proc", strconv.Itoa(p))
		u.memory += residentMemory(dir)
		u.addRemoved(dir, seen)
	}
	u.memory += temporary(pid)
	return u
}

// descendants lists a process and its descendants, from /proc/PID/stat
// (proc(5): the parent is the second field after the name in parentheses).
func descendants(pid int) []int {
	names, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	children := map[int][]int{}
	for _, n := range names {
		p, err := strconv.Atoi(n.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", n.Name(), "stat")) // one page, of the kernel
		if err != nil {
			continue // gone
		}
		rest := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(rest) < 2 {
			continue
		}
		if parent, err := strconv.Atoi(rest[1]); err == nil {
			children[parent] = append(children[parent], p)
		}
	}
	all := []int{pid}
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all
}

// residentMemory reads a process's own pages and its shared memory. Pages of
// files on disk are not counted: the kernel takes those back.
func residentMemory(dir string) int64 {
	status, err := os.ReadFile(filepath.Join(dir, "status")) // some pages, of the kernel
	if err != nil {
		return 0
	}
	var n int64
	for line := range strings.Lines(string(status)) {
		if !strings.HasPrefix(line, "RssAnon:") && !strings.HasPrefix(line, "RssShmem:") {
			continue
		}
		var name string
		var kib int64
		if _, err := fmt.Sscan(line, &name, &kib); err == nil {
			n += kib << 10
		}
	}
	return n
}

type fileID struct{ dev, ino uint64 }

// addRemoved adds files that are open but have no name: folders do not show
// them. Those of tmpfs and memfd_create(2) are memory.
func (u *usage) addRemoved(dir string, seen map[fileID]bool) {
	fds, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return
	}
	for _, fd := range fds {
		name := filepath.Join(dir, "fd", fd.Name())
		var st unix.Stat_t
		if unix.Stat(name, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink > 0 || seen[fileID{st.Dev, st.Ino}] {
			continue
		}
		seen[fileID{st.Dev, st.Ino}] = true
		var vfs unix.Statfs_t
		if unix.Statfs(name, &vfs) == nil && vfs.Type == unix.TMPFS_MAGIC {
			if strings.HasPrefix(readlink(name), "/memfd:") { // else in what temporary says
				u.memory += st.Blocks * 512
			}
			continue
		}
		u.removed += st.Blocks * 512
	}
}

func readlink(name string) string {
	to, err := os.Readlink(name)
	if err != nil {
		return ""
	}
	return to
}

// temporary is what the sandbox's own folder for temporary files holds: a
// tmpfs, so memory. Until it is mounted the host's shows, which is not ours.
func temporary(pid int) int64 {
	inside := filepath.Join("/proc", strconv.Itoa(pid), "root", private)
	var here, there unix.Stat_t
	if unix.Stat(private, &here) != nil || unix.Stat(inside, &there) != nil || here.Dev == there.Dev {
		return 0
	}
	var vfs unix.Statfs_t
	if unix.Statfs(inside, &vfs) != nil || vfs.Type != unix.TMPFS_MAGIC {
		return 0
	}
	return int64(vfs.Blocks-vfs.Bfree) * vfs.Bsize //nolint:gosec // blocks in memory
}

// perEntry is what a file or folder costs beside its content: an inode and a
// name. Millions of empty files fill a disk too.
const perEntry = 4 << 10

// written adds up what lies in the folders that the build may write to, and
// stops counting once it is over the limit.
func (c Command) written(limit int64) int64 {
	folders := c.Writable
	if c.Tree != "" {
		folders = append([]string{c.upper()}, folders...)
	}
	var n int64
	for _, f := range folders {
		_ = filepath.WalkDir(f, func(_ string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil //nolint:nilerr // what is removed meanwhile is not there
			}
			n += perEntry
			if info, err := d.Info(); err == nil && !d.IsDir() {
				if st, ok := info.Sys().(*syscall.Stat_t); ok {
					n += st.Blocks * 512 // stat(2): whatever the block size
				}
			}
			if n > limit {
				return fs.SkipAll
			}
			return nil
		})
	}
	return n
}

// free is the room on the disk of the first folder that the build writes to.
func (c Command) free() (int64, bool) {
	folders := c.Writable
	if c.Tree != "" {
		folders = append([]string{c.Scratch}, folders...)
	}
	if len(folders) == 0 {
		return 0, false
	}
	var vfs unix.Statfs_t
	if unix.Statfs(folders[0], &vfs) != nil {
		return 0, false
	}
	return int64(vfs.Bavail) * vfs.Bsize, true //nolint:gosec // a disk
}
