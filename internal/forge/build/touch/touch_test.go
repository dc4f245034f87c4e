// SPDX-License-Identifier: Apache-2.0

package touch

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"klatch/internal/fault"
	"klatch/internal/forge/kerneltree"
)

func TestWhatAFileIs(t *testing.T) {
	dir := t.TempDir()
	tree := kerneltree.Tree{Dir: dir}
	asm := func(name, text string) error {
		f := filepath.Join(tree.Source(), name)
		return errors.Join(os.MkdirAll(filepath.Dir(f), 0o755), os.WriteFile(f, []byte(text), 0o644))
	}
	err := errors.Join(
		os.WriteFile(filepath.Join(dir, "units.json"), []byte(`{"Units":[{"Source":"fs/a.c","Object":"vmlinux","Target":"fs/a.o"},
			{"Source":"arch/x86/entry/vdso/vma.c","Object":"vmlinux","Target":"arch/x86/entry/vdso/vma.o"}],"Modules":[{"Name":"m","Path":"m.ko"}]}`), 0o644),
		os.MkdirAll(filepath.Join(dir, "modules"), 0o755),
		os.WriteFile(tree.ModuleSymbols("m"), []byte("  1: 0 1 FUNC LOCAL DEFAULT 1 in_module\n"), 0o644),
		asm("arch/x86/lib/has.S", "SYM_FUNC_START(in_kernel)\n"),
		asm("arch/x86/lib/module.S", "	.globl	in_module\n"),
		asm("arch/x86/lib/none.S", "SYM_FUNC_START(nowhere)\n"),
		asm("arch/x86/lib/nameless.S", "nop\n"),
	)
	if err != nil {
		t.Fatal(err)
	}
	units, err := tree.Units()
	if err != nil {
		t.Fatal(err)
	}
	k := &Kernel{Tree: tree, Units: units, Defines: func(s string) bool { return s == "in_kernel" },
		Includers: func(f string) []string {
			if f == "include/linux/used.h" || f == "include/vdso/used.h" {
				return []string{"fs/a.c"}
			}
			return nil
		}}
	for file, want := range map[string]fault.Code{
		"fs/a.c":                          "",
		"fs/b.c":                          "not_built",
		"include/linux/used.h":            "",
		"include/linux/unused.h":          "not_built",
		"arch/x86/lib/has.S":              "assembly",
		"arch/x86/lib/module.S":           "assembly",
		"arch/x86/lib/none.S":             "not_built",
		"arch/x86/lib/nameless.S":         "assembly",
		"arch/x86/lib/has_32.S":           "not_built",
		"arch/arm64/kernel/entry.S":       "not_built",
		"arch/x86/kernel/vmlinux.lds.S":   "not_code",
		"arch/x86/entry/vdso/vma.c":       "",
		"arch/x86/entry/vdso/vgettime.c":  "boot_image",
		"lib/vdso/gettimeofday.c":         "boot_image",
		"include/vdso/used.h":             "boot_image",
		"fs/Makefile":                     "not_code",
		"Documentation/filesystems/a.rst": "not_built",
		"tools/perf/perf.c":               "not_built",
	} {
		if got, err := k.Of(file); err != nil || got != want {
			t.Errorf("%s is %q, %v; want %q", file, got, err, want)
		}
	}
}
