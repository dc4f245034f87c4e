// SPDX-License-Identifier: Apache-2.0

package match

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

// The symbols that objtool makes for the no-ops before a function are not
// compared: a linked kernel has them under no file's name.
func TestPaddingIsNoFunction(t *testing.T) {
	testkit.Need(t, "gcc")
	dir := t.TempDir()
	k := kernel(t, dir, compile(t, dir, "net/a.c", source), compile(t, dir, "rest.c", rest))
	padded := source + `asm(".text; .type __pfx_entry,@function; __pfx_entry: nop; nop; .size __pfx_entry, 2");`
	r := Empty()
	if err := k.Object(compile(t, t.TempDir(), "net/a.c", padded), "net/a.c", []string{"entry"}, &r); err != nil {
		t.Fatal(err)
	}
	if r.Checked != 2 || r.Identical != 2 {
		t.Errorf("report %+v", r)
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

// module links objects as a module, without FILE symbols, as distributions
// strip them.
func module(t *testing.T, dir string, objects ...string) *Image {
	t.Helper()
	ko := filepath.Join(dir, "m.ko")
	run(t, append([]string{"ld", "-r", "-o", ko}, objects...)...)
	run(t, "strip", "--strip-debug", ko)
	k, err := OpenModule(ko, "m")
	if err != nil {
		t.Fatal(err)
	}
	return k
}

const moduleSource = `
extern int outside(const char *, void *);
static int state[4];
__attribute__((noinline)) static int helper(int x) { return outside("help", state + x) * 3; }
int entry(int x) { if (x > 7) return helper(x) + state[1]; return outside("entry", 0); }
`

// splitObject compiles as for the differ, so that what the module's assembler
// resolved is a relocation here.
func splitObject(t *testing.T, dir, name, text string) string {
	t.Helper()
	c := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(c), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	o := strings.TrimSuffix(c, ".c") + ".split.o"
	run(t, "gcc", "-O2", "-g0", "-fno-pic", "-mcmodel=kernel", "-fcf-protection=none", "-fno-asynchronous-unwind-tables",
		"-ffunction-sections", "-fdata-sections", "-c", "-o", o, c)
	return o
}

func TestEachDifferenceInAModuleIsSeen(t *testing.T) {
	testkit.Need(t, "gcc")
	dir := t.TempDir()
	m := module(t, dir, compile(t, dir, "z.c", "static int state[9]; int z(void) { return state[2]++; }\n"), compile(t, dir, "net/a.c", moduleSource))
	for _, c := range []struct{ name, from, to, why string }{
		{"nothing", "", "", ""},
		{"a constant", "x > 7", "x > 8", "differs at"},
		{"a string", `"entry"`, `"Entry"`, "string"},
		{"another variable", "+ state[1]", "+ state[2]", "does not refer to state"},
		{"a function outside", `outside("entry", 0)`, `outsidf("entry", 0)`, "does not refer to outsidf"},
		{"no call of the helper", "helper(x) +", "outside(0, 0) +", "bytes, the kernel's has"},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := strings.Replace(moduleSource, c.from, c.to, 1)
			text = strings.Replace(text, "extern int outside", "extern int outsidf(const char *, void *); extern int outside", 1)
			r := Empty()
			if err := m.Object(splitObject(t, t.TempDir(), "net/a.c", text), "net/a.c", []string{"entry"}, &r); err != nil {
				t.Fatal(err)
			}
			if c.name == "nothing" {
				if len(r.Different) != 0 || len(r.Replaced) != 1 || r.Replaced[0].Object != "m" || r.Replaced[0].Strings != 1 || r.Replaced[0].Relocations < 3 {
					t.Errorf("report %+v", r)
				}
				return
			}
			i := slices.IndexFunc(r.Different, func(d Difference) bool { return d.Replaced && d.Function == "entry" })
			if i < 0 || len(r.Replaced) != 0 || !strings.Contains(r.Different[i].Why, c.why) {
				t.Errorf("report %+v, want %q", r, c.why)
			}
		})
	}
}

// TestAnyOtherByteIsSeen turns each byte of a function in the image over.
func TestAnyOtherByteIsSeen(t *testing.T) {
	testkit.Need(t, "gcc")
	dir := t.TempDir()
	o := compile(t, dir, "net/a.c", source)
	k := kernel(t, dir, o, compile(t, dir, "rest.c", rest))
	s := k.byName["entry"][0]
	code := k.bytes(s.addr, s.size)
	for i := range code {
		code[i] ^= 0x10
		r := Empty()
		if err := k.Object(o, "net/a.c", []string{"entry"}, &r); err != nil {
			t.Fatal(err)
		}
		if len(r.Replaced) != 0 {
			t.Errorf("byte %d of %d may be another", i, len(code))
		}
		code[i] ^= 0x10
	}
}

func TestPositionCountsAsTheKernelDoes(t *testing.T) {
	symbols := map[string][]symbol{"f": {{addr: 300}, {addr: 100}, {addr: 200}}, "g": {{addr: 5}, {addr: 7, once: true}}, "h": {{addr: 5, once: true}},
		"twins": {{addr: 5}, {addr: 5}}}
	for _, c := range []struct {
		what   string
		module bool
		name   string
		addr   uint64
		pos    int
		of     int
		sure   bool
	}{
		{"the kernel's first by address is second in the table", false, "f", 100, 1, 3, true},
		{"the kernel's second", false, "f", 200, 2, 3, true},
		{"the kernel's last is first in the table", false, "f", 300, 3, 3, true},
		{"no symbol there", false, "f", 400, 0, 3, false},
		{"a module keeps its order", true, "f", 300, 1, 3, true},
		{"and its last", true, "f", 200, 3, 3, true},
		{"a symbol of the same name goes after the start", true, "g", 5, 1, 2, false},
		{"the only one goes after the start", true, "h", 5, 1, 1, true},
		{"two symbols at one address", false, "twins", 5, 1, 2, false},
		{"no such symbol", false, "none", 5, 0, 0, false},
	} {
		k := &Image{byName: symbols, module: c.module}
		pos, of := k.Position(c.name, c.addr)
		if sure := k.Certain(c.name, c.addr); pos != c.pos || of != c.of || sure != c.sure {
			t.Errorf("%s: %d of %d, %v; want %d of %d, %v", c.what, pos, of, sure, c.pos, c.of, c.sure)
		}
		if n := k.Count(c.name); n != c.of {
			t.Errorf("%s: count %d", c.what, n)
		}
	}
}

func FuzzObject(f *testing.F) {
	dir := f.TempDir()
	c := filepath.Join(dir, "a.c")
	if err := os.WriteFile(c, []byte(source), 0o644); err != nil {
		f.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-O2", "-c", "-ffunction-sections", "-o", filepath.Join(dir, "a.o"), c).CombinedOutput(); err != nil {
		f.Skipf("%v: %s", err, out)
	}
	seed, err := os.ReadFile(filepath.Join(dir, "a.o"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(_ *testing.T, b []byte) {
		e, err := elf.NewFile(bytes.NewReader(b))
		if err != nil {
			return
		}
		_, _ = readFunctions(e) // any bytes: an error or functions, never a panic
	})
}
