// SPDX-License-Identifier: Apache-2.0

package player

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"klatch/internal/forge/lab/player/playertest"
)

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
			running, err := readKallsyms(playertest.Packed(strings.Replace(playertest.Running, c.from, c.to, 1)))
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(t.TempDir(), "table")
			if err := os.WriteFile(file, []byte(playertest.Symbols), 0o644); err != nil {
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
		if _, err := readKallsyms(playertest.Packed(bad)); err == nil {
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
