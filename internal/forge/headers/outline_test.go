// SPDX-License-Identifier: Apache-2.0

package headers

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

const outlineText = `/* a header */
#ifndef H_H
#define H_H
#include <linux/types.h>
#define BOUND 4
struct forward;
struct s {
	int a; /* first */
	int b[BOUND];
};
typedef u32 word;
enum color { RED, GREEN };
static inline int get(struct s *s)
{
	return s->a;
}
extern int put(struct s *s, word w);
static const char *names[] = { "a", "b" };
DECLARE_THING(thing);
EXPORT_SYMBOL(put);
#ifdef SPECIAL
struct special { int x; };
#endif
#ifdef CONFIG_SMP
struct smp { int x; };
#endif
#endif
`

func TestCompareOutlines(t *testing.T) {
	for _, c := range []struct {
		name, old, text string
		types           []string // with ! where units may read them differently
		names           []string
		whole           bool
	}{
		{name: "nothing"},
		{name: "a comment", old: "/* first */", text: "/* the first one */"},
		{name: "white space", old: "\tint a;", text: "    int\ta ;"},
		{name: "a body", old: "return s->a;", text: "return s->b[0];"},
		{name: "a prototype", old: "put(struct s *s, word w)", text: "put(struct s *sock, word w)"},
		{name: "a new prototype and a new function", old: "extern int put", text: "int more(struct s *s);\nstatic int less(struct s *s) { return 1; }\nextern int put"},
		{name: "an announcement", old: "struct forward;", text: "struct forward;\nstruct another;"},
		{name: "declarations in another order", old: "struct forward;\nstruct s {\n\tint a; /* first */\n\tint b[BOUND];\n};\ntypedef u32 word;", text: "typedef u32 word;\nstruct s {\n\tint a;\n\tint b[BOUND];\n};\nstruct forward;"},
		{name: "what is registered", old: "EXPORT_SYMBOL(put)", text: "EXPORT_SYMBOL_GPL(put)"},
		{name: "a member", old: "int a;", text: "long a;", types: []string{"s", "s"}},
		{name: "a new type", old: "struct forward;", text: "struct forward { int a; };", types: []string{"forward"}},
		{name: "a type in a body", old: "return s->a;", text: "struct local { int x; } l; return s->a;", types: []string{"local"}},
		{name: "a macro", old: "BOUND 4", text: "BOUND 5", names: []string{"BOUND"}},
		{name: "a macro in a body", old: "return s->a;", text: "\n#define BOUND2 3\nreturn s->a;", names: []string{"BOUND2"}},
		{name: "a typedef", old: "typedef u32", text: "typedef u64", names: []string{"word"}},
		{name: "an enumeration", old: "RED, GREEN", text: "RED, BLUE, GREEN", types: []string{"color", "color"}, names: []string{"BLUE", "GREEN", "RED"}},
		{name: "a variable", old: `"a", "b"`, text: `"a", "b", "c"`, names: []string{"names"}},
		{name: "a macro that may make a type", old: "DECLARE_THING(thing)", text: "DECLARE_THING(things)", whole: true},
		{name: "an include", old: "<linux/types.h>", text: "<linux/type.h>", whole: true},
		{name: "a type under a condition of its own", old: "special { int x", text: "special { long x", types: []string{"special!", "special!"}},
		{name: "a type under a condition of the configuration", old: "smp { int x", text: "smp { long x", types: []string{"smp", "smp"}},
		{name: "a condition around a type", old: "CONFIG_SMP", text: "SPECIAL", types: []string{"smp", "smp!"}},
		{name: "a condition in a type", old: "int a;", text: "\n#ifdef SPECIAL\nint a;\n#endif\n", types: []string{"s", "s!"}},
		{name: "undef", old: "#define BOUND 4", text: "#undef BOUND\n#define BOUND 4", whole: true},
		{name: "no guard", old: "#define H_H\n", text: "", names: []string{"H_H"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if !strings.Contains(outlineText, c.old) {
				t.Fatalf("%q is not in the text", c.old)
			}
			o := Compare("h.h", outlineText, strings.Replace(outlineText, c.old, c.text, 1))
			var types []string
			for _, d := range o.Types {
				n := strings.Join(d.Names, " ")
				if !d.Fixed {
					n += "!"
				}
				types = append(types, n)
			}
			if c.name == "no guard" { // all types are read differently then, which is more than needed
				types = nil
			}
			if fmt.Sprint(types, o.Names, o.Whole) != fmt.Sprint(c.types, c.names, c.whole) {
				t.Errorf("types %q, names %q, whole %t; want %q, %q, %t", types, o.Names, o.Whole, c.types, c.names, c.whole)
			}
			if want := len(c.types)+len(c.names) == 0 && !c.whole; o.Empty() != want {
				t.Errorf("empty %t", o.Empty())
			}
		})
	}
}

// A type may be made with a name through others: macro, macro, enumerator.
func TestBound(t *testing.T) {
	files := map[string]string{
		"a.h": "#ifndef A\n#define A\n#define ONE 1\n#define TWO (ONE + ONE)\nenum e { FIRST = TWO, LAST };\ntypedef char row[LAST];\n#endif\n",
		"b.h": "#ifndef B\n#define B\nstruct rows { row r; };\nstruct apart { int x; };\nstatic inline int f(void) { return ONE; }\n#endif\n",
		"c.c": "#include \"b.h\"\nstruct own { char c[TWO]; };\nMAKE_TYPE(fresh);\n",
		"d.c": "MAKE_TYPE(TWO);\n",
	}
	read := func(f string) ([]byte, error) { return []byte(files[f]), nil }
	for _, c := range []struct {
		names, files []string
		want         []string
		whole        bool
	}{
		{[]string{"ONE"}, []string{"a.h", "b.h", "c.c"}, []string{"a.h e", "b.h rows", "c.c own"}, false},
		{[]string{"ONE"}, []string{"a.h", "b.h"}, []string{"a.h e", "b.h rows"}, false},
		{[]string{"row"}, []string{"a.h", "b.h", "c.c"}, []string{"b.h rows"}, false},
		{[]string{"absent"}, []string{"a.h", "b.h", "c.c"}, nil, false},
		{[]string{"TWO"}, []string{"a.h", "d.c"}, []string{"a.h e"}, true},
	} {
		found, whole, err := Bound(c.names, c.files, read)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, d := range found {
			got = append(got, d.File+" "+strings.Join(d.Names, " "))
		}
		slices.Sort(got)
		if !slices.Equal(got, c.want) || whole != c.whole {
			t.Errorf("%v in %v: %q, %t; want %q, %t", c.names, c.files, got, whole, c.want, c.whole)
		}
	}
}

func FuzzCompareOutlines(f *testing.F) {
	f.Add(outlineText, strings.Replace(outlineText, "int a", "long a", 1))
	f.Fuzz(func(t *testing.T, a, b string) {
		if o := Compare("h.h", a, a); !o.Empty() {
			t.Errorf("a text differs from itself: %+v", o)
		}
		_ = Compare("h.h", a, b)
		_, _ = Confine(a, "s")
	})
}
