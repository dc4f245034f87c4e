// SPDX-License-Identifier: Apache-2.0

// Package match proves that a build environment reproduces the running
// kernel: every function of an object file, compiled unpatched, is compared
// byte by byte with the distribution's own vmlinux. Bytes that the linker
// fills in are compared by meaning: where a relocation names a symbol, the
// address in the kernel must be that symbol's.
//
// The kernel changes its text only while it runs (alternatives, jump labels,
// static calls, ftrace), so the bytes in the file are the compiler's.
package match

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"klatch/internal/fault"
)

// Difference is one function that is not what the kernel has.
type Difference struct {
	Object   string `json:"object"` // vmlinux or a module
	File     string `json:"file"`
	Function string `json:"function"`
	Replaced bool   `json:"replaced"` // it would be replaced; otherwise only told
	Why      string `json:"why"`
}

// Proved is one function to be replaced whose every byte is accounted for.
type Proved struct {
	Object      string `json:"object"` // vmlinux or a module
	File        string `json:"file"`
	Function    string `json:"function"`
	Bytes       int    `json:"bytes"`
	Relocations int    `json:"relocations"` // compared by symbol
}

// Setting is one part of the environment that is not the distribution's.
type Setting struct {
	Aspect string `json:"aspect"` // compiler, source, config or flags
	Want   string `json:"want"`
	Have   string `json:"have"`
}

// Report is the match figure of a build.
type Report struct {
	Checked     int          `json:"checked"`   // functions compared, all of the touched objects
	Identical   int          `json:"identical"` // of these
	Different   []Difference `json:"different"`
	Replaced    []Proved     `json:"replaced"`
	Environment []Setting    `json:"environment"` // what differs from the distribution's; a hint, not the proof
}

// Empty is a report of nothing, with lists that encode as empty.
func Empty() Report {
	return Report{Different: []Difference{}, Replaced: []Proved{}, Environment: []Setting{}}
}

// Image is a vmlinux ready for comparison.
type Image struct {
	sections []loaded
	byName   map[string][]symbol
	files    map[string]bool
}

type loaded struct {
	addr uint64
	data []byte
}

type symbol struct {
	addr, size uint64
	file       string // of the FILE symbol above it; empty for globals
	local      bool
}

// maxSection limits a section of vmlinux that is read, in bytes.
const maxSection = 256 << 20

// Open reads a vmlinux with its symbol table.
func Open(path string) (*Image, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open vmlinux: %w", err)
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	k := &Image{byName: map[string][]symbol{}, files: map[string]bool{}}
	for _, s := range f.Sections {
		if s.Flags&elf.SHF_EXECINSTR == 0 || s.Type != elf.SHT_PROGBITS || s.Size > maxSection {
			continue
		}
		data, err := s.Data()
		if err != nil {
			return nil, fmt.Errorf("read section %s of %s: %w", s.Name, path, err)
		}
		k.sections = append(k.sections, loaded{s.Addr, data})
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fmt.Errorf("read symbols of %s: %w", path, err)
	}
	file := ""
	for _, s := range symbols {
		local := elf.ST_BIND(s.Info) == elf.STB_LOCAL
		if elf.ST_TYPE(s.Info) == elf.STT_FILE {
			file = s.Name
			k.files[file] = true
			continue
		}
		if s.Name == "" || s.Section == elf.SHN_UNDEF {
			continue
		}
		sym := symbol{addr: s.Value, size: s.Size, local: local}
		if local {
			sym.file = file
		}
		k.byName[s.Name] = append(k.byName[s.Name], sym)
	}
	return k, nil
}

// HasFile says whether the kernel was linked from a source file of this name.
func (k *Image) HasFile(source string) bool { return k.files[filepath.Base(source)] }

func (k *Image) bytes(addr, size uint64) []byte {
	for _, s := range k.sections {
		if addr >= s.addr && addr-s.addr <= uint64(len(s.data)) && size <= uint64(len(s.data))-(addr-s.addr) {
			return s.data[addr-s.addr:][:size]
		}
	}
	return nil
}

