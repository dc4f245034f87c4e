// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

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

// pipe runs "first | second", second as the build user where we are root.
func pipe(ctx context.Context, first, second []string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	a := exec.CommandContext(ctx, first[0], first[1:]...)
	b := exec.CommandContext(ctx, second[0], second[1:]...)
	var complaint bytes.Buffer
	a.Stdout, a.Stderr = w, &complaint
	b.Stdin, b.Stderr = r, &complaint
	b.Env = sandbox.BaseEnv()
	if os.Getuid() == 0 {
		b.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: sandbox.UID, Gid: sandbox.GID}}
	}
	if err := b.Start(); err != nil {
		return errors.Join(fmt.Errorf("start %s: %w", second[0], err), r.Close(), w.Close())
	}
	errPipe := r.Close() // only the second reads: if it dies, the first must not wait for a reader
	errA := a.Run()
	errPipe = errors.Join(errPipe, w.Close())
	errB := b.Wait()
	if err := errors.Join(errB, errA); err != nil {
		return fmt.Errorf("unpack: %s | %s: %s: %w", first[0], second[0], strings.TrimSpace(lastLines(complaint.String(), 3)), err)
	}
	return errPipe
}
