// SPDX-License-Identifier: Apache-2.0

package durable

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"klatch/internal/fault"
)

// Lock takes the advisory lock of a file (flock(2), exclusive), which it
// makes if it is missing, and does not wait: somebody else's lock is
// a conflict. The kernel drops the lock when the process ends, however it
// ends, so none is ever stale.
func Lock(path string) (unlock func() error, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|noFollow, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = fault.New(fault.Conflict, "locked", "lock %s: another process holds it", path).
				WithHint("wait until the other process is done, then repeat")
		} else {
			err = fmt.Errorf("lock %s: %w", path, err)
		}
		return nil, errors.Join(err, f.Close())
	}
	// Unlocked by word and not by Close alone: a child that this process starts
	// at the same moment holds the same descriptor until its exec.
	return func() error { return errors.Join(syscall.Flock(int(f.Fd()), syscall.LOCK_UN), f.Close()) }, nil
}
