// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"encoding/binary"
	"testing"

	"klatch/internal/forge/build/module"
)

// FuzzModule reads any bytes as what the differ or the linker left, which a
// hostile build may have written: an error or a list, never a panic.
func FuzzModule(f *testing.F) {
	f.Add(funcs(2, 0, 48, 56, 104))
	f.Add(funcs(1))
	f.Fuzz(func(t *testing.T, b []byte) {
		names, err := replacedFunctions(b)
		for _, n := range names {
			if err == nil && (n.Name == "" || n.Object == "") {
				t.Errorf("a function without a name: %+v", names)
			}
		}
		_, _ = module.Info(b)
	})
}

// FuzzRecipe reads any bytes as kbuild's record of a command.
func FuzzRecipe(f *testing.F) {
	f.Add([]byte("cmd_a.o := gcc -c -o a.o a.c\n\nsource_a.o := a.c\n\ndeps_a.o := \\\n  include/x.h \\\n    $(wildcard include/config/X) \\\n\na.o: $(deps_a.o)\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := readRecipe(b)
		if err == nil && (r.Command == "" || len(r.Deps) == 0) {
			t.Errorf("recipe %+v", r)
		}
		_, _ = complaintsOf(b), troubleIn(b)
	})
}

// A section that says that it has more bytes than any file must not be
// believed.
func TestAListWithoutEndIsAnError(t *testing.T) {
	for _, size := range []uint64{1 << 40, 1 << 62, ^uint64(0)} {
		o := funcs(2, 0, 48, 56, 104)
		binary.LittleEndian.PutUint64(o[64+2*64+32:], size) // sh_size of .kpatch.funcs
		binary.LittleEndian.PutUint32(o[64+2*64+4:], 8)     // SHT_NOBITS: no bytes are needed for it
		if names, err := replacedFunctions(o); err == nil {
			t.Errorf("size %#x: %d functions", size, len(names))
		}
	}
}