// function is one function of an object file.
type function struct {
	name   string
	local  bool
	code   []byte
	relocs []reloc
}

type reloc struct {
	off    uint64 // in the function
	kind   elf.R_X86_64
	symbol string // empty where it names a section
	addend int64
}

// Object compares all functions of an object file, compiled from source
// unpatched and with the distribution's flags, with the kernel, and adds to
// the report. replaced lists those that a livepatch would replace: the caller
// must refuse if one of them is in Different.
func (k *Image) Object(path, source string, replaced []string, r *Report) error {
	functions, err := readObject(path)
	if err != nil {
		return err
	}
	left := slices.Clone(replaced)
	for _, f := range functions {
		must := slices.Contains(replaced, f.name)
		left = slices.DeleteFunc(left, func(n string) bool { return n == f.name })
		n, why := k.compare(f, filepath.Base(source))
		r.Checked++
		if why != "" {
			r.Different = append(r.Different, Difference{"vmlinux", source, f.name, must, why})
			continue
		}
		r.Identical++
		if must {
			r.Replaced = append(r.Replaced, Proved{"vmlinux", source, f.name, len(f.code), n})
		}
	}
	for _, n := range left {
		r.Different = append(r.Different, Difference{"vmlinux", source, n, true, "the unpatched object has no such function"})
	}
	return nil
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
		if ok && (!bytes.Equal(old.code, f.code) || !slices.Equal(old.relocs, f.relocs)) {
			out = append(out, f.name)
		}
	}
	return out, nil
}

// compare returns the number of relocations compared by symbol, and why the
// function is not the kernel's, or "".
func (k *Image) compare(f function, file string) (int, string) {
	var candidates []symbol
	for _, s := range k.byName[f.name] {
		if !f.local || s.local && s.file == file {
			candidates = append(candidates, s)
		}
	}
	if len(candidates) == 0 {
		return 0, "the kernel has no function of this name from this file"
	}
	matches, relocs, why := 0, 0, ""
	for _, c := range candidates {
		n, w := k.compareAt(f, c)
		if w == "" {
			matches++
			relocs = n
		} else if why == "" {
			why = w
		}
	}
	switch {
	case matches == 1:
		return relocs, ""
	case matches > 1:
		return 0, fmt.Sprintf("the kernel has %d identical functions of this name from files of this name", matches)
	}
	return 0, why
}

func (k *Image) compareAt(f function, c symbol) (int, string) {
	if c.size != uint64(len(f.code)) {
		return 0, fmt.Sprintf("%d bytes, the kernel's has %d", len(f.code), c.size)
	}
	theirs := k.bytes(c.addr, c.size)
	if theirs == nil {
		return 0, fmt.Sprintf("address %#x is in no code section of the kernel", c.addr)
	}
	ours := bytes.Clone(f.code)
	named := 0
	for _, r := range f.relocs {
		width := relocWidth(r.kind)
		if width == 0 || r.off+uint64(width) > uint64(len(ours)) {
			return 0, fmt.Sprintf("relocation %s at +%#x cannot be compared", r.kind, r.off)
		}
		field := theirs[r.off:][:width]
		copy(ours[r.off:], field)
		ok, known := k.pointsTo(field, c.addr+r.off, r)
		if known && !ok {
			return 0, fmt.Sprintf("at +%#x the kernel does not refer to %s", r.off, r.symbol)
		}
		if !known && r.symbol != "" { // the kernel cannot refer to what it does not have
			return 0, fmt.Sprintf("at +%#x it refers to %s, which the kernel does not have", r.off, r.symbol)
		}
		if known {
			named++
		}
	}
	for i := range ours {
		if ours[i] != theirs[i] {
			return 0, fmt.Sprintf("differs at +%#x of %d bytes", i, len(ours))
		}
	}
	return named, ""
}

