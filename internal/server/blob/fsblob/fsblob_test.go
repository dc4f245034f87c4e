// SPDX-License-Identifier: Apache-2.0

package fsblob_test

import (
	"os"
	"path/filepath"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/server/blob"
	"klatch/internal/server/blob/blobtest"
	"klatch/internal/server/blob/fsblob"
)

func TestFolder(t *testing.T) {
	blobtest.Run(t, func(t *testing.T) blob.Store { return fsblob.New(filepath.Join(t.TempDir(), "repository")) })
}

// TestNoLinkLeadsOut: somebody may have put a link into the folder.
func TestNoLinkLeadsOut(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(secret, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	s := fsblob.New(dir)
	if r, err := s.Open(t.Context(), "link"); err == nil {
		r.Close()
		t.Error("a link out of the folder was followed")
	}
	if names, err := s.List(t.Context(), ""); err != nil || len(names) != 0 {
		t.Errorf("%q, %v", names, err)
	}
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o750); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(t.Context(), "folder"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a folder opens: %v", err)
	}
}
