// SPDX-License-Identifier: Apache-2.0

package source

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/forge/queue"
	"klatch/internal/testkit"
)

// declarations have the kernel's names, with members in another order than any
// kernel has: what is read must come from the debug information.
const declarations = `
typedef _Bool bool;
struct klp_object;
struct klp_func { unsigned long old_sympos; const char *old_name; int kept; void *new_func; };
struct klp_callbacks { int (*pre_patch)(struct klp_object *); void (*post_patch)(struct klp_object *);
	void (*pre_unpatch)(struct klp_object *); void (*post_unpatch)(struct klp_object *); bool on; };
struct klp_object { struct klp_callbacks callbacks; const char *name; struct klp_func *funcs; };
struct klp_patch { bool replace; void *mod; struct klp_object *objs; };
extern int klp_enable_patch(struct klp_patch *);
extern int elsewhere(int);
static int new_one(int a, const char *b) { return elsewhere(a) + b[0]; }
static int new_two(int a) { return elsewhere(a); }
static int ready(struct klp_object *o) { return o->name != 0; }
static struct klp_func core[] = { { .old_name = "one", .new_func = new_one }, { .old_name = "two", .new_func = new_two, .old_sympos = 5 }, { } };
static struct klp_func mod[] = { { .old_name = "three", .new_func = new_two }, { } };
static struct klp_object objs[] = { { .funcs = core, .callbacks = { .pre_patch = ready } }, { .name = "loop", .funcs = mod }, { } };
static struct klp_patch patch = { .objs = objs, .replace = 1 };
`

const frame = `
__attribute__((section(".init.text"))) int init_module(void) { return klp_enable_patch(&patch); }
__attribute__((section(".exit.text"))) void cleanup_module(void) { }
`

