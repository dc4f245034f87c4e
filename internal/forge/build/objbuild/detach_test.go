// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/testkit"
)

const hiddenSource = `
#define hide __attribute__((noinline, no_instrument_function))
extern void print(const char *);
hide static int inner(int x) { if (x == 77) print("seven"); return x * 3; }
asm(".pushsection .text.third,\"ax\"; .type __pfx_third,@function; __pfx_third: nop; .size __pfx_third,1; .popsection");
asm(".pushsection .text.inner,\"ax\"; .type __pfx_inner,@function; __pfx_inner: nop; .size __pfx_inner,1; .popsection");
asm(".pushsection .text.unlikely.inner,\"ax\"; .type inner.cold,@function; inner.cold: nop; .size inner.cold,1; .popsection");
hide static int outer(int x) { print("outer"); return inner(x) + 1; }
int first(int x) { return inner(x) + 2; }
int second(int x) { print("second"); return outer(x) - 2; }
int third(int x) { return x * 5 + 1; }
`

func compiled(t testing.TB, text string) []byte {
	t.Helper()
	dir := t.TempDir()
	c, o := filepath.Join(dir, "x.c"), filepath.Join(dir, "x.o")
	if err := os.WriteFile(c, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-O2", "-g0", "-pg", "-mfentry", "-fno-pic", "-mcmodel=kernel", "-fcf-protection=none",
		"-fno-ipa-sra", "-fno-ipa-icf", "-ffunction-sections", "-fdata-sections", "-c", "-o", o, c).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b, err := os.ReadFile(o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A function that the kernel cannot redirect becomes a copy of the livepatch's
// own, with everything of its kind that leads to it, up to functions that the
// kernel can redirect.
func TestWhichFunctionsBecomePrivate(t *testing.T) {
	testkit.Need(t, "gcc")
	for _, c := range []struct {
		name, more string
		changed    []string
		want       []string
	}{
		{"with its caller of the same kind", "", []string{"inner"}, []string{"inner", "outer"}},
		{"only itself", "", []string{"outer"}, []string{"outer"}},
		{"one that the kernel can redirect", "", []string{"third"}, nil},
		{"one that a table names", "int (*const table[])(int) = {inner};\n", []string{"inner"}, nil},
		{"one that a variable names", "int (*hook)(int) = outer;\n", []string{"outer"}, nil},
		{"one with a variable that lives on", "hide static int counts(void) { static int n = 3; return n++; }\nint fourth(void) { return counts(); }\n", []string{"counts"}, nil},
		{"one that other files call", "hide int known(int x) { print(\"known\"); return x; }\n", []string{"known"}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			calls, err := readCalls(compiled(t, hiddenSource+c.more))
			if err != nil {
				t.Fatal(err)
			}
			if got := private(calls, calls, c.changed); !slices.Equal(got, c.want) {
				t.Errorf("private are %q, want %q", got, c.want)
			}
		})
	}
}

func TestRenameLeavesTheRestAlone(t *testing.T) {
	testkit.Need(t, "gcc")
	object := compiled(t, hiddenSource)
	out, err := renameFunctions(object, []string{"inner", "outer"})
	if err != nil {
		t.Fatal(err)
	}
	calls, err := readCalls(out)
	if err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{"first": "klatch_inner", "klatch_outer": "klatch_inner", "second": "klatch_outer"} {
		if calls.functions[from] == nil || !calls.functions[from].refers[to] {
			t.Errorf("%s does not call %s: %+v", from, to, calls.functions[from])
		}
	}
	was, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		t.Fatal(err)
	}
	is, err := elf.NewFile(bytes.NewReader(out))
	if err != nil {
		t.Fatal(err)
	}
	parts := 0
	for i, s := range was.Sections {
		if s.Name == ".text.unlikely.inner" {
			parts++
		}
		want := s.Name
		if strings.Contains(s.Name, ".text.") {
			want = strings.NewReplacer(".inner", ".klatch_inner", ".outer", ".klatch_outer").Replace(s.Name)
		}
		if got := is.Sections[i].Name; got != want {
			t.Errorf("section %s became %s", s.Name, got)
		}
		if s.Type == elf.SHT_NOBITS || s.Type == elf.SHT_NULL || s.Type == elf.SHT_STRTAB || s.Type == elf.SHT_SYMTAB {
			continue
		}
		a, err1 := s.Data()
		b, err2 := is.Sections[i].Data()
		if err1 != nil || err2 != nil || !bytes.Equal(a, b) {
			t.Errorf("section %s has other content", s.Name)
		}
	}
	symbols, err := is.Symbols()
	if err != nil || parts != 1 || !slices.ContainsFunc(symbols, func(s elf.Symbol) bool { return s.Name == "klatch_inner.cold" }) {
		t.Errorf("the part that was moved away: %d, %v", parts, err)
	}
	if again, err := renameFunctions(object, nil); err != nil || !bytes.Equal(again, object) {
		t.Errorf("no names: %v", err)
	}
}

// FuzzObjects: any bytes give an error or an answer, never a panic.
func FuzzObjects(f *testing.F) {
	if _, err := exec.LookPath("gcc"); err == nil {
		f.Add(compiled(f, hiddenSource))
	}
	f.Add(funcs(2, 0, 40, 48, 56, 96, 104))
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		_, _ = readCalls(b)
		_, _ = renameFunctions(b, []string{"inner", "outer"})
		_, _ = replacedFunctions(b)
		_, _ = readTable(b, ".kpatch.symbols", symbolEntry)
		if !bytes.Equal(before, b) {
			t.Error("reading changed the bytes")
		}
	})
}
