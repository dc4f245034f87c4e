// SPDX-License-Identifier: Apache-2.0

package layout

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"klatch/internal/testkit"
)

// forms are the kinds of debug information that the builder meets.
var forms = []string{"-gdwarf-5", "-gdwarf-4", "-gdwarf-5 -flto", "-gdwarf-4 -gz=zlib"}

func compiled(t testing.TB, source, flags string) []byte {
	t.Helper()
	testkit.Need(t, "gcc")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.c"), []byte(source), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("gcc", append(strings.Fields(flags), "-O2", "-c", "-fno-eliminate-unused-debug-types", "-o", "a.o", "a.c")...)
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

func types(t testing.TB, source, flags string) *Types {
	t.Helper()
	ty, err := Read(compiled(t, source, flags))
	if err != nil {
		t.Fatal(err)
	}
	return ty
}

const source = `
#define BOUND 4
typedef unsigned int u32;
typedef struct { int counter; } atomic;
struct forward;
struct node { struct node *next, *prev; };
enum color { RED, GREEN = 5, BLUE };
enum { LIMIT = 10, OTHER };
struct inner { char tag; short word; };
struct big {
	u32 first;
	char small;
	struct inner inner;
	union { int a; struct { short low, high; }; };
	struct { int x, y; } named[2];
	unsigned flag : 3, wide : 9;
	atomic refs;
	struct node link;
	struct forward *later;
	int (*call)(struct big *, int);
	void *private;
	enum color color;
	long table[BOUND];
	struct { int deep; } *anonymous;
	char tail[];
};
union either { int i; long l; };
static struct { int value; long other; } state;
int use(struct big *b, union either *e) { struct temporary { int t; } v = { b->first }; return v.t + e->i + state.value + LIMIT; }
int other(void) { struct temporary { long t[2]; } v = { { 1 } }; return v.t[0]; }
`

func changed(t *testing.T, pairs ...string) string {
	t.Helper()
	s := source
	for i := 0; i < len(pairs); i += 2 {
		if strings.Count(s, pairs[i]) != 1 {
			t.Fatalf("%q is in the source %d times", pairs[i], strings.Count(s, pairs[i]))
		}
		s = strings.Replace(s, pairs[i], pairs[i+1], 1)
	}
	return s
}

func TestCompare(t *testing.T) {
	old := types(t, source, "-g -flto")
	for _, c := range []struct {
		name  string
		edits []string
		want  []string // type and change, the first of all
	}{
		{"nothing", nil, nil},
		{"a comment and another order of types", []string{"struct node { struct node *next, *prev; };\n", "", "enum color {", "/* */ struct node { struct node *next, *prev; };\nenum color {"}, nil},
		{"a new type", []string{"struct forward;", "struct forward;\nstruct fresh { int a; };"}, nil},
		{"a type that was only announced", []string{"struct forward;", "struct forward { int a; };"}, nil},
		{"a type that is gone", []string{"union either { int i; long l; };", "", ", union either *e", "", " + e->i", ""}, nil},
		{"a type with another name", []string{"union either { int i; long l; };", "union any { int i; long l; };", "union either *e", "union any *e"}, nil},
		{"a type with another name and another layout", []string{"union either { int i; long l; };", "union any { int i; short l; };", "union either *e", "union any *e"},
			[]string{"union either: member l resized: old offset 0, size 8; new offset 0, size 2", "union either: it seems that the type is now called union any"}},
		{"a member in a hole", []string{"char small;", "char small, more;"}, []string{"struct big: member more added: offset 5, size 1, in a hole of the old layout: old objects have anything there"}},
		{"a member at the end of another", []string{"short word;", "short word; int last;"},
			[]string{"struct inner: member last added: offset 4, size 4", "struct inner: total size: old 4, new 8", "struct big: member inner resized: old offset 6, size 4; new offset 8, size 8", "struct big: member a moved: old offset 12, size 4; new offset 16, size 4"}},
		{"a member that is gone", []string{"void *private;", ""}, []string{"struct big: member private removed: old offset 72, size 8", "struct big: member color moved: old offset 80, size 4; new offset 72, size 4"}},
		{"a macro that is a bound", []string{"BOUND 4", "BOUND 5"}, []string{"struct big: member table resized: old offset 88, size 32; new offset 88, size 40"}},
		{"a typedef", []string{"typedef unsigned int u32", "typedef unsigned long u32"}, []string{"struct big: member first resized: old offset 0, size 4; new offset 0, size 8"}},
		{"a typedef of a struct without a name", []string{"{ int counter; }", "{ long counter; }"}, []string{"typedef atomic: member counter resized: old offset 0, size 4; new offset 0, size 8"}},
		{"a bit field", []string{"flag : 3", "flag : 4"}, []string{"struct big: member flag resized: old offset 32 bit 0, size 3 bit; new offset 32 bit 0, size 4 bit"}},
		{"a new bit field", []string{"wide : 9", "wide : 9, fresh : 1"}, []string{"struct big: member fresh added: offset 33 bit 4, size 1 bit, in a hole of the old layout: old objects have anything there"}},
		{"within a struct without a name", []string{"int x, y;", "int x, y, z;"}, []string{"struct big: member named[].z added: offset 8, size 4"}},
		{"behind a pointer to a struct without a name", []string{"int deep;", "long deep;"}, []string{"struct big: member anonymous[].deep resized: old offset 0, size 4; new offset 0, size 8"}},
		{"within a union without a name", []string{"short low, high;", "short high, low;"}, []string{"struct big: member high moved: old offset 14, size 2; new offset 12, size 2"}},
		{"a flexible array becomes one", []string{"char tail[];", "char tail[1];"}, []string{"struct big: member tail resized: old offset 128, size 0; new offset 128, size 1"}},
		{"a value", []string{"GREEN = 5", "GREEN = 6"}, []string{"enum color: enumerator BLUE: 7, before 6", "enum color: enumerator GREEN: 6, before 5"}},
		{"a value without a type's name", []string{"LIMIT = 10", "LIMIT = 11"}, []string{"enum: enumerator LIMIT: 11, before 10"}},
		{"more values", []string{"BLUE }", "BLUE, WHITE = 99 }"}, nil},
		{"a value that is gone", []string{", BLUE }", " }"}, []string{"enum color: enumerator BLUE: none, before 6"}},
		{"a union", []string{"long l;", "long l[2];"}, []string{"union either: member l resized: old offset 0, size 8; new offset 0, size 16"}},
		{"a variable's own type", []string{"int value; long other;", "long other; int value;"}, []string{"variable state: member other moved: old offset 8, size 8; new offset 0, size 8"}},
		{"a type within one function", []string{"{ int t; }", "{ long t; }"}, []string{"struct temporary in use: member t resized: old offset 0, size 4; new offset 0, size 8"}},
		{"what a pointer leads to", []string{"struct forward *later", "struct inner *later"}, []string{"struct big: member later was struct forward *, is struct inner *: offset 56, size 8"}},
		{"parameters of a pointer to a function", []string{"(struct big *, int)", "(struct big *, int, int)"}, []string{"struct big: member call was int 32 bit (struct big *, int 32 bit) *, is int 32 bit (struct big *, int 32 bit, int 32 bit) *: offset 64, size 8"}},
		{"const", []string{"struct forward *later", "const struct forward *later"}, nil},
		{"one more name for the same bytes", []string{"u32 first;", "union { u32 first; u32 alias; };"}, nil},
		{"a group around members", []string{"u32 first;", "union { struct { u32 first; }; struct { u32 first; } group; };"}, nil},
		{"harmless: another name", []string{"void *private", "void *secret"}, []string{"struct big: member private is now called secret: offset 72, size 8"}},
		{"harmless: another sign", []string{"int a;", "unsigned a;"}, []string{"struct big: member a was int 32 bit, is unsigned 32 bit: offset 12, size 4"}},
		{"harmless: a pointer to anything gets a type", []string{"void *private", "struct node *private"}, []string{"struct big: member private was void *, is struct node *: offset 72, size 8"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cs := Compare(old, types(t, changed(t, c.edits...), "-g -flto"))
			var got []string
			harmless := true
			for _, c := range cs {
				got = append(got, c.Type+": "+c.String())
				harmless = harmless && c.Kind.Harmless()
			}
			if len(got) < len(c.want) || len(c.want) == 0 && len(got) > 0 || !slices.Equal(got[:len(c.want)], c.want) {
				t.Errorf("changes %q, want %q first", got, c.want)
			}
			if len(got) > 0 && harmless != strings.HasPrefix(c.name, "harmless") {
				t.Errorf("harmless %t: %q", harmless, got)
			}
		})
	}
}

// The same source gives the same types whatever the form of the debug
// information, and after a stay in the cache.
func TestOneSourceOneAnswer(t *testing.T) {
	want := types(t, source, forms[0])
	if len(want.Defs) != 10 || len(want.Defs["struct big"]) != 1 || len(want.Constants) != 2 {
		t.Fatalf("types %+v", want)
	}
	for _, flags := range forms[1:] {
		if got := types(t, source, flags); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, want %+v", flags, got, want)
		}
	}
	b, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(b)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("decoded %+v, %v", got, err)
	}
	if _, err := Decode(b[:len(b)/2]); err == nil {
		t.Error("half of an encoding was decoded")
	}
}

