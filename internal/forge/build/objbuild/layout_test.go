// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/forge/compose"
	"klatch/internal/forge/headers"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/queue"
)

// sources are a tree in small: what an object is compiled from decides whether
// it is looked at.
var sources = map[string]string{
	"h.h":     "#ifndef H\n#define H\n#define BOUND 4\nstruct s { int a; };\n#ifdef SPECIAL\nstruct special { int a; };\n#endif\nstatic inline int f(struct s *s)\n{\n\treturn s->a;\n}\n#endif\n",
	"rows.h":  "#ifndef R\n#define R\nstruct rows { int r[BOUND]; };\n#endif\n",
	"one.c":   "#include \"h.h\"\nint one(struct s *s) { return f(s); }\n",
	"two.c":   "#include \"h.h\"\n#include \"rows.h\"\nint two(struct s *s) { return f(s); }\n",
	"three.c": "#include \"h.h\"\n#include \"rows.h\"\nint three(struct s *s) { return f(s); }\n",
	"apart.c": "int apart;\n",
}

func TestObjectsThatAreLookedAt(t *testing.T) {
	for _, c := range []struct {
		name, file, old, text string
		first, rest           string
		adds                  string // source file to which a patch adds an #include
	}{
		{name: "a body", file: "h.h", old: "return s->a;", text: "return s->a + 1;"},
		{name: "a comment", file: "h.h", old: "struct s", text: "/* of one */ struct s"},
		{name: "a struct of a header: one object", file: "h.h", old: "s { int a;", text: "s { long a;", first: "one.c"},
		{name: "a struct under a condition of its own: all of them", file: "h.h", old: "special { int a", text: "special { long a", first: "one.c", rest: "two.c three.c"},
		{name: "a macro: an object with the type that it is in", file: "h.h", old: "BOUND 4", text: "BOUND 5", first: "two.c"},
		{name: "a macro of no type", file: "h.h", old: "#define BOUND 4", text: "#define BOUND 4\n#define UNUSED 5"},
		{name: "an include: all of them", file: "h.h", old: "#define BOUND 4", text: "#include \"more.h\"\n#define BOUND 4", first: "one.c", rest: "two.c three.c"},
		{name: "a struct, and a patch adds an include to another file", file: "h.h", old: "s { int a;", text: "s { long a;", adds: "apart.c", first: "one.c", rest: "apart.c two.c three.c"},
		{name: "a struct of a source file", file: "two.c", old: "int two", text: "struct own { int a; };\nint two", first: "two.c"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			j := &job{tree: kerneltree.Tree{Dir: filepath.Join(dir, "kernel")}, scratch: filepath.Join(dir, "build", "overlay"), adds: map[string]bool{c.adds: true},
				plan: compose.Plan{Patches: []queue.Patch{{Files: []string{c.file}}}}}
			changed := strings.Replace(sources[c.file], c.old, c.text, 1)
			if changed == sources[c.file] {
				t.Fatalf("%q is not in %s", c.old, c.file)
			}
			write(t, j.upper(c.file), changed)
			for f, text := range sources {
				write(t, filepath.Join(j.tree.Source(), f), text)
			}
			var objects []*object
			for _, o := range []struct{ source, deps string }{{"one.c", "one.c h.h"}, {"apart.c", "apart.c x.h y.h"}, {"two.c", "two.c h.h rows.h y.h"}, {"three.c", "three.c h.h rows.h x.h y.h"}} {
				objects = append(objects, &object{unit: kerneltree.Unit{Source: o.source}, deps: strings.Fields(o.deps)})
			}
			n, err := j.lookAt(objects)
			if err != nil {
				t.Fatal(err)
			}
			if first, rest := names(n.first), names(n.rest); first != c.first || rest != c.rest {
				t.Errorf("first %q, then %q; want %q, %q", first, rest, c.first, c.rest)
			}
		})
	}
}

