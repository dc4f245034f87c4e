// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"klatch/internal/forge/compose"
	"klatch/internal/forge/kerneltree"
	"klatch/internal/forge/sandbox"
)

func TestMain(m *testing.M) {
	sandbox.Child()
	os.Exit(m.Run())
}

// A bad build leaves a link where the module's folder will be. What fills the
// folder must not follow it with root's rights.
func TestModuleDirIsNotFilledThroughALink(t *testing.T) {
	dir, err := os.MkdirTemp("/var/tmp", "klatch-objbuild-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	j := &job{Driver: &Driver{}, tree: kerneltree.Tree{Dir: filepath.Join(dir, "kernel")}, scratch: filepath.Join(dir, "build", "overlay"),
		plan: compose.Plan{Sequence: 1}}
	j.Tools.Dir = filepath.Join(dir, "tools")
	victim, upper := filepath.Join(dir, "victim"), j.upper("")
	err = os.Chmod(dir, 0o755)
	for _, d := range []string{j.tree.Source(), victim, filepath.Join(victim, "file"), upper, filepath.Dir(j.Tools.template("x"))} {
		err = errors.Join(err, os.MkdirAll(d, 0o755))
	}
	for _, f := range []string{"kpatch.h", "kpatch-patch.h", "kpatch-macros.h", "kpatch-syscall.h", "kpatch-patch-hook.c",
		"livepatch-patch-hook.c", "patch-hook.c", "kpatch.lds.S"} {
		err = errors.Join(err, os.WriteFile(j.Tools.template(f), []byte("x"), 0o644))
	}
	err = errors.Join(err, os.Symlink(victim, j.upper(moduleDir)), sandbox.Own(j.tree.Source()), sandbox.Own(upper), sandbox.Own(filepath.Dir(upper)))
	if err != nil {
		t.Fatal(err)
	}
	_ = j.fillModuleDir(t.Context(), "klatch_1") // it has nothing to link
	left, err := os.ReadDir(victim)
	if err != nil || len(left) != 1 {
		t.Errorf("root wrote where the build user said: %v, %v", left, err)
	}
	if err := os.Remove(j.upper(moduleDir)); err != nil {
		t.Fatal(err)
	}
	_ = j.fillModuleDir(t.Context(), "klatch_1")
	if _, err := os.Stat(j.upper(moduleDir + "/Makefile")); err != nil {
		t.Errorf("an honest folder was not filled: %v", err)
	}
}

// funcs makes an object whose .kpatch.funcs has room for n functions, of which
// the relocations name only some.
func funcs(n int, offsets ...uint64) []byte {
	var rela bytes.Buffer
	for _, o := range offsets {
		r := elf.Rela64{Off: o, Info: 1 << 32}
		if f := o % funcEntry; f == funcObject || f == funcName { // its name, or that of its object: "f"
			r.Info, r.Addend = 2<<32, 1
		}
		_ = binary.Write(&rela, binary.LittleEndian, r)
	}
	names := []byte("\x00f\x00.rela.kpatch.funcs\x00.kpatch.funcs\x00.symtab\x00.strtab\x00")
	name := func(s string) uint32 { return uint32(bytes.Index(names, []byte("\x00"+s+"\x00")) + 1) }
	var symbols bytes.Buffer
	_ = binary.Write(&symbols, binary.LittleEndian, []elf.Sym64{{}, {Name: 1, Info: uint8(elf.STT_FUNC), Shndx: 2},
		{Info: uint8(elf.STT_SECTION), Shndx: 4}})
	sections := []struct {
		h    elf.Section64
		data []byte
	}{
		{},
		{elf.Section64{Name: name(".rela.kpatch.funcs"), Type: uint32(elf.SHT_RELA), Info: 2, Link: 3, Entsize: 24}, rela.Bytes()},
		{elf.Section64{Name: name(".kpatch.funcs"), Type: uint32(elf.SHT_PROGBITS)}, make([]byte, 56*n)},
		{elf.Section64{Name: name(".symtab"), Type: uint32(elf.SHT_SYMTAB), Link: 4, Entsize: 24}, symbols.Bytes()},
		{elf.Section64{Name: name(".strtab"), Type: uint32(elf.SHT_STRTAB)}, names},
	}
	head := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64, Shentsize: 64,
		Shnum: uint16(len(sections)), Shstrndx: 4, Shoff: 64}
	copy(head.Ident[:], "\x7fELF\x02\x01\x01")
	var out, body bytes.Buffer
	_ = binary.Write(&out, binary.LittleEndian, head)
	for _, s := range sections {
		s.h.Off, s.h.Size = uint64(64+64*len(sections)+body.Len()), uint64(len(s.data))
		body.Write(s.data)
		_ = binary.Write(&out, binary.LittleEndian, s.h)
	}
	return append(out.Bytes(), body.Bytes()...)
}

// A function that the list does not name would be replaced without a proof.
func TestFunctionWithoutNameIsAnError(t *testing.T) {
	if names, err := replacedFunctions(funcs(2, 0, 40, 48, 56, 96, 104)); err != nil || len(names) != 2 {
		t.Fatalf("names %q, %v", names, err)
	}
	for what, o := range map[string][]byte{
		"a function without relocation": funcs(2, 0, 40, 48, 96, 104),
		"a function without an object":  funcs(2, 0, 40, 48, 56, 96),
		"a function without a name":     funcs(2, 0, 40, 48, 56, 104),
		"a relocation at an odd place":  funcs(2, 0, 40, 48, 57, 96, 104),
		"no relocation":                 funcs(1),
	} {
		if names, err := replacedFunctions(o); err == nil {
			t.Errorf("%s: %q", what, names)
		}
	}
}
