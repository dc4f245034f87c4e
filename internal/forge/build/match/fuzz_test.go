// SPDX-License-Identifier: Apache-2.0

package match

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// FuzzImage reads any bytes as a kernel and as a module, and compares a good
// object with what came out: an error or a report, never a panic.
func FuzzImage(f *testing.F) {
	dir := f.TempDir()
	c, object := filepath.Join(dir, "a.c"), filepath.Join(dir, "a.o")
	if err := os.WriteFile(c, []byte(source), 0o644); err != nil {
		f.Fatal(err)
	}
	for _, argv := range [][]string{
		{"gcc", "-O2", "-c", "-ffunction-sections", "-o", object, c},
		{"ld", "-e", "0", "--unresolved-symbols=ignore-all", "-o", filepath.Join(dir, "vmlinux"), object},
		{"ld", "-r", "-o", filepath.Join(dir, "a.ko"), object},
	} {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
			f.Skipf("%v: %s", err, out)
		}
	}
	for _, n := range []string{"a.o", "a.ko", "vmlinux"} {
		seed, err := os.ReadFile(filepath.Join(dir, n))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(seed)
	}
	functions, err := Changed(object, object)
	if err != nil || len(functions) != 0 {
		f.Fatalf("functions %v, %v", functions, err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		file := filepath.Join(t.TempDir(), "x")
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
		vm, err := Open(file)
		if err == nil {
			r := Empty()
			_ = vm.Object(object, "a.c", nil, &r)
		}
		ko, err := OpenModule(file, "x")
		if err == nil {
			r := Empty()
			_ = ko.Object(object, "a.c", nil, &r)
		}
		_, _ = Changed(file, object)
		_, _ = Changed(object, file)
	})
}