// relocWidth is the number of bytes that a relocation fills in, 0 for a type
// that does not occur in x86-64 kernel text (psABI, table 4.9).
func relocWidth(t elf.R_X86_64) int {
	switch t {
	case elf.R_X86_64_PC32, elf.R_X86_64_PLT32, elf.R_X86_64_32, elf.R_X86_64_32S:
		return 4
	case elf.R_X86_64_64, elf.R_X86_64_PC64:
		return 8
	default:
		return 0
	}
}

// pointsTo says whether the filled-in field refers to the relocation's symbol;
// known is false where the symbol has no name to look up.
func (k *Image) pointsTo(field []byte, place uint64, r reloc) (ok, known bool) {
	targets := k.byName[r.symbol]
	if r.symbol == "" || len(targets) == 0 {
		return false, false
	}
	var value uint64
	if len(field) == 8 {
		value = binary.LittleEndian.Uint64(field)
	} else {
		value = uint64(int64(int32(binary.LittleEndian.Uint32(field))))
	}
	value -= uint64(r.addend)
	if r.kind == elf.R_X86_64_PC32 || r.kind == elf.R_X86_64_PLT32 || r.kind == elf.R_X86_64_PC64 {
		value += place
	}
	mask := ^uint64(0)
	if r.kind == elf.R_X86_64_32 {
		mask = 0xffffffff
	}
	return slices.ContainsFunc(targets, func(s symbol) bool { return s.addr&mask == value&mask }), true
}

// readObject reads the functions of a relocatable object, without those that
// the kernel throws away after boot: they cannot be compared in memory and are
// never replaced.
func readObject(path string) ([]function, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open object: %w", err)
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 || f.Type != elf.ET_REL {
		return nil, fault.New(fault.Invalid, "bad_object", "%s is not an x86-64 object file", path)
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fmt.Errorf("read symbols of %s: %w", path, err)
	}
	relocs, err := readRelocs(f, symbols)
	if err != nil {
		return nil, fmt.Errorf("read relocations of %s: %w", path, err)
	}
	var out []function
	for _, s := range symbols {
		if elf.ST_TYPE(s.Info) != elf.STT_FUNC || int(s.Section) >= len(f.Sections) || s.Section == elf.SHN_UNDEF || s.Size == 0 {
			continue
		}
		sec := f.Sections[s.Section]
		if sec.Flags&elf.SHF_EXECINSTR == 0 || strings.HasPrefix(sec.Name, ".init") || strings.HasPrefix(sec.Name, ".exit") {
			continue
		}
		data, err := sec.Data()
		if err != nil {
			return nil, fmt.Errorf("read section %s of %s: %w", sec.Name, path, err)
		}
		if s.Value > uint64(len(data)) || s.Size > uint64(len(data))-s.Value {
			return nil, fault.New(fault.Invalid, "bad_object", "function %s of %s is outside its section", s.Name, path)
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

// readRelocs groups the relocations by the section that they fill in.
func readRelocs(f *elf.File, symbols []elf.Symbol) (map[int][]reloc, error) {
	const entry = 24 // Elf64_Rela
	all := map[int][]reloc{}
	for _, s := range f.Sections {
		if s.Type != elf.SHT_RELA {
			continue
		}
		data, err := s.Data()
		if err != nil {
			return nil, err
		}
		for ; len(data) >= entry; data = data[entry:] {
			info := binary.LittleEndian.Uint64(data[8:])
			r := reloc{
				off:    binary.LittleEndian.Uint64(data),
				kind:   elf.R_X86_64(info & 0xffffffff),
				addend: int64(binary.LittleEndian.Uint64(data[16:])),
			}
			// Symbols leaves out the null symbol, so index n is at n-1.
			if n := info >> 32; n > 0 && n <= uint64(len(symbols)) {
				if sym := symbols[n-1]; elf.ST_TYPE(sym.Info) != elf.STT_SECTION {
					r.symbol = sym.Name
				}
			}
			all[int(s.Info)] = append(all[int(s.Info)], r)
		}
	}
	return all, nil
}

// OpenModule is not there yet.
func OpenModule(path, name string) (*Image, error) {
	return nil, fault.New(fault.Internal, "todo", "%s %s", path, name)
}
