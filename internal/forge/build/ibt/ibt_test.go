// SPDX-License-Identifier: Apache-2.0

package ibt

import (
	"bytes"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"klatch/internal/testkit"
)

// compiled is an object of ours: sealed_fn is only called, taken_fn's address
// is taken, and the seal section names sealed_fn as objtool would.
func compiled(t *testing.T) string {
	t.Helper()
	testkit.Need(t, "gcc")
	dir := t.TempDir()
	source := `
void other(void); void elsewhere(void);
__attribute__((noinline)) void sealed_fn(void) { other(); asm volatile(""); }
__attribute__((noinline)) void taken_fn(void) { other(); asm volatile("nop"); }
static __attribute__((noinline)) void local_fn(void) { other(); asm volatile("nop; nop"); }
void (*table[])(void) = { taken_fn };
void *user(void) { sealed_fn(); return local_fn; }
void *outside(void) { return elsewhere; }
asm(".pushsection .ibt_endbr_seal,\"a\"; .long sealed_fn - .; .popsection");
asm(".pushsection __mcount_loc,\"a\"; .quad sealed_fn; .popsection");
int main(void) { return user() != outside(); }
`
	c, o := filepath.Join(dir, "x.c"), filepath.Join(dir, "x.o")
	if err := os.WriteFile(c, []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-O2", "-fno-pic", "-mcmodel=kernel", "-ffunction-sections", "-c", "-o", o, c).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return o
}

func TestTakenAreThoseWhoseAddressIsUsed(t *testing.T) {
	b, err := os.ReadFile(compiled(t))
	if err != nil {
		t.Fatal(err)
	}
	got, err := Taken(b)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"taken_fn", "local_fn", "elsewhere"} {
		if !slices.Contains(got, want) {
			t.Errorf("%s is not among %v", want, got)
		}
	}
	for _, not := range []string{"sealed_fn", "other", "user"} {
		if slices.Contains(got, not) {
			t.Errorf("%s, which is only called, is among %v", not, got)
		}
	}
}

func TestSealedInAnObjectAndLinked(t *testing.T) {
	object := compiled(t)
	linked := filepath.Join(t.TempDir(), "linked")
	if out, err := exec.Command("ld", "-o", linked, "-e", "main", "--defsym=other=0", "--defsym=elsewhere=0", object).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, file := range []string{object, linked} {
		f, err := elf.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Sealed(f)
		if err != nil || len(got) != 1 || !got["sealed_fn"] {
			t.Errorf("%s: %v, %v", filepath.Base(file), got, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

func FuzzTaken(f *testing.F) {
	f.Add([]byte("\x7fELF\x02\x01\x01"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := Taken(b); err == nil && len(b) < 64 {
			t.Error("less than an ELF header was read")
		}
		if e, err := elf.NewFile(bytes.NewReader(b)); err == nil {
			_, _ = Sealed(e) // must not panic
		}
	})
}
