// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestColdPartIsMadeToDiffer(t *testing.T) {
	dir := t.TempDir()
	source := `extern void told(const char *) __attribute__((cold)); int state;
int f(int i) { if (__builtin_expect(i == 7, 0)) { told("seven"); state++; } return i * 3; }`
	if err := os.WriteFile(filepath.Join(dir, "a.c"), []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("gcc", "-O2", "-c", "-fno-pic", "-mcmodel=kernel", "-fno-asynchronous-unwind-tables", "-ffunction-sections", "a.c")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b, err := os.ReadFile(filepath.Join(dir, "a.o"))
	if err != nil {
		t.Fatal(err)
	}
	changed, left, err := differing(b, []string{"f.cold"})
	if err != nil || len(left) != 0 {
		t.Fatalf("%v, left %q", err, left)
	}
	n := 0
	for i := range b {
		if b[i] != changed[i] {
			n++
		}
	}
	if len(changed) != len(b) || n != 1 {
		t.Errorf("%d bytes differ, want the addend of the jump back", n)
	}
	if _, _, err := differing(b, []string{"g.cold"}); err == nil {
		t.Error("a part that is not there")
	}
	if _, err := leftBehind(bytes.Repeat([]byte{1}, 100)); err == nil {
		t.Error("no object")
	}
}

func TestNamesOfColdParts(t *testing.T) {
	for name, want := range map[string]string{"f.cold": "f", "f.cold.3": "f", "f.isra.0.cold": "f.isra.0", "f.colder": "", "cold": "", "f": ""} {
		if got, _ := coldOf(name); got != want {
			t.Errorf("%s belongs to %q, want %q", name, got, want)
		}
	}
}
