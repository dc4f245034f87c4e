// SPDX-License-Identifier: Apache-2.0

package delta

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func compiled(t testing.TB, source string, flags ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.c"), []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("gcc", "-O2", "-c", "-fno-pic", "-fno-pie", "-mcmodel=kernel", "-mno-red-zone", "-fno-asynchronous-unwind-tables", "-ffunction-sections", "-fdata-sections", "-o", "a.o", "a.c")
	cmd.Args = append(cmd.Args, flags...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b, err := os.ReadFile(filepath.Join(dir, "a.o"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const base = `
struct ops { int (*open)(void); const char *name; };
extern int outside(const char *s, const int *p);
static __attribute__((noinline)) int one(void) { return outside("one", 0); }
static __attribute__((noinline)) int two(void) { return outside("two", 0); }
const struct ops table = { one, "table" };
static const int limits[4] = { 1, 2, 3, 4 };
int value = 3;
int zero;
int use(int i) { return outside("use", limits + i) + value + zero; }
int same(int i) { return outside("same", limits) + i; }
__attribute__((section(".init.text"))) int at_boot(void) { return outside("boot", 0); }
int (*also)(void) = two;
__attribute__((section(".sched.text"))) int shared(int i) { return outside("shared", 0) + i; }
__attribute__((section(".noinstr.text"))) int entry(int i) { return outside("entry", 0) + i; }
__attribute__((section("_kernel_table"), used)) static unsigned long entry_of_table = 7;
int counted(void) { static int n; static const char id[] = "counted"; return outside(id, &n) + n++; }
`

func replace(t *testing.T, pairs ...string) string {
	t.Helper()
	s := base
	for i := 0; i < len(pairs); i += 2 {
		n := 0
		for j := 0; j+len(pairs[i]) <= len(s); j++ {
			if s[j:j+len(pairs[i])] == pairs[i] {
				s = s[:j] + pairs[i+1] + s[j+len(pairs[i]):]
				n++
				break
			}
		}
		if n != 1 {
			t.Fatalf("%q is not in the source", pairs[i])
		}
	}
	return s
}

func TestCompare(t *testing.T) {
	for _, c := range []struct {
		name, from, to string
		functions      []string
		stopping       []string
	}{
		{"nothing", "int zero;", "int zero; /* none */", nil, nil},
		{"a function", `outside("use", limits + i)`, `outside("use", limits + i + 1)`, []string{"use"}, nil},
		{"a string of a function", `"same"`, `"Same"`, []string{"same"}, nil},
		{"a call", `return outside("two", 0);`, `return outside("two", 0) + one();`, []string{"two"}, nil},
		{"initial value", "int value = 3;", "int value = 4;", nil, []string{"data_changed value"}},
		{"table of functions", "table = { one,", "table = { two,", nil, []string{"ops_table_changed table"}},
		{"name in a table", `"table"`, `"Table"`, nil, []string{"data_changed table"}},
		{"shared constant", "{ 1, 2, 3, 4 }", "{ 1, 2, 3, 5 }", nil, []string{"data_changed limits"}},
		{"boot", `outside("boot", 0)`, `outside("boot!", 0)`, nil, []string{"init_code at_boot"}},
		{"boot code that is gone", `__attribute__((section(".init.text"))) int at_boot(void) { return outside("boot", 0); }`, "", nil, []string{"init_code at_boot"}},
		{"a section of many functions", `outside("shared", 0)`, `outside("shared!", 0)`, nil, []string{"not_patchable shared"}},
		{"a section without tracing", `outside("entry", 0)`, `outside("entry!", 0)`, nil, []string{"not_traceable entry"}},
		{"a new entry in a table", "int zero;", "int zero; __attribute__((section(\"_kernel_table\"), used)) static unsigned long second = 7;", nil, []string{"section_changed second"}},
		{"an entry that is gone", `__attribute__((section("_kernel_table"), used)) static unsigned long entry_of_table = 7;`, "", nil, []string{"section_changed entry_of_table"}},
		{"another static of the same name, before", "int zero;", `int zero; int before(void) { static int n; static const char id[] = "before"; return outside(id, &n) + n++; }`, nil, nil},
		{"pointer to code", "also)(void) = two", "also)(void) = one", nil, []string{"data_changed also"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := Compare(compiled(t, base), compiled(t, replace(t, c.from, c.to)))
			if err != nil {
				t.Fatal(err)
			}
			var stopping []string
			for _, s := range d.Stopping {
				stopping = append(stopping, fmt.Sprintf("%s %s", s.Kind, s.Name))
			}
			if !slices.Equal(d.Functions, c.functions) || !slices.Equal(stopping, c.stopping) {
				t.Errorf("functions %q, stopping %q; want %q, %q", d.Functions, stopping, c.functions, c.stopping)
			}
		})
	}
}

func TestConstantOfChangedFunctionsOnly(t *testing.T) {
	d, err := Compare(compiled(t, base), compiled(t, replace(t, "{ 1, 2, 3, 4 }", "{ 1, 2, 3, 5 }",
		`outside("use", limits + i)`, `outside("use!", limits + i)`, `"same"`, `"same!"`)))
	if err != nil {
		t.Fatal(err)
	}
	if len(d.Stopping) != 0 || !slices.Equal(d.Functions, []string{"same", "use"}) {
		t.Errorf("delta %+v: all users of the constant change, so it may", d)
	}
}

// Each function with a __func__ has one of its own: that of a changed function
// is not used by those that stay.
func TestConstantsOfOneName(t *testing.T) {
	const names = `
extern int outside(const char *s, const int *p);
int first(void) { return outside(__func__, 0); }
int second(void) { return outside(__func__, 0); }
int third(void) { static const char msg[] = "a message"; return outside(msg, 0); }
`
	for _, c := range []struct{ name, old, now, stops string }{
		{"one more", "int second(void) {", "static __attribute__((noinline)) int more(void) { return outside(__func__, 0) + 1; }\nint second(void) { more();", ""},
		{"another text", "a message", "no message", "msg"}, // the code of third stays as it is
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := Compare(compiled(t, names), compiled(t, strings.Replace(names, c.old, c.now, 1)))
			if err != nil {
				t.Fatal(err)
			}
			var stops []string
			for _, x := range d.Stopping {
				stops = append(stops, x.Name)
			}
			if strings.Join(stops, " ") != c.stops {
				t.Errorf("stopping %+v, want %q", d.Stopping, c.stops)
			}
		})
	}
}

func TestNewSymbolsAndFrames(t *testing.T) {
	d, err := Compare(compiled(t, base), compiled(t, replace(t, "int same(int i) {",
		"extern void fill(char *);\n__attribute__((noinline)) int fresh(int i) { return outside(\"x\", &i); }\nint same(int i) { char big[600]; fill(big); i += fresh(big[i]);")))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(d.New, []string{"fresh"}) || !slices.Contains(d.Undefined, "fill") || !slices.Contains(d.Defined, "fresh") {
		t.Errorf("delta %+v", d)
	}
	if len(d.Frames) != 1 || d.Frames[0].Function != "same" || d.Frames[0].New < 600 {
		t.Errorf("frames %+v", d.Frames)
	}
}

// A pointer to a function that only the livepatch has outlives it where
// somebody keeps it; a call does not.
func TestPointersToNewFunctions(t *testing.T) {
	for _, c := range []struct {
		name, use string
		want      []Pointer
	}{
		{"called", "i += fresh(i);", nil},
		{"handed out", "extern void keep(int (*)(int)); keep(fresh);", []Pointer{{"same", "fresh"}}},
		{"one that the kernel has", "extern void keep(int (*)(int)); keep(use);", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := Compare(compiled(t, base), compiled(t, replace(t, "int same(int i) {",
				"__attribute__((noinline)) int fresh(int i) { return outside(\"x\", &i); }\nint same(int i) { "+c.use)))
			if err != nil || !slices.Equal(d.Pointers, c.want) {
				t.Errorf("pointers %+v, %v, want %+v", d.Pointers, err, c.want)
			}
		})
	}
}

func TestSecondCopyOfAVariable(t *testing.T) {
	old := compiled(t, base)
	out, err := Copies(old, old, compiled(t, "int value = 3; int also_new; int *p = &value;"))
	if err != nil || len(out) != 1 || out[0].Name != "value" || out[0].Kind != Data {
		t.Errorf("copies %+v, %v", out, err)
	}
	twice := compiled(t, replace(t, "int zero;", "int zero; int more(void) { static int n; return outside(\"m\", &n) + n++; }"))
	if out, err = Copies(old, twice, compiled(t, "int outside(int *); int more(void) { static int n; return outside(&n) + n++; }")); err != nil || len(out) != 0 {
		t.Errorf("a new static of a known name: %+v, %v", out, err)
	}
}

func TestDescribe(t *testing.T) {
	fs, err := Describe(compiled(t, base), "one")
	if err != nil || len(fs) != 1 || fs[0].Symbol != "one" || fs[0].Bytes == 0 || !slices.Contains(fs[0].Refers, "outside") {
		t.Errorf("function %+v, %v", fs, err)
	}
	if s := Source("f.part.0.isra.0"); s != "f" {
		t.Errorf("source name %q", s)
	}
}

// Kernels since 6.2 leave no-ops before each function, and list the places.
func TestNewFunctionWithPadding(t *testing.T) {
	const flag = "-fpatchable-function-entry=16,16"
	d, err := Compare(compiled(t, base, flag), compiled(t, base+"int fresh(void) { return 1; }", flag))
	if err != nil || len(d.Stopping) != 0 || !slices.Equal(d.New, []string{"fresh"}) {
		t.Errorf("%v, delta %+v", err, d)
	}
}

func FuzzCompare(f *testing.F) {
	seed := compiled(f, base)
	f.Add(seed, seed)
	f.Fuzz(func(_ *testing.T, a, b []byte) {
		_, _ = Compare(a, b) // any bytes: an error or a result, never a panic
	})
}

func BenchmarkCompare(b *testing.B) {
	x, y := compiled(b, base), compiled(b, base+"int more(void) { return 1; }")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Compare(x, y); err != nil {
			b.Fatal(err)
		}
	}
}
