// SPDX-License-Identifier: Apache-2.0

package klpbuild

import (
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
	"klatch/internal/livepatch"
	"klatch/internal/testkit"
)

// source has the sections that objtool klp diff makes
// (include/linux/livepatch_external.h), and a symbol to be resolved.
const source = `
struct func { const char *name; void *to; unsigned long pos; };
struct object { const char *name; struct func *funcs; void *callbacks[5]; unsigned int count; };
extern int other __asm__("\".klp.sym.vmlinux.twice,2\"");
int one(void) { return other; }
int two(void) { return 2; }
static struct func funcs[] __attribute__((section(".init.klp_funcs"), used)) = {{"one", one, 0}, {"two", two, 3}, {"late", two, 0}};
static struct object objects[] __attribute__((section(".init.klp_objects"), used)) = {{0, funcs, {0}, 2}, {"dummy", funcs + 2, {0}, 1}};
`

func compiled(t testing.TB, text string) string {
	t.Helper()
	testkit.Need(t, "gcc")
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.c"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("gcc", "-O2", "-pg", "-mfentry", "-mrecord-mcount", "-fno-pic", "-c", "-o", "a.o", "a.c")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return filepath.Join(dir, "a.o")
}

func TestModuleSaysWhatItReplaces(t *testing.T) {
	b, err := os.ReadFile(compiled(t, source))
	if err != nil {
		t.Fatal(err)
	}
	c, err := readLivepatch(b)
	if err != nil {
		t.Fatal(err)
	}
	want := []replaced{{livepatch.Function{Object: "vmlinux", Name: "one"}, 0}, {livepatch.Function{Object: "vmlinux", Name: "two"}, 3},
		{livepatch.Function{Object: "dummy", Name: "late"}, 0}}
	if !slices.Equal(c.replaced, want) {
		t.Errorf("replaced %+v", c.replaced)
	}
	if !slices.Equal(c.needs, []symbol{{"vmlinux", "twice", 2}}) {
		t.Errorf("needs %+v", c.needs)
	}
}

func TestOnlySomeFunctionsCanBeTraced(t *testing.T) {
	traced, err := traceable(compiled(t, "__attribute__((no_instrument_function)) int no(int x) { return x; }\nint yes(int x) { return x + 1; }\n"))
	if err != nil || !traced["yes"] || traced["no"] {
		t.Errorf("traced %v, %v", traced, err)
	}
}

// The texts are klp-build's and objtool's own, of Linux 7.2 and 7.3.
func TestWhatKlpBuildSaysBecomesARefusal(t *testing.T) {
	for _, c := range []struct {
		said, file, function string
		code                 fault.Code
	}{
		{"fs/pipe.c:12:3: error: 'x' undeclared\nmake[3]: *** [fs/pipe.o] Error 1\nerror: klp-build: patched kernel build failed\n", "fs/pipe.c", "", "does_not_compile"},
		{"ld: vmlinux.o: in function `f':\n(.text+0x1): undefined reference to `nobody'\nerror: klp-build: patched kernel build failed\n", "fs/pipe.c", "nobody", "symbol_missing"},
		{"vmlinux.o: error: objtool: pipe_read+0x10: unsupported static branch key k.  Use static_key_enabled() instead\n", "fs/pipe.c", "pipe_read", "static_key"},
		{"kvm.o: error: objtool: f()+0x2: unsupported static call key k.  Use KLP_STATIC_CALL() instead\n", "fs/pipe.c", "f", "static_call"},
		{"error: objtool: g: new reference to h (exported by m) would create an undeclared module dependency\n", "fs/pipe.c", "g", "needs_module"},
		{"vmlinux.o: error: objtool: changed data: table\nerror: klp-build: objtool klp diff failed\n", "fs/pipe.c", "table", "data_changed"},
		{"error: klp-build: no changes detected\n", "fs/pipe.c", "", "nothing_changed"},
		{"error: objtool: what is this\nerror: klp-build: objtool klp diff failed\n", "fs/pipe.c", "", "differ_refused"},
	} {
		j := &job{plan: compose.Plan{Patches: []queue.Patch{{Files: []string{"fs/pipe.c"}}}}, said: []byte(c.said), exit: 1}
		if err := j.judge(t.Context()); err != nil {
			t.Errorf("%q: %v", c.said, err)
			continue
		}
		r := j.result.Refusals[0]
		if r.Code != c.code || r.File != c.file || r.Function != c.function || r.Detail == "" {
			t.Errorf("%q became %+v", c.said, r)
		}
	}
	j := &job{said: []byte("bash: gawk: command not found\n"), exit: 1}
	if err := j.judge(t.Context()); fault.KindOf(err) != fault.Internal || !strings.Contains(err.Error(), "gawk") || len(j.result.Refusals) != 0 {
		t.Errorf("a missing program became %v, %+v", err, j.result.Refusals)
	}
}

func TestThePatchThatChangesNothingFits(t *testing.T) {
	for _, text := range []string{"a\nb\nc\nd\n", "a\nb\nc\n", "a\nb\n\n\n"} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "f.c"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("patch", "-p1", "--fuzz=0", "--batch")
		cmd.Dir, cmd.Stdin = dir, strings.NewReader(string(commentAtEnd("f.c", []byte(text))))
		if out, err := cmd.CombinedOutput(); err != nil || strings.Contains(string(out), "offset") {
			t.Errorf("%q: %v: %s", text, err, out)
		}
		if b, _ := os.ReadFile(filepath.Join(dir, "f.c")); string(b) != text+"/* the end */\n" {
			t.Errorf("became %q", b)
		}
	}
}

func TestDriverIsABuilder(t *testing.T) {
	var b build.Builder = &Driver{Cache: t.TempDir()}
	_, err := b.Build(t.Context(), compose.Plan{}, t.TempDir(), build.NewClock(nil))
	if fault.KindOf(err) != fault.NotFound || fault.HintOf(err) == "" {
		t.Errorf("a kernel that is not there: %v", err)
	}
}

func FuzzReadLivepatch(f *testing.F) {
	b, err := os.ReadFile(compiled(f, source))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(elf.ELFMAG))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = readLivepatch(b) // any bytes: an error or a list, never a panic
	})
}
