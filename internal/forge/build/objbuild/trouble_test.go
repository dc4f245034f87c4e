// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/sandbox"
	"klatch/internal/testkit"
)

// Each log is what gcc 12, make 4.3, dash or bash of Debian 12 print.
func TestTroubleOfTheMachineIsNotTheFixesFault(t *testing.T) {
	for _, c := range []struct {
		name, log string
		refused   bool
	}{
		{"an undeclared name", "net/a.c:3:5: error: ‘y’ undeclared here (not in a function)\nmake: *** [t.mk:5: t0] Error 1\n", true},
		{"a header that is not there", "net/a.c:1:10: fatal error: linux/none.h: No such file or directory\ncompilation terminated.\n", true},
		{"an #error with our words", "net/a.c:1:2: error: #error Killed: No space left on device\n", true},
		{"a name with our words", "net/a.c:2:5: error: ‘Killed’ undeclared here\n    2 | Killed; /* Out of memory */\n", true},
		{"a killed compiler", "gcc-12: fatal error: Killed signal terminated program cc1\ncompilation terminated.\n", false},
		{"a killed compiler beside a wrong source", "net/a.c:3:5: error: ‘y’ undeclared here\ngcc-12: fatal error: Killed signal terminated program cc1\n", false},
		{"no memory", "cc1: out of memory allocating 65536 bytes after a total of 1609728 bytes\n", false},
		{"no memory in the assembler", "virtual memory exhausted: Cannot allocate memory\n", false},
		{"no process", "sh: 1: Cannot fork\nmake: *** [t.mk:5: t0] Error 2\n", false},
		{"no process in gcc", "gcc-12: fatal error: cannot execute ‘cc1’: vfork: Resource temporarily unavailable\n", false},
		{"no process in make", "make: fork: Resource temporarily unavailable\n", false},
		{"a full disk", "net/a.c:9:1: fatal error: error writing to /run/ccX.s: No space left on device\n", false},
		{"a full disk in the assembler", "{standard input}: Assembler messages:\n{standard input}: Fatal error: can't write 12 bytes to section .text of a.o: 'No space left on device'\n", false},
		{"a file too large", "net/a.c:9:1: fatal error: error writing to /run/ccX.s: File too large\n", false},
		{"a crash of the compiler", "net/a.c:9:1: internal compiler error: Segmentation fault\n", false},
		{"nothing said", "make: *** [t.mk:5: t0] Error 1\n", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			j := &job{}
			err := j.notCompiled(&object{}, sandbox.Result{Output: []byte(c.log)}, fs.ErrNotExist)
			if refused := len(j.result.Refusals) > 0; refused != c.refused || (err == nil) != c.refused {
				t.Errorf("refused %v, error %v", refused, err)
			}
		})
	}
}

// The same with the compiler itself, on sources that make it run out of
// something: what it says must be known.
func TestACompilerThatRunsOutIsBroken(t *testing.T) {
	testkit.Need(t, "gcc")
	dir, err := os.MkdirTemp("/var/tmp", "klatch-objbuild-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	tree := kerneltree.Tree{Dir: filepath.Join(dir, "kernel")}
	if err := os.MkdirAll(tree.Source(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := sandbox.Own(tree.Source()); err != nil {
		t.Fatal(err)
	}
	// Each doubles what the line before means: more than any memory holds.
	bomb := "#define A0 1,1,1,1\n"
	const names = "0123456789abcdefghijklmnopq"
	for i := 1; i < len(names); i++ {
		bomb += "#define A" + names[i:i+1] + " A" + names[i-1:i] + ",A" + names[i-1:i] + ",A" + names[i-1:i] + ",A" + names[i-1:i] + "\n"
	}
	bomb += "int x[] = { Aq };\n"
	for _, c := range []struct {
		name, source, command string
		refused               bool
	}{
		{"a wrong source", "int x = y;\n", "gcc -c -o a.o a.c", true},
		{"macros that explode", bomb, "gcc -c -o a.o a.c", false},
		{"no memory for the compiler", "int x;\n", "ulimit -v 20000; gcc -c -o a.o a.c", false},
		{"no room for the object", "int x[1000] = {1};\n", "ulimit -f 1; gcc -c -o a.o a.c", false},
		{"no processes", "int x;\n", "prlimit --nproc=1:1 sh -c 'gcc -c -o a.o a.c; exit $$?'", false},
		{"a compiler that somebody kills", "int x;\n", "(while ! pkill -9 -x cc1; do :; done) & exec gcc -c -o a.o -x c /dev/zero", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.name == "no processes" && os.Getuid() != 0 {
				testkit.Need(t, "root") // without, the kernel counts the caller's own
			}
			j := &job{Driver: &Driver{Limits: sandbox.Limits{Memory: 256 << 20}}, tree: tree, scratch: filepath.Join(dir, c.name, "overlay")}
			if err := os.WriteFile(filepath.Join(tree.Source(), "a.c"), []byte(c.source), 0o644); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			res, err := j.runTasks(ctx, []task{{out: "a.o", command: c.command}}, nil)
			if err == nil {
				err = j.notCompiled(&object{}, res, fs.ErrNotExist)
			}
			if refused := len(j.result.Refusals) > 0; refused != c.refused || (err == nil) != c.refused {
				t.Errorf("refused %v, error %v, output %s", refused, err, res.Output)
			}
			t.Logf("%v", err)
		})
	}
}
