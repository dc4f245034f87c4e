// SPDX-License-Identifier: Apache-2.0

package proof

import (
	"bytes"
	"compress/gzip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// builtSymbols is a builder's table in the order of a linker: "same" is there
// three times, and the first by address is the last here.
const builtSymbols = `
Symbol table '.symtab' contains 9 entries:
   Num:    Value          Size Type    Bind   Vis      Ndx Name
     0: 0000000000000000     0 NOTYPE  LOCAL  DEFAULT  UND 
     1: 0000000000000000     0 FILE    LOCAL  DEFAULT  ABS a.c
     2: ffffffff81000300    16 FUNC    LOCAL  DEFAULT    1 same
     3: ffffffff81000400    16 OBJECT  LOCAL  DEFAULT    3 same
     4: 0000000000000000     0 FILE    LOCAL  DEFAULT  ABS b.c
     5: ffffffff81000200    16 FUNC    LOCAL  DEFAULT    1 same
     6: ffffffff81000100    16 FUNC    GLOBAL DEFAULT    1 only
     7: ffffffff81000000     0 NOTYPE  GLOBAL DEFAULT    1 _text
     8: 0000000000000040     8 OBJECT  LOCAL  DEFAULT    2 percpu
     9: ffffffff81000500     8 OBJECT  LOCAL  DEFAULT    3 variable
`

// runningSymbols is the same kernel, moved by 16 MiB, with what it does not
// say in the table.
const runningSymbols = `0000000000000040 A percpu
ffffffff82000000 T _text
ffffffff82000100 T only
ffffffff82000200 t same
ffffffff82000300 t same
ffffffff82000400 d same
ffffffffc0001000 t same	[m]
ffffffffc0001010 t other	[m]
`

func packed(text string) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = z.Write([]byte(text))
	_ = z.Close()
	return b.Bytes()
}

func TestEachWrongSymbolIsSeen(t *testing.T) {
	for _, c := range []struct{ name, from, to, why string }{
		{"nothing", "", "", ""},
		{"variables alone do not matter", "percpu", "percpv", ""},
		{"a function elsewhere", "ffffffff82000100 T only", "ffffffff82000110 T only", "only 1 is at 0xffffffff82000110"},
		{"no such function", "T only", "T onlz", "only is there 0 times, not 1"},
		{"one more of the name", "ffffffff82000400 d same", "ffffffff82000400 d same\nffffffff82000408 d same", "same is there 4 times, not 3"},
		{"another order", "ffffffff82000200 t same\nffffffff82000300 t same", "ffffffff82000300 t same\nffffffff82000200 t same", "same 1 is at"},
		{"no start", "_text", "_texd", "_text"},
	} {
		t.Run(c.name, func(t *testing.T) {
			running, err := readKallsyms(packed(strings.Replace(runningSymbols, c.from, c.to, 1)))
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(t.TempDir(), "table")
			if err := os.WriteFile(file, []byte(builtSymbols), 0o644); err != nil {
				t.Fatal(err)
			}
			built, err := readTable(file)
			if err != nil {
				t.Fatal(err)
			}
			n, different := compareKernel(built, running[""])
			if c.why == "" && (n != 3 || len(different) != 0) || c.why != "" && !strings.Contains(strings.Join(different, "; "), c.why) {
				t.Errorf("%d functions, %q; want %q", n, different, c.why)
			}
		})
	}
	for _, bad := range []string{"zzz T _text\n", "ffffffff82000000\n"} {
		if _, err := readKallsyms(packed(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
	if _, err := readKallsyms([]byte("not packed")); err == nil {
		t.Error("text was read as packed")
	}
}

func TestModulesKeepTheirOrder(t *testing.T) {
	built := names{
		"one":  {{0x10, 1, true}},
		"two":  {{0x40, 1, true}, {0x20, 1, true}},
		"cold": {{0, 2, true}},
		"data": {{0, 3, false}},
	}
	running := func() names {
		return names{"one": {{addr: 0x1010}}, "two": {{addr: 0x1040}, {addr: 0x1020}}, "cold": {{addr: 0x9000}}, "data": {{addr: 1}}}
	}
	if n, d := compareModule(built, running()); n != 4 || len(d) != 0 {
		t.Errorf("%d functions, %q", n, d)
	}
	for name, spoil := range map[string]func(names){
		"another order":        func(r names) { r["two"][0], r["two"][1] = r["two"][1], r["two"][0] },
		"one less":             func(r names) { r["two"] = r["two"][:1] },
		"a function elsewhere": func(r names) { r["one"][0].addr++ },
	} {
		r := running()
		spoil(r)
		if _, d := compareModule(built, r); len(d) == 0 {
			t.Errorf("%s was not seen", name)
		}
	}
}