func names(os []*object) string {
	var out []string
	for _, o := range os {
		out = append(out, o.unit.Source)
	}
	return strings.Join(out, " ")
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestCommandForTypes(t *testing.T) {
	o := &object{unit: kerneltree.Unit{Target: "net/unix/af_unix.o"},
		cmd: "gcc-12 -Wp,-MMD,net/unix/.af_unix.o.d -O2 -g -g0 -ffunction-sections -fdata-sections -c -o net/unix/af_unix.o net/unix/af_unix.c ; ./tools/objtool/objtool --orc net/unix/af_unix.o"}
	got, err := typesCommand(o, typesOnly)
	if want := "gcc-12 -Wp,-MMD,net/unix/.af_unix.o.d -O2 -g " + typesOnly + " -c -o net/unix/af_unix.o.types net/unix/af_unix.c"; err != nil || got != want {
		t.Errorf("command %q, %v, want %q", got, err, want)
	}
	for _, cmd := range []string{"gcc-12 -O2 -c -o net/unix/af_unix.o a.c", "as " + flagsForDiff + " -o other.o a.s", ""} {
		o.cmd = cmd
		if got, err := typesCommand(o, typesOnly); err == nil {
			t.Errorf("command %q from %q", got, cmd)
		}
	}
}

// The object of a type lives in op: what must be replaced for that to be safe.
func TestCallsThatAreReplacedAsAWhole(t *testing.T) {
	text := headers.Confined{Births: []string{"op"}, Users: map[string][]string{"op": {"caller"}}, Defined: map[string]bool{"op": true, "caller": true}}
	for _, c := range []struct {
		name     string
		was, is  map[string][]string
		users    map[string][]string
		replaced string
		want     string
	}{
		{name: "all of it", was: map[string][]string{"op": {"op"}, "caller": {"caller"}}, replaced: "op caller"},
		{name: "inlined", was: map[string][]string{"caller": {"caller"}}, replaced: "caller"},
		{name: "not the function", was: map[string][]string{"op": {"op"}, "caller": {"caller"}}, replaced: "caller", want: "op is not replaced"},
		{name: "not one that it may be inlined into", was: map[string][]string{"op": {"op"}, "caller": {"caller"}}, replaced: "op", want: "caller is not replaced"},
		{name: "a part that is not found on the stack", was: map[string][]string{"op": {"op", "op.cold"}, "caller": {"caller"}}, replaced: "op caller", want: "op.cold is not replaced"},
		{name: "a copy that is new", was: map[string][]string{"op": {"op"}, "caller": {"caller"}}, is: map[string][]string{"op": {"op", "op.part.0"}}, replaced: "op caller", want: "op.part.0 is new"},
		{name: "a function that a macro makes", was: map[string][]string{"op": {"op"}}, users: map[string][]string{"op": {headers.UnknownUser}}, replaced: "op", want: "a macro makes a function that calls it"},
		{name: "not there before", was: map[string][]string{"caller": {"caller"}}, users: map[string][]string{}, replaced: "caller", want: "op is not in the unpatched object"},
	} {
		t.Run(c.name, func(t *testing.T) {
			users := text.Users
			if c.users != nil {
				users = c.users
			}
			h := holder{users: users, was: c.was, is: c.is, replaced: map[string]bool{}, seen: map[string]bool{}}
			if h.is == nil {
				h.is = c.was
			}
			for f := range strings.FieldsSeq(c.replaced) {
				h.replaced[f] = true
			}
			if got := h.holds("op"); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

// TestTextsOfAFileThatNoPatchTouches: a type of a header may change the layout
// of one in a source file that stays as it is.
func TestTextsOfAFileThatNoPatchTouches(t *testing.T) {
	j := &job{tree: kerneltree.Tree{Dir: t.TempDir()}, scratch: t.TempDir()}
	for name, text := range map[string]string{filepath.Join(j.tree.Source(), "a.c"): "old", filepath.Join(j.tree.Source(), "b.c"): "old", j.upper("b.c"): "new"} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for file, want := range map[string]string{"a.c": "old", "b.c": "new"} {
		if was, is, err := j.bothTexts(file); err != nil || was != "old" || is != want {
			t.Errorf("%s: %q, %q, %v", file, was, is, err)
		}
	}
}
