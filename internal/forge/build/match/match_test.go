// SPDX-License-Identifier: Apache-2.0

package match

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/testkit"
)

const source = `
int other(int); int third(int);
int table[4];
__attribute__((noinline)) static int helper(int x) { return other(x) * 3; }
int entry(int x) { if (x > 7) return helper(x) + table[1]; return third(x); }
`

const rest = "int other(int x) { return x + 1; } int third(int x) { return x + 2; }\n"

// compile makes an object from source text under a file name.
func compile(t *testing.T, dir, name, text string) string {
	t.Helper()
	c := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(c), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	o := strings.TrimSuffix(c, ".c") + ".o"
	run(t, "gcc", "-O2", "-g0", "-fno-pic", "-mcmodel=kernel", "-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-c", "-o", o, c)
	return o
}

func run(t *testing.T, argv ...string) {
	t.Helper()
	if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %s: %v", argv[0], out, err)
	}
}

// kernel links objects at a kernel's address.
func kernel(t *testing.T, dir string, objects ...string) *Image {
	t.Helper()
	vmlinux := filepath.Join(dir, "vmlinux")
	run(t, append([]string{"ld", "-Ttext=0xffffffff81000000", "-Tdata=0xffffffff82000000", "-Tbss=0xffffffff83000000", "-e", "0", "-o", vmlinux}, objects...)...)
	k, err := Open(vmlinux)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestEachDifferenceIsSeen: an object from another source than the kernel's is
// not proved, however small the difference is.
func TestEachDifferenceIsSeen(t *testing.T) {
	testkit.Need(t, "gcc")
	dir := t.TempDir()
	k := kernel(t, dir, compile(t, dir, "net/a.c", source), compile(t, dir, "rest.c", rest))
	if !k.HasFile("net/a.c") || k.HasFile("net/b.c") {
		t.Error("the kernel's files")
	}
	for _, c := range []struct{ name, from, to, why string }{
		{"nothing", "", "", ""},
		{"a constant", "x > 7", "x > 8", "differs at"},
		{"another function called", "return third(x)", "return other(x)", "does not refer to other"},
		{"another variable of the kernel", "table[1]", "table[2]", "does not refer to table"},
		{"a function that the kernel does not have", "return third(x)", "extern int fourth(int); return fourth(x)", "fourth, which the kernel does not have"},
		{"more code", "return third(x)", "return third(x * x + 5) + third(x)", "bytes, the kernel's has"},
		{"less code", "return helper(x) + table[1]", "return 0", "bytes, the kernel's has"},
		{"another name", "int entry", "int entrance", "no such function"},
		{"a relocation of a strange type", "return third(x)", `asm volatile(".reloc ., R_X86_64_GOT32, third; nop;nop;nop;nop;nop"); return 0`, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := compile(t, t.TempDir(), "net/a.c", strings.Replace(source, c.from, c.to, 1))
			r := Empty()
			if err := k.Object(o, "net/a.c", []string{"entry"}, &r); err != nil {
				t.Fatal(err)
			}
			if c.name == "nothing" {
				if len(r.Different) != 0 || r.Identical != 2 || len(r.Replaced) != 1 || r.Replaced[0].Relocations < 2 {
					t.Errorf("report %+v", r)
				}
				return
			}
			i := slices.IndexFunc(r.Different, func(d Difference) bool { return d.Replaced && d.Function == "entry" })
			if i < 0 || len(r.Replaced) != 0 {
				t.Fatalf("accepted: %+v", r)
			}
			if !strings.Contains(r.Different[i].Why, c.why) {
				t.Errorf("why %q, want %q", r.Different[i].Why, c.why)
			}
		})
	}
}

// A static function's name may be there several times: only those of files of
// this name count, and two of them with the same code prove nothing.
func TestStaticFunctionsOfOneName(t *testing.T) {
	testkit.Need(t, "gcc")
	dir := t.TempDir()
	static := func(n string) string {
		return "__attribute__((noinline,used)) static int same(int x) { return x * " + n + "; }\n"
	}
	a := compile(t, dir, "one/core.c", static("5"))
	for name, c := range map[string]struct {
		others []string
		proved bool
	}{
		"alone":                           {nil, true},
		"another one in another file":     {[]string{compile(t, dir, "two/b.c", static("5"))}, true},
		"another in a file of this name":  {[]string{compile(t, dir, "two/core.c", static("6"))}, true},
		"the same in a file of this name": {[]string{compile(t, dir, "three/core.c", static("5"))}, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := Empty()
			if err := kernel(t, t.TempDir(), append([]string{a}, c.others...)...).Object(a, "one/core.c", []string{"same"}, &r); err != nil {
				t.Fatal(err)
			}
			if proved := len(r.Replaced) == 1; proved != c.proved {
				t.Errorf("proved %v: %+v", proved, r)
			}
		})
	}
	r := Empty()
	if err := kernel(t, t.TempDir(), compile(t, dir, "two/b.c", static("5"))).Object(a, "one/core.c", []string{"same"}, &r); err != nil || len(r.Replaced) != 0 {
		t.Errorf("a function of another file was taken: %+v, %v", r, err)
	}
}

func TestChangedListsCodeAndReferences(t *testing.T) {
	testkit.Need(t, "gcc")
	before := compile(t, t.TempDir(), "a.c", source)
	for _, c := range []struct {
		from, to string
		want     []string
	}{
		{"x > 7", "x > 8", []string{"entry"}},
		{"return third(x)", "return other(x)", []string{"entry"}},
		{"* 3", "* 9", []string{"helper"}},
	} {
		got, err := Changed(before, compile(t, t.TempDir(), "a.c", strings.Replace(source, c.from, c.to, 1)))
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s to %s: %v, %v", c.from, c.to, got, err)
		}
	}
}
