// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"klatch/internal/forge/sandbox"
)

func TestCompressedFilesAreReplaced(t *testing.T) {
	dir, err := os.MkdirTemp("/var/tmp", "klatch-archive-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	deep := filepath.Join(dir, "a b", "c")
	if err := os.MkdirAll(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 120 {
		f := filepath.Join(deep, fmt.Sprintf("m %d.ko", i))
		if err := os.WriteFile(f, fmt.Appendf(nil, "module %d", i), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("sh", "-c", "find '"+dir+"' -name '*.ko' -print0 | xargs -0 xz").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	err = filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error { return errors.Join(err, sandbox.Own(p)) })
	if err != nil {
		t.Fatal(err)
	}
	if err := UncompressXZ(t.Context(), dir, "*.ko.xz"); err != nil {
		t.Fatal(err)
	}
	for i := range 120 {
		b, err := os.ReadFile(filepath.Join(deep, fmt.Sprintf("m %d.ko", i)))
		if err != nil || string(b) != fmt.Sprintf("module %d", i) {
			t.Fatalf("module %d: %q, %v", i, b, err)
		}
	}
	if err := os.WriteFile(filepath.Join(deep, "bad.ko.xz"), []byte("no xz"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := UncompressXZ(t.Context(), dir, "*.ko.xz"); err == nil {
		t.Error("a file that is not compressed was no error")
	}
	if err := UncompressXZ(t.Context(), dir, "*.none"); err != nil {
		t.Errorf("nothing to do: %v", err)
	}
}
