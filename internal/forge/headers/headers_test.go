// SPDX-License-Identifier: Apache-2.0

package headers

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// tree is a kernel in small: two units use h(), one through a macro, one only
// includes the header, one takes it through a trace header.
var tree = map[string]string{
	"include/linux/h.h": `/* a header */
#ifndef H_H
#define H_H
struct s { int a; int b; };
static inline int h(struct s *s)
{
	return s->a;
}
static inline int other(void) { return 1; }
#define VIA(x) (h(x) + 1)
static __printf(1, 2) int printer(const char *f, ...);
DEFINE_MUTEX(big_lock);
enum color { RED, GREEN };
#endif
`,
	"include/trace/events/t.h": "#include <linux/h.h>\nTRACE_EVENT(foo, TP_PROTO(struct s *s), TP_fast_assign(h(s)));\n",
	"net/direct.c":             "#include <linux/h.h>\nint f(struct s *s) { return h(s); }\n",
	"net/macro.c":              "#include <linux/h.h>\nint f(struct s *s) { return VIA(s); }\n",
	"net/unused.c":             "#include <linux/h.h>\nint f(void) { return other(); } /* h(x) */\n",
	"net/traced.c":             "#include <trace/events/t.h>\nint f(void) { return 0; }\n",
	"net/whole.c":              "#include \"part.c\"\n",
	"net/part.c":               "#include <linux/h.h>\nint p(struct s *s) { return h(s); }\n",
	"net/lock.c":               "#include <linux/h.h>\nint f(void) { return lock(&big_lock); }\n",
	"net/color.c":              "#include <linux/h.h>\nint f(void) { return GREEN; }\n",
	"net/apart.c":              "int f(void) { return 2; }\n",
}

func load(t *testing.T) *Graph {
	t.Helper()
	dir := t.TempDir()
	var units []string
	for name, text := range tree {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if filepath.Ext(name) == ".c" && name != "net/part.c" {
			units = append(units, name)
		}
	}
	g, err := Load(dir, filepath.Join(t.TempDir(), "graph.json"), units)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func TestAffected(t *testing.T) {
	g := load(t)
	everyone := []string{"net/color.c", "net/direct.c", "net/lock.c", "net/macro.c", "net/traced.c", "net/unused.c", "net/whole.c"}
	if got := g.Includers("include/linux/h.h"); !slices.Equal(got, everyone) {
		t.Fatalf("includers %v", got)
	}
	for _, c := range []struct {
		name string
		line int
		add  []string
		in   bool
		want []string
	}{
		{"body of an inline function", 7, []string{"	return s->b;"}, false, []string{"net/direct.c", "net/macro.c", "net/traced.c", "net/whole.c"}},
		{"another function", 9, []string{"static inline int other(void) { return 2; }"}, false, []string{"net/unused.c"}},
		{"member of a type", 4, []string{"struct s { int b; int a; };"}, false, []string{"net/direct.c", "net/macro.c", "net/traced.c", "net/whole.c"}},
		{"a condition", 2, []string{"#ifdef H_H"}, false, everyone},
		{"a new function before a macro", 10, []string{"static inline int brand_new(void) { return 3; }"}, true, nil},
		{"a macro becomes a function", 10, []string{"static inline int brand_new(void) { return 3; }"}, false, []string{"net/macro.c"}},
		{"a variable that a macro makes", 12, []string{"DEFINE_MUTEX(big_lock);"}, false, []string{"net/lock.c"}},
		{"an enumerator", 13, []string{"enum color { GREEN, RED };"}, false, []string{"net/color.c"}},
		{"an attribute is no name", 11, []string{"static __printf(2, 3) int printer(const char *f, ...);"}, false, nil},
		{"a comment", 1, []string{"/* another */"}, false, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, why, err := g.Affected([]Change{edit("include/linux/h.h", c.line, c.in, c.add)})
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("affected %v (%s), want %v", got, why, c.want)
			}
		})
	}
	got, _, err := g.Affected([]Change{edit("net/part.c", 2, false, []string{"int p(struct s *s) { return 0; }"})})
	if err != nil || !slices.Equal(got, []string{"net/whole.c"}) {
		t.Errorf("an included source file affects %v, %v", got, err)
	}
}

// edit replaces a line, or puts new ones before it.
func edit(file string, line int, before bool, add []string) Change {
	if before {
		return Change{file, nil, []Insertion{{line, add}}}
	}
	return Change{file, []int{line}, []Insertion{{line + 1, add}}}
}

func TestStoredGraphIsTheSame(t *testing.T) {
	g := load(t)
	file := filepath.Join(t.TempDir(), "graph.json")
	first, err := Load(g.tree, file, sorted(g.units))
	if err != nil {
		t.Fatal(err)
	}
	second, err := Load(g.tree, file, sorted(g.units))
	if err != nil {
		t.Fatal(err)
	}
	if a, b := first.Includers("include/linux/h.h"), second.Includers("include/linux/h.h"); len(a) == 0 || !slices.Equal(a, b) {
		t.Errorf("stored graph: %v, made %v", b, a)
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range tree {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		last := 0
		for _, it := range parse(text) {
			if it.first < last || it.last < it.first {
				t.Fatalf("item of lines %d to %d after line %d", it.first, it.last, last)
			}
			last = it.first
		}
	})
}
