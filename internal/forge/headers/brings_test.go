// SPDX-License-Identifier: Apache-2.0

package headers

import (
	"slices"
	"testing"
)

func TestBringsListsWhatIsNew(t *testing.T) {
	const old = "struct s {\n\tint a;\n};\nint f(int x)\n{\n\treturn x;\n}\nenum e {\n\tONE,\n};\nint shared(int a);\n"
	for _, c := range []struct {
		name, file string
		before     int
		lines      []string
		want       []string
	}{
		{"a function of a source file", "a.c", 8, []string{"int fresh(int x)", "{", "\treturn f(x);", "}"}, []string{"fresh"}},
		{"one that begins with the end of another, as diff shows it", "a.c", 7, []string{"\treturn x;", "}", "", "void fresh(int x)", "{"}, []string{"fresh"}},
		{"a static one is nobody else's", "a.c", 8, []string{"static int fresh(int x)", "{", "}"}, nil},
		{"a static one of a header", "a.h", 8, []string{"static inline int fresh(int x)", "{", "\treturn x;", "}"}, []string{"fresh"}},
		{"a member", "a.h", 3, []string{"\tint more;", "\tint (*op)(int);"}, []string{"more", "op"}},
		{"an enumerator", "a.h", 10, []string{"\tTWO,"}, []string{"TWO"}},
		{"a macro", "a.h", 12, []string{"#define LIMIT 3"}, []string{"LIMIT"}},
		{"a variable within a function is not", "a.h", 6, []string{"\tint local = 0;"}, nil},
		{"words of a comment are not", "a.h", 4, []string{" * Returns: success", " */"}, nil},
		{"a call is not", "a.c", 6, []string{"\tshared(1);"}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := Brings(old, Change{File: c.file, Inserted: []Insertion{{c.before, c.lines}}})
			if !slices.Equal(got, c.want) {
				t.Errorf("%v, want %v", got, c.want)
			}
		})
	}
}

func TestSignaturesListsChangedHeads(t *testing.T) {
	const old = "int f(int x)\n{\n\treturn x;\n}\nint shared(int a);\nstruct s { int shared; };\n"
	for line, want := range map[int][]string{1: {"f"}, 3: nil, 5: {"shared"}, 6: nil} {
		if got := Signatures(old, Change{File: "a.h", Removed: []int{line}, Inserted: []Insertion{{line + 1, []string{"x"}}}}); !slices.Equal(got, want) {
			t.Errorf("line %d: %v, want %v", line, got, want)
		}
	}
}