func TestWhatIsNoObjectIsAnError(t *testing.T) {
	for name, b := range map[string][]byte{
		"nothing":              nil,
		"text":                 []byte("hello"),
		"no debug information": compiled(t, source, "-g0"),
		"half of an object":    compiled(t, source, "-g")[:3000],
	} {
		if ty, err := Read(b); err == nil {
			t.Errorf("%s: %+v", name, ty)
		}
	}
}

func FuzzLayout(f *testing.F) {
	for _, flags := range forms {
		f.Add(compiled(f, source, flags))
	}
	f.Add(compiled(f, "struct a { int b; } c;", "-g"))
	f.Fuzz(func(t *testing.T, b []byte) {
		ty, err := Read(b) // any bytes: an error or types, never a panic
		if err != nil {
			return
		}
		if cs := Compare(ty, ty); len(cs) > 0 {
			t.Errorf("types differ from themselves: %v", cs)
		}
		enc, err := ty.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Decode(enc); err != nil {
			t.Fatal(err)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	var many bytes.Buffer
	for i := range 500 { // about as much as an object of the kernel has
		many.WriteString(strings.NewReplacer("struct big", "struct big"+string(rune('a'+i%26))+strings.Repeat("x", i/26)).Replace(
			"struct big { int a, b, c; struct { long x; } y; unsigned f : 3; struct big *next; void (*call)(struct big *); char d[8]; };\n"))
	}
	o := compiled(b, many.String()+source, "-g -flto")
	b.SetBytes(int64(len(o)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Read(o); err != nil {
			b.Fatal(err)
		}
	}
}
