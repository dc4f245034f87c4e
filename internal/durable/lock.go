// SPDX-License-Identifier: Apache-2.0

package durable

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Lock waits until no other process holds the folder's lock and takes it
// (flock(2)). Closing the file, or the end of the process, gives it up.
func Lock(dir string) (*os.File, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lock folder: %w", err)
	}
	for {
		err := unix.Flock(int(d.Fd()), unix.LOCK_EX)
		if err == nil {
			return d, nil
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock folder %s: %w", dir, err), d.Close())
		}
	}
}
