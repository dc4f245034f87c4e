// SPDX-License-Identifier: Apache-2.0

package build

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// Scratch makes an empty folder that belongs to this run, and removes those
// that runs which were killed have left. A folder is in use while somebody
// holds its lock; the kernel drops that when the process ends, however it ends.
func Scratch(parent, prefix string) (dir string, remove func(), err error) {
	guard, err := lockedDir(parent, syscall.LOCK_EX) // nobody is between making a folder and locking it
	if err != nil {
		return "", nil, err
	}
	defer guard.Close() //nolint:errcheck // nothing was written
	entries, err := os.ReadDir(parent)
	if err != nil {
		return "", nil, err
	}
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), prefix) {
			continue
		}
		left := filepath.Join(parent, e.Name())
		f, err := lockedDir(left, syscall.LOCK_EX|syscall.LOCK_NB)
		if err != nil {
			continue // in use
		}
		if err := errors.Join(os.RemoveAll(left), f.Close()); err != nil {
			return "", nil, fmt.Errorf("remove what a killed build left: %w", err)
		}
	}
	dir, err = os.MkdirTemp(parent, prefix)
	if err != nil {
		return "", nil, err
	}
	f, err := lockedDir(dir, syscall.LOCK_EX)
	if err != nil {
		return "", nil, err
	}
	return dir, func() {
		_ = os.RemoveAll(dir) // else the next run does it
		_ = f.Close()
	}, nil
}

func lockedDir(dir string, how int) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(f.Fd()), how)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
	}
	return f, nil
}
