// SPDX-License-Identifier: Apache-2.0

package board

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"
)

// maxHolder bounds what is read from a lock file.
const maxHolder = 1 << 10

// lock takes the board. The kernel holds the lock and gives it back when
// this process ends, however it ends; the file's text is for people only and
// may be that of a former holder.
func lock(path string) (unlock func() error, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		holder, rerr := io.ReadAll(io.LimitReader(f, maxHolder))
		who := strings.TrimSpace(string(holder))
		if who == "" {
			who = "a process that does not say who it is"
		}
		return nil, errors.Join(fmt.Errorf("board is in use by %q (%s)", who, path), rerr, f.Close())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	host, _ := os.Hostname()
	text := fmt.Sprintf("process %d on %s as user %d since %s\n", os.Getpid(), host, os.Getuid(), time.Now().UTC().Format(time.RFC3339))
	if err := errors.Join(f.Truncate(0), write(f, text)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	// The file stays: removing it would let two hold two files of one name.
	return func() error { return errors.Join(f.Truncate(0), f.Close()) }, nil
}

func write(f *os.File, text string) error {
	_, err := f.WriteAt([]byte(text), 0)
	return err
}
