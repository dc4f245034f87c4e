// SPDX-License-Identifier: Apache-2.0

// Package fsblob keeps the files of package blob in a folder, as any web
// server could serve them. Only cmd may import it. Start with New.
package fsblob

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/server/blob"
)

// Store is a folder.
type Store struct{ dir string }

var _ blob.Store = Store{}

// New names the folder; Put makes it.
func New(dir string) Store { return Store{dir} }

// Place is the folder.
func (s Store) Place() string { return s.dir }

type file struct {
	*os.File
	size int64
}

func (f file) Size() int64 { return f.size }

// Open opens a regular file. No symbolic link leads out of the folder.
func (s Store) Open(_ context.Context, name string) (blob.Reader, error) {
	if err := blob.Valid(name); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, blob.Missing(name, err)
	}
	if err != nil {
		return nil, err
	}
	defer root.Close() //nolint:errcheck // read only
	f, err := root.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, blob.Missing(name, err)
	}
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fault.New(fault.NotFound, "file_missing", "%s is not a regular file", name)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return file{f, st.Size()}, nil
}

// Put writes the file durably, with the folders that it needs.
func (s Store) Put(_ context.Context, name string, content []byte, _ blob.Header) error {
	if err := blob.Valid(name); err != nil {
		return err
	}
	path := filepath.Join(s.dir, filepath.FromSlash(name))
	if err := s.mkdir(filepath.Dir(path)); err != nil {
		return err
	}
	return durable.WriteFile(path, content, 0o644)
}

// mkdir makes folders whose names survive a crash.
func (s Store) mkdir(dir string) error {
	if st, err := os.Stat(dir); err == nil && st.IsDir() {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for d := dir; len(d) >= len(s.dir); d = filepath.Dir(d) {
		if err := durable.SyncDir(filepath.Dir(d)); err != nil {
			return err
		}
	}
	return nil
}

// List walks the folder. What a crashed write left, and files that are none of
// ours, are not listed.
func (s Store) List(ctx context.Context, prefix string) ([]string, error) {
	if err := blob.ValidPrefix(prefix); err != nil {
		return nil, err
	}
	var names []string
	top := filepath.Join(s.dir, filepath.FromSlash(prefix))
	err := filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		case !e.Type().IsRegular():
			return nil
		}
		rel, err := filepath.Rel(s.dir, path)
		if err != nil {
			return err
		}
		if name := filepath.ToSlash(rel); blob.Valid(name) == nil {
			names = append(names, name)
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list %s: %w", top, err)
	}
	slices.SortFunc(names, strings.Compare)
	return names, nil
}

// Delete removes a file durably, and the folder that it leaves empty.
func (s Store) Delete(_ context.Context, name string) error {
	if err := blob.Valid(name); err != nil {
		return err
	}
	path := filepath.Join(s.dir, filepath.FromSlash(name))
	dir := filepath.Dir(path)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := durable.Remove(path); err != nil {
		return err
	}
	if dir != s.dir && os.Remove(dir) == nil { // fails while the folder holds anything
		return durable.SyncDir(filepath.Dir(dir))
	}
	return nil
}
