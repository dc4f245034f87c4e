// SPDX-License-Identifier: Apache-2.0

package kerneltree

import (
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// compiled makes an object with debug information.
func compiled(t *testing.T, dir, name, source string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	object := strings.TrimSuffix(name, ".c") + ".o"
	cmd := exec.Command("gcc", "-g", "-O2", "-c", "-o", object, name)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return object
}

func TestUnitsAreReadFromDebugInformation(t *testing.T) {
	dir := t.TempDir()
	a := compiled(t, dir, "net/a.c", "struct s { int x; }; int a(struct s *s) { return s->x; }\n")
	b := compiled(t, dir, "net/sub/b.c", "static int h(int x) { return x * 3; } int b(int x) { return h(x) + 1; }\n")
	cmd := exec.Command("ld", "-r", "-o", "both.ko", a, b)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got, err := unitsOf(filepath.Join(dir, "both.ko"), "both")
	if err != nil {
		t.Fatal(err)
	}
	want := []Unit{{"net/a.c", "both", "net/a.o"}, {"net/sub/b.c", "both", "net/sub/b.o"}}
	if !slices.Equal(got, want) {
		t.Errorf("units %v, want %v", got, want)
	}
}

func TestSymbolsArePrintedAsReadelfDoes(t *testing.T) {
	dir := t.TempDir()
	object := filepath.Join(dir, compiled(t, dir, "a.c", "int shown; static int hidden = 3; int a(void) { return shown + hidden++; }\n"))
	f, err := elf.Open(object)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := printSymbols(f)
	if err != nil {
		t.Fatal(err)
	}
	want, err := exec.Command("readelf", "-sW", object).Output()
	if err != nil {
		t.Fatal(err)
	}
	trim := func(b []byte) []string {
		var out []string
		for l := range strings.Lines(string(b)) {
			if f := strings.Fields(l); len(f) > 7 {
				out = append(out, strings.Join(f, " "))
			}
		}
		return out
	}
	if g, w := trim(got), trim(want); len(g) < 5 || !slices.Equal(g, w) {
		t.Errorf("printed\n%s\nreadelf says\n%s", got, want)
	}
}

// compileSeed compiles a.c of a folder.
func compileSeed(dir string) ([]byte, error) {
	cmd := exec.Command("gcc", "-g", "-c", "-o", "a.o", "a.c")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	return os.ReadFile(filepath.Join(dir, "a.o"))
}

func FuzzUnitNames(f *testing.F) {
	dir := f.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.c"), []byte("int a(void) { return 1; }\n"), 0o644); err != nil {
		f.Fatal(err)
	}
	seed, err := compileSeed(dir)
	if err != nil {
		f.Skip(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			return
		}
		file := filepath.Join(t.TempDir(), "x.o")
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
		_, _ = unitsOf(file, "x") // any bytes: an error or a list, never a panic
	})
}
