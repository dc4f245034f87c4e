// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"klatch/internal/fault"
	"klatch/internal/forge/sandbox"
)

// Unpack extracts a package's files into a folder that exists, as the build
// user where we are root: a package is data here, its scripts are never run.
// patterns are tar wildcards; none means everything. One that does not start
// with "./" fits in every folder.
func Unpack(ctx context.Context, deb, dir string, patterns ...string) error {
	tar := []string{"tar", "-x", "-f", "-", "-C", dir, "--no-same-owner", "--no-same-permissions"}
	if len(patterns) > 0 {
		tar = append(append(tar, "--wildcards", "--no-wildcards-match-slash", "--no-anchored"), patterns...)
	}
	return pipe(ctx, []string{"dpkg-deb", "--fsys-tarfile", deb}, tar)
}

// UnpackTar extracts a compressed tar archive in the same way, without its
// first path element.
func UnpackTar(ctx context.Context, archive, dir string, patterns ...string) error {
	tar := []string{"tar", "-x", "-f", "-", "-C", dir, "--strip-components=1", "--no-same-owner", "--no-same-permissions"}
	if len(patterns) > 0 {
		tar = append(tar, patterns...)
	}
	return pipe(ctx, []string{"xz", "-dc", "-T0", archive}, tar)
}

// UncompressXZ replaces the files of an unpacked folder that xz compressed and
// whose names fit the pattern, on all processors.
func UncompressXZ(ctx context.Context, dir, pattern string) error {
	return pipe(ctx, []string{"find", dir, "-type", "f", "-name", pattern, "-print0"},
		[]string{"xargs", "-0", "-r", "-P", strconv.Itoa(runtime.NumCPU()), "-n", "50", "xz", "-d", "--"})
}

// diskFull is what tar says: a write that was cut short comes first.
var diskFull = regexp.MustCompile(`No space left on device|Disk quota exceeded|Wrote only [0-9]+ of [0-9]+ bytes`)

// pipe runs "first | second", second as the build user where we are root. Both
// end when we are killed: else they would write on into a folder that the next
// run makes anew.
func pipe(ctx context.Context, first, second []string) error {
	runtime.LockOSThread() // whose end Pdeathsig follows
	defer runtime.UnlockOSThread()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	a := exec.CommandContext(ctx, first[0], first[1:]...)
	b := exec.CommandContext(ctx, second[0], second[1:]...)
	var saidA, saidB bytes.Buffer // two, because both are written at once
	a.Stdout, a.Stderr = w, &saidA
	b.Stdin, b.Stderr = r, &saidB
	b.Env = sandbox.BaseEnv()
	a.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	b.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Getuid() == 0 {
		b.SysProcAttr.Credential = &syscall.Credential{Uid: sandbox.UID, Gid: sandbox.GID}
	}
	if err := b.Start(); err != nil {
		return errors.Join(fmt.Errorf("start %s: %w", second[0], err), r.Close(), w.Close())
	}
	errPipe := r.Close() // only the second reads: if it dies, the first must not wait for a reader
	errA := a.Run()
	errPipe = errors.Join(errPipe, w.Close())
	errB := b.Wait()
	if err := errors.Join(errB, errA); err != nil {
		if diskFull.Match(saidB.Bytes()) {
			return fault.New(fault.Unavailable, "disk_full", "unpack: no space left on the disk: %s: %w", strings.TrimSpace(lastLines(saidB.String(), 3)), err).
				WithHint("make room in the cache, then run the command again")
		}
		return fmt.Errorf("unpack: %s | %s: %s: %w", first[0], second[0], strings.TrimSpace(lastLines(saidA.String()+saidB.String(), 3)), err)
	}
	return errPipe
}
