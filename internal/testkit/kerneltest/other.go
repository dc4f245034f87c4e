// SPDX-License-Identifier: Apache-2.0

package kerneltest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/sandbox"
)

// OtherCache is a second cache with the same kernel in another folder, where
// no build has left anything; change, which may be nil, may spoil its tree. It
// is gone after the test.
func OtherCache(t testing.TB, k Kernel, change func(tree string)) string {
	t.Helper()
	cache, err := os.MkdirTemp("/var/tmp", "klatch-other-cache-") //nolint:usetesting // the build user must reach it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(cache); err != nil {
			t.Error(err)
		}
	})
	there := kerneltree.At(cache, k.Entry)
	upper, work := filepath.Join(cache, "upper"), filepath.Join(cache, "work")
	for _, d := range []string{there.Source(), upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Chmod(cache, 0o755), sandbox.Own(upper), sandbox.Own(work)); err != nil {
		t.Fatal(err)
	}
	here := k.Tree
	if k.Entry.Buildroot != "" {
		if err := os.Symlink(filepath.Join(k.Cache, "buildroots"), filepath.Join(cache, "buildroots")); err != nil {
			t.Fatal(err)
		}
	}
	files, err := os.ReadDir(here.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.Name() == "modules" {
			if err := os.Symlink(filepath.Join(here.Dir, f.Name()), filepath.Join(there.Dir, f.Name())); err != nil {
				t.Fatal(err)
			}
		} else if !f.IsDir() {
			if err := os.Link(filepath.Join(here.Dir, f.Name()), filepath.Join(there.Dir, f.Name())); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := syscall.Mount("overlay", there.Source(), "overlay", 0,
		fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,metacopy=on", here.Source(), upper, work)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(there.Source(), syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if change != nil {
		change(there.Source())
	}
	return cache
}
