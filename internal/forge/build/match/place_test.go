// SPDX-License-Identifier: Apache-2.0

package match

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"klatch/internal/testkit"
)

const traced = `
extern int outside(int);
int seen(int x) { return outside(x) + 1; }
__attribute__((no_instrument_function)) int unseen(int x) { return outside(x) + 2; }
static __attribute__((noinline)) int twin(int x) { return outside(x) * 7; }
int user(int x) { return twin(x) + 3; }
`

const twin = `
extern int outside(int);
static __attribute__((noinline)) int twin(int x) { return outside(x) * 11; }
int user2(int x) { return twin(x) + 4; }
`

// tracedObject compiles as a kernel with ftrace does (CC_FLAGS_FTRACE).
func tracedObject(t *testing.T, dir, name, text string) string {
	t.Helper()
	c, o := filepath.Join(dir, name+".c"), filepath.Join(dir, name+".o")
	if err := os.WriteFile(c, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, "gcc", "-O2", "-fno-pic", "-mcmodel=kernel", "-fcf-protection=none", "-fno-asynchronous-unwind-tables",
		"-pg", "-mfentry", "-mrecord-mcount", "-c", "-o", o, c)
	return o
}

// The place of a function, of a linked kernel and of a module: which of its
// name it is, what its bytes are, whether ftrace knows it.
func TestPlaces(t *testing.T) {
	testkit.Need(t, "gcc")
	dir := t.TempDir()
	a, b := tracedObject(t, dir, "a", traced), tracedObject(t, dir, "b", twin)
	script := filepath.Join(dir, "lds")
	if err := os.WriteFile(script, []byte("SECTIONS { . = 0x1000; .text : { *(.text*) } .data : { *(.data*) __start_mcount_loc = .; *(__mcount_loc) __stop_mcount_loc = .; } }"), 0o644); err != nil {
		t.Fatal(err)
	}
	vm := filepath.Join(dir, "vm")
	run(t, "ld", "-e", "0", "--no-warn-rwx-segments", "--defsym=outside=0x10", "--defsym=__fentry__=0x20", "-T", script, "-o", vm, a, b)
	kernel, err := Open(vm)
	if err != nil {
		t.Fatal(err)
	}
	for name, k := range map[string]*Image{"kernel": kernel, "module": module(t, dir, a, b)} {
		t.Run(name, func(t *testing.T) {
			for function, want := range map[string]bool{"seen": true, "unseen": false, "user": true} {
				s := k.byName[function][0]
				p, ok := k.Place(function, s.addr)
				sum := sha256.Sum256(k.bytes(s.addr, s.size))
				if !ok || p.Traceable != want || p.Position != 1 || p.Of != 1 || p.Size != s.size || p.SHA256 != hex.EncodeToString(sum[:]) {
					t.Errorf("%s: %+v, %v", function, p, ok)
				}
			}
			for i, s := range k.byName["twin"] {
				if p, ok := k.Place("twin", s.addr); !ok || p.Position != i+1 || p.Of != 2 || !p.Traceable {
					t.Errorf("twin %d: %+v, %v", i+1, p, ok)
				}
			}
			if p, ok := k.Place("seen", k.byName["seen"][0].addr+1); ok {
				t.Errorf("in the middle of a function: %+v", p)
			}
			if got := k.Names("use"); len(got) != 0 {
				t.Errorf("names %q", got)
			}
			if got := k.Names("user"); !slices.Equal(got, []string{"user"}) {
				t.Errorf("names %q", got)
			}
		})
	}
}
