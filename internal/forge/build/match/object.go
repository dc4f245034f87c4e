// SPDX-License-Identifier: Apache-2.0

package match

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"klatch/internal/fault"
)

// function is one function of an object file.
type function struct {
	name   string
	local  bool
	code   []byte
	relocs []reloc
}

// reloc is a place in a function that the linker fills in.
type reloc struct {
	off    uint64 // in the function
	kind   elf.R_X86_64
	symbol string // empty where it leads to a place without a name
	addend int64
	text   string // the string that it leads to
	isText bool
	index  int // of its symbol, while it is read
}

func (r reloc) pc() bool {
	return r.kind == elf.R_X86_64_PC32 || r.kind == elf.R_X86_64_PLT32 || r.kind == elf.R_X86_64_PC64
}

// Changed lists the functions whose code differs between two builds of an
// object in separate sections: more than a livepatch replaces, because line
// numbers and reordered references count, but never fewer.
func Changed(original, patched string) ([]string, error) {
	before, err := readObject(original)
	if err != nil {
		return nil, err
	}
	after, err := readObject(patched)
	if err != nil {
		return nil, err
	}
	known := map[string]function{}
	for _, f := range before {
		known[f.name] = f
	}
	var out []string
	for _, f := range after {
		old, ok := known[f.name]
		if ok && (!bytes.Equal(old.code, f.code) || !sameRelocs(old.relocs, f.relocs)) {
			out = append(out, f.name)
		}
	}
	return out, nil
}

// paddingPrefix begins the names of symbols that objtool makes for the no-ops
// before each function (CONFIG_PREFIX_SYMBOLS). They are no functions, and in a
// linked kernel they belong to no source file.
const paddingPrefix = "__pfx_"

// readObject reads the functions of a relocatable object, without those that
// the kernel throws away after boot: they cannot be compared in memory and are
// never replaced.
func readObject(path string) ([]function, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open object: %w", err)
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	out, err := readFunctions(f)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return out, nil
}

func readFunctions(f *elf.File) ([]function, error) {
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 || f.Type != elf.ET_REL {
		return nil, fault.New(fault.Invalid, "bad_object", "not an x86-64 object file")
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_object", "symbols: %w", err)
	}
	relocs, err := readRelocs(f)
	if err != nil {
		return nil, err
	}
	named := map[elf.SectionIndex][]elf.Symbol{}
	for _, s := range symbols {
		kind := elf.ST_TYPE(s.Info)
		if (kind == elf.STT_FUNC || kind == elf.STT_OBJECT) && !strings.HasPrefix(s.Name, ".L") {
			named[s.Section] = append(named[s.Section], s)
		}
	}
	for i := range relocs {
		for n := range relocs[i] {
			if err := resolve(f, symbols, named, &relocs[i][n]); err != nil {
				return nil, err
			}
		}
	}
	var out []function
	for _, s := range symbols {
		if elf.ST_TYPE(s.Info) != elf.STT_FUNC || int(s.Section) >= len(f.Sections) || s.Section == elf.SHN_UNDEF || s.Size == 0 {
			continue
		}
		if strings.HasPrefix(s.Name, paddingPrefix) {
			continue
		}
		sec := f.Sections[s.Section]
		if sec.Flags&elf.SHF_EXECINSTR == 0 || strings.HasPrefix(sec.Name, ".init") || strings.HasPrefix(sec.Name, ".exit") {
			continue
		}
		data, err := content(sec)
		if err != nil {
			return nil, err
		}
		if s.Value > uint64(len(data)) || s.Size > uint64(len(data))-s.Value {
			return nil, fault.New(fault.Invalid, "bad_object", "function %s is outside its section", s.Name)
		}
		fn := function{name: s.Name, local: elf.ST_BIND(s.Info) == elf.STB_LOCAL, code: data[s.Value:][:s.Size]}
		for _, r := range relocs[int(s.Section)] {
			if r.off >= s.Value && r.off < s.Value+s.Size {
				r.off -= s.Value
				fn.relocs = append(fn.relocs, r)
			}
		}
		out = append(out, fn)
	}
	return out, nil
}

func content(s *elf.Section) ([]byte, error) {
	if s.Type == elf.SHT_NOBITS {
		return nil, nil
	}
	if s.Size > maxSection {
		return nil, fault.New(fault.Invalid, "bad_object", "section %s has %d bytes", s.Name, s.Size)
	}
	data, err := s.Data()
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_object", "section %s: %w", s.Name, err)
	}
	return data, nil
}

// resolve gives a relocation its meaning. One that names a section, as those
// of local functions and of strings do, gets the symbol that lies there or the
// string's text.
func resolve(f *elf.File, symbols []elf.Symbol, named map[elf.SectionIndex][]elf.Symbol, r *reloc) error {
	if r.index >= len(symbols) {
		return nil
	}
	s := symbols[r.index]
	if elf.ST_TYPE(s.Info) != elf.STT_SECTION {
		r.symbol = s.Name
		if !strings.HasPrefix(s.Name, ".L") || s.Section == elf.SHN_UNDEF {
			return nil
		}
		r.symbol = "" // a label of the compiler's, which no linked file has
	}
	if int(s.Section) >= len(f.Sections) {
		return nil
	}
	at := r.addend + int64(s.Value)
	if r.pc() {
		at += 4 // counted from the end of the field (psABI 4.4.1)
	}
	sec := f.Sections[s.Section]
	if sec.Flags&elf.SHF_STRINGS != 0 {
		data, err := content(sec)
		if err != nil {
			return err
		}
		if at >= 0 && at < int64(len(data)) {
			text, _, _ := bytes.Cut(data[at:], []byte{0})
			r.text, r.isText = string(text), true
		}
		return nil
	}
	for _, in := range named[s.Section] {
		if at >= 0 && uint64(at) >= in.Value && uint64(at) < in.Value+in.Size {
			r.symbol, r.addend = in.Name, r.addend+int64(s.Value)-int64(in.Value)
			return nil
		}
	}
	return nil
}

// readRelocs groups the relocations by the section that they fill in.
func readRelocs(f *elf.File) (map[int][]reloc, error) {
	const entry = 24 // Elf64_Rela
	all := map[int][]reloc{}
	for _, s := range f.Sections {
		if s.Type != elf.SHT_RELA {
			continue
		}
		data, err := content(s)
		if err != nil {
			return nil, err
		}
		for ; len(data) >= entry; data = data[entry:] {
			info := binary.LittleEndian.Uint64(data[8:])
			r := reloc{
				off:    binary.LittleEndian.Uint64(data),
				kind:   elf.R_X86_64(info & 0xffffffff),
				addend: int64(binary.LittleEndian.Uint64(data[16:])),
				index:  1 << 40,
			}
			if n := info >> 32; n > 0 { // Symbols leaves out the null symbol
				r.index = int(n - 1)
			}
			all[int(s.Info)] = append(all[int(s.Info)], r)
		}
	}
	return all, nil
}

// sameRelocs compares what two functions refer to.
func sameRelocs(a, b []reloc) bool {
	return slices.EqualFunc(a, b, func(x, y reloc) bool {
		x.index, y.index = 0, 0
		return x == y
	})
}