func compile(t testing.TB, text string) []byte {
	t.Helper()
	testkit.Need(t, "gcc")
	dir := t.TempDir()
	c, o := filepath.Join(dir, "m.c"), filepath.Join(dir, "m.o")
	if err := os.WriteFile(c, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("gcc", "-O2", "-g", "-gdwarf-4", "-fno-pic", "-mcmodel=kernel", "-fcf-protection=none",
		"-fno-asynchronous-unwind-tables", "-fno-strict-aliasing", "-c", "-o", o, c).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b, err := os.ReadFile(o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func look(b []byte) (tables, error) {
	f, err := openModule(b)
	if err != nil {
		return tables{}, err
	}
	t, err := f.readTables()
	if err != nil {
		return t, err
	}
	return t, f.checkShape(t)
}

func TestTablesAreReadByTheirDebugInformation(t *testing.T) {
	got, err := look(compile(t, declarations+frame))
	if err != nil {
		t.Fatal(err)
	}
	want := []entry{{"vmlinux", "one", 0, "new_one"}, {"vmlinux", "two", 5, "new_two"}, {"loop", "three", 0, "new_two"}}
	if !slices.Equal(got.Functions, want) || !got.Replace {
		t.Errorf("functions %+v, replace %v", got.Functions, got.Replace)
	}
	if len(got.Callbacks) != 1 || got.Callbacks[0].Object != "vmlinux" || !slices.Equal(got.Callbacks[0].When, []string{"pre_patch"}) {
		t.Errorf("callbacks %+v", got.Callbacks)
	}
	got, err = look(compile(t, strings.Replace(declarations, ".replace = 1", ".replace = 0", 1)+frame))
	if err != nil || got.Replace {
		t.Errorf("replace %v, %v", got.Replace, err)
	}
}

// TestShapes: whatever could tell the kernel something else than the tables is
// not accepted, and what is beside it is.
func TestShapes(t *testing.T) {
	plain := declarations + frame
	in := func(code string) string {
		return declarations + strings.Replace(frame, "{ return klp", "{ "+code+" return klp", 1)
	}
	for _, c := range []struct{ name, text, why string }{
		{"plain", plain, ""},
		{"own data beside the tables", plain + "static long n[9] = { 1 }; long count(void) { return n[3]++; }", ""},
		{"code without a section of its own", declarations + strings.NewReplacer(`__attribute__((section(".init.text")))`, "", `__attribute__((section(".exit.text")))`, "").Replace(frame), ""},
		{"a second livepatch", plain + "struct klp_patch second = { .replace = 1 };", "2 variables of type struct klp_patch"},
		{"an array of livepatches", plain + "struct klp_patch many[2] = { { .replace = 1 } };", "2 variables of type struct klp_patch"},
		{"none", "int init_module(void) { return 0; } void cleanup_module(void) { }", "0 variables of type struct klp_patch"},
		{"init does more", in("elsewhere(1);"), "init refers to elsewhere"},
		{"init changes the livepatch", in("patch.replace = 0;"), "patch"},
		{"init changes a function", in("core[1].old_sympos = 6;"), "core"},
		{"init enables nothing", declarations + "int init_module(void) { return 0; } void cleanup_module(void) { } void *use[] = { &patch };", "refers"},
		{"exit does something", declarations + strings.Replace(frame, "cleanup_module(void) { }", "cleanup_module(void) { elsewhere(1); }", 1), "exit refers to elsewhere"},
		{"no exit", declarations + strings.Replace(frame, "cleanup_module", "other", 1), "no cleanup_module"},
		{"a function changes the tables by a store", plain + "void later(void) { core[0].old_name = \"x\"; }", "code refers"},
		{"a function changes the last byte", plain + "void later(void) { ((char *)core)[sizeof(core) - 1] = 1; }", "code refers"},
		{"a function takes the tables", plain + "void *later(void) { return objs; }", "code refers"},
		{"another function enables it", plain + "int later(void) { return klp_enable_patch(0); }", "besides init"},
		{"data points into the tables", plain + "void *way = &objs[1].name;", "other data refers"},
		{"code before init", plain + "__attribute__((constructor)) void early(void) { elsewhere(3); }", ".init_array"},
		{"an exported symbol", plain + "__attribute__((section(\"__ksymtab_strings\"))) char more[] = \"x\";", "__ksymtab"},
		{"a name that is a number", strings.Replace(plain, `.old_name = "one"`, ".old_name = (char *)16", 1), "number in place of a pointer"},
		{"a new function that is data", strings.Replace(plain, ".new_func = new_one", `.new_func = (void *)"text"`, 1), "no name or no new function"},
		{"no new function", strings.Replace(plain, ", .new_func = new_one", "", 1), "no name or no new function"},
		{"a new function outside", strings.Replace(plain, ".new_func = new_one", ".new_func = elsewhere", 1), "not in the module"},
		{"the kernel by name", strings.Replace(plain, `.name = "loop"`, `.name = "vmlinux"`, 1), "called vmlinux"},
		{"no end of functions", strings.Replace(plain, ".old_sympos = 5 }, { } }", ".old_sympos = 5 } }", 1), " "}, // in whatever words: it depends on what follows
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := look(compile(t, c.text))
			if c.why == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if shape, ok := errors.AsType[shapeError](err); !ok || !strings.Contains(shape.why, c.why) {
				t.Errorf("got %v, want %q", err, c.why)
			}
		})
	}
}

func TestPrototypesAndInlinedCopies(t *testing.T) {
	f, err := openModule(compile(t, `
typedef unsigned int u32; typedef u32 gfp_t; struct s { int a; }; enum e { X };
extern int elsewhere(int);
static int both(int a) { return elsewhere(a) * 3; }
int caller(int a) { return both(a) + 1; }
int (*keep)(int) = both;
int fixed(struct s *p, const char *q, gfp_t g, enum e e, int (*cb)(void *, u32), ...) { return elsewhere(p->a); }
int fixed2(struct s *p, const char *q, unsigned int g, enum e e, int (*cb)(void *, u32), ...) { return elsewhere(p->a); }
int other(struct s *p, char *q, gfp_t g, enum e e, int (*cb)(void *, u32), ...) { return elsewhere(p->a); }
int less(struct s *p, const char *q, gfp_t g, enum e e, int (*cb)(void *, u32)) { return elsewhere(p->a); }
void nothing(void) { elsewhere(1); }
`))
	if err != nil {
		t.Fatal(err)
	}
	got, err := readFunctions(f.info, []string{"both", "fixed", "fixed2", "other", "less", "nothing"})
	if err != nil {
		t.Fatal(err)
	}
	one := func(name string) string {
		if len(got.prototypes[name]) != 1 {
			t.Errorf("prototypes of %s: %q", name, got.prototypes[name])
		}
		return strings.Join(got.prototypes[name], "")
	}
	if one("fixed") != one("fixed2") || one("fixed") == one("other") || one("fixed") == one("less") {
		t.Errorf("prototypes %q", got.prototypes)
	}
	if one("nothing") != "void ()" || one("both") != "int (int)" {
		t.Errorf("prototypes %q", got.prototypes)
	}
	if !got.inlined["both"] || got.inlined["fixed"] {
		t.Errorf("inlined %v", got.inlined)
	}
}

func TestUndeclaredSaysEachDifference(t *testing.T) {
	h := &queue.Handwritten{
		Functions: []queue.Replaced{{Object: "vmlinux", Name: "a"}, {Object: "vmlinux", Name: "b", Position: 2}},
		Callbacks: []queue.Callback{{Object: "vmlinux", When: []string{"pre_patch"}}},
		Shadows:   []queue.Shadow{{ID: 1, About: "x"}},
	}
	good := tables{Functions: []entry{{"vmlinux", "a", 0, "x"}, {"vmlinux", "b", 2, "y"}}, Callbacks: h.Callbacks}
	if got := undeclared(h, good, []string{"klp_shadow_get"}); len(got) != 0 {
		t.Errorf("good: %+v", got)
	}
	for _, c := range []struct {
		name string
		t    tables
		uses []string
		want int
	}{
		{"no shadow variable", good, nil, 1},
		{"another position", tables{Functions: []entry{{"vmlinux", "a", 1, "x"}, {"vmlinux", "b", 2, "y"}}, Callbacks: h.Callbacks}, []string{"klp_shadow_free"}, 1},
		{"another object", tables{Functions: []entry{{"ext4", "a", 0, "x"}, {"vmlinux", "b", 2, "y"}}, Callbacks: h.Callbacks}, []string{"klp_shadow_get"}, 2},
		{"twice", tables{Functions: append(slices.Clone(good.Functions), good.Functions[0]), Callbacks: h.Callbacks}, []string{"klp_shadow_get"}, 1},
		{"other callbacks", tables{Functions: good.Functions, Callbacks: []queue.Callback{{Object: "vmlinux", When: []string{"post_patch"}}}}, []string{"klp_shadow_get"}, 2},
	} {
		if got := undeclared(h, c.t, c.uses); len(got) != c.want {
			t.Errorf("%s: %+v, want %d", c.name, got, c.want)
		}
	}
}

// FuzzModule: any bytes give tables or an error.
func FuzzModule(f *testing.F) {
	good := compile(f, declarations+frame)
	f.Add(good)
	for i := range 8 {
		b := slices.Clone(good)
		b[len(b)*(i+1)/9] ^= 0xff
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := openModule(b)
		if err != nil {
			return
		}
		if got, err := m.readTables(); err == nil {
			_ = m.checkShape(got)
			for _, e := range got.Functions {
				if e.New == "" {
					t.Errorf("a function without code: %s", fmt.Sprint(e))
				}
			}
			_, _ = readFunctions(m.info, []string{"new_one"})
		}
	})
}
