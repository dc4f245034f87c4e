// SPDX-License-Identifier: Apache-2.0

// Package durable writes files that survive a crash at any moment: after a
// successful return the new content is there, after a crash either the old or
// the new content, whole.
//
// The system calls of a good write, in order (rename(2), fsync(2)):
//
//	openat  temporary file in the same folder, O_EXCL
//	write   all bytes
//	fsync   the file: its content is on disk before its name is
//	renameat over the old name, atomic
//	fsync   the folder: the new name is on disk
//
// The one sad path: a crash between the two fsyncs may show either content.
package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// WriteFile replaces a file's content. The folder must exist. Left-over
// temporary files of an earlier crash carry the prefix ".tmp-"; RemoveTemp
// clears them.
func WriteFile(path string, content []byte, mode fs.FileMode) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, tempPrefix+"*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write %s: %w", path, err), ignoreGone(os.Remove(f.Name())))
		}
	}()
	if _, err := f.Write(content); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Chmod(mode); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Sync(); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return SyncDir(dir)
}

const tempPrefix = ".tmp-"

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Remove deletes a file and makes that durable. A file that is not there is
// not an error: the call may be a repetition.
func Remove(path string) error {
	if err := ignoreGone(os.Remove(path)); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes the names in a folder durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	if err := d.Sync(); err != nil {
		return errors.Join(fmt.Errorf("sync folder %s: %w", dir, err), d.Close())
	}
	return d.Close()
}

// RemoveTemp clears what a crashed WriteFile left in a folder.
func RemoveTemp(dir string) error {
	names, err := filepath.Glob(filepath.Join(dir, tempPrefix+"*"))
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := ignoreGone(os.Remove(n)); err != nil {
			return err
		}
	}
	return nil
}

// ReadFile reads a regular file of at most limit bytes; a longer one is an
// error, not a cut. It follows no symbolic link in the last element.
func ReadFile(path string, limit int64) ([]byte, error) {
	f, err := Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	return ReadLimited(f, path, limit)
}

// Open opens a regular file for reading. It follows no symbolic link in the
// last element.
func Open(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|noFollow, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("read %s: not a regular file", path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// ReadLimited reads all of r; more than limit bytes is an error.
func ReadLimited(r io.Reader, name string, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("read %s: over the limit of %d bytes", name, limit)
	}
	return b, nil
}
