// SPDX-License-Identifier: Apache-2.0

package match

import (
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"klatch/internal/fault"
)

// Image is a vmlinux or a module of the distribution's, ready for comparison.
type Image struct {
	name     string // "vmlinux", or the module's
	module   bool
	sections []loaded
	byName   map[string][]symbol
	files    map[string]bool   // from FILE symbols; a stripped module has none
	relocs   map[uint64]filled // by place; of a module, which nobody has linked yet

	tracedOnce sync.Once
	traced     []uint64 // addresses that ftrace knows, sorted
}

type loaded struct {
	name string
	addr uint64
	data []byte
}

type symbol struct {
	addr, size uint64
	file       string // of the FILE symbol above it; empty for globals
	local      bool
	code       bool
	once       bool // of a module's part that is thrown away after its start
}

// filled is a relocation of a module: it refers to an address in the module,
// or to a symbol outside by name.
type filled struct {
	kind    elf.R_X86_64
	addr    uint64
	outside string
	addend  int64
}

// Limits of what is read. Debian's vmlinux has sections of up to 40 MiB and
// 120,000 symbols.
const (
	maxSection = 256 << 20 // bytes
	maxSymbols = 4 << 20
)

// apart is the distance between the sections of a module, which has no
// addresses yet: far enough that a 32-bit distance cannot lead from one to
// another.
const apart = 1 << 33

// Open reads a vmlinux with its symbol table.
func Open(path string) (*Image, error) {
	return open(path, "vmlinux", func(f *elf.File) error {
		if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
			return fault.New(fault.Invalid, "bad_object", "%s is not a linked kernel", path)
		}
		return nil
	})
}

// OpenModule reads a module as the distribution ships it: with local symbols,
// without FILE symbols, its relocations not applied.
func OpenModule(path, name string) (*Image, error) {
	return open(path, name, func(f *elf.File) error {
		if f.Type != elf.ET_REL {
			return fault.New(fault.Invalid, "bad_object", "%s is not a module", path)
		}
		return nil
	})
}

func open(path, name string, check func(*elf.File) error) (*Image, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", filepath.Base(path), err)
	}
	defer f.Close() //nolint:errcheck // opened for reading only
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return nil, fault.New(fault.Invalid, "bad_object", "%s is not of x86-64", path)
	}
	if err := check(f); err != nil {
		return nil, err
	}
	k := &Image{name: name, module: f.Type == elf.ET_REL, byName: map[string][]symbol{}, files: map[string]bool{}, relocs: map[uint64]filled{}}
	base := func(i int) uint64 {
		if f.Type == elf.ET_REL {
			return uint64(i) * apart
		}
		return 0
	}
	for i, s := range f.Sections {
		if s.Flags&elf.SHF_ALLOC == 0 || s.Type != elf.SHT_PROGBITS {
			continue
		}
		if s.Size > maxSection {
			return nil, fault.New(fault.Invalid, "bad_object", "section %s of %s has %d bytes", s.Name, path, s.Size)
		}
		data, err := s.Data()
		if err != nil {
			return nil, fmt.Errorf("read section %s of %s: %w", s.Name, path, err)
		}
		k.sections = append(k.sections, loaded{s.Name, base(i) + s.Addr, data})
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fmt.Errorf("read symbols of %s: %w", path, err)
	}
	if len(symbols) > maxSymbols {
		return nil, fault.New(fault.Invalid, "bad_object", "%s has %d symbols", path, len(symbols))
	}
	k.index(f, symbols, base)
	if f.Type == elf.ET_REL {
		return k, k.readRelocs(f, symbols, base)
	}
	return k, nil
}

func (k *Image) index(f *elf.File, symbols []elf.Symbol, base func(int) uint64) {
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
		sym := symbol{addr: s.Value, size: s.Size, local: local, code: elf.ST_TYPE(s.Info) == elf.STT_FUNC}
		if int(s.Section) < len(f.Sections) {
			sym.addr += base(int(s.Section))
			sym.once = k.module && strings.HasPrefix(f.Sections[s.Section].Name, ".init")
		}
		if local {
			sym.file = file
		}
		k.byName[s.Name] = append(k.byName[s.Name], sym)
	}
}

func (k *Image) readRelocs(f *elf.File, symbols []elf.Symbol, base func(int) uint64) error {
	all, err := readRelocs(f)
	if err != nil {
		return err
	}
	for section, relocs := range all {
		if section >= len(f.Sections) || f.Sections[section].Flags&elf.SHF_ALLOC == 0 {
			continue
		}
		for _, r := range relocs {
			x := filled{kind: r.kind, addend: r.addend}
			if r.index >= len(symbols) {
				continue
			}
			switch s := symbols[r.index]; {
			case s.Section == elf.SHN_UNDEF:
				x.outside = s.Name
			case int(s.Section) < len(f.Sections):
				x.addr = base(int(s.Section)) + s.Value
			default:
				x.addr = s.Value
			}
			k.relocs[base(section)+r.off] = x
		}
	}
	return nil
}

// Name is "vmlinux", or the module's name.
func (k *Image) Name() string { return k.name }

// HasFile says whether the kernel was linked from a source file of this name.
func (k *Image) HasFile(source string) bool { return k.files[filepath.Base(source)] }

// Position says which of all functions and variables of a name the one at an
// address is, from 1, as the kernel counts them (kernel/livepatch/core.c,
// klp_find_object_symbol): vmlinux's by address, because scripts/kallsyms.c
// sorts them; a module's in the order of its table. of is how many there are.
func (k *Image) Position(name string, addr uint64) (pos, of int) {
	all := slices.Clone(k.byName[name])
	if !k.module {
		slices.SortStableFunc(all, func(a, b symbol) int { return cmp.Compare(a.addr, b.addr) })
	}
	for i, s := range all {
		if s.addr == addr {
			return i + 1, len(all)
		}
	}
	return 0, len(all)
}

// Certain says whether the position of the one at an address is always that.
// It is not where two of the name lie there, or where a module throws one of
// them away after its start (kernel/module/kallsyms.c, is_core_symbol): then it
// depends on when the livepatch comes.
func (k *Image) Certain(name string, addr uint64) bool {
	all := k.byName[name]
	there := 0
	for _, s := range all {
		if s.addr == addr {
			there++
		}
	}
	return there == 1 && (len(all) == 1 || !slices.ContainsFunc(all, func(s symbol) bool { return s.once }))
}

// Count is how many functions and variables have a name.
func (k *Image) Count(name string) int { return len(k.byName[name]) }

// Spot is where a symbol lies in its section, and its size.
type Spot struct{ Value, Size uint64 }

// Spots lists the symbols of a name in the order of the table; sure says that
// none of them goes after the module's start.
func (k *Image) Spots(name string) (spots []Spot, sure bool) {
	sure = true
	for _, s := range k.byName[name] {
		value := s.addr
		if k.module {
			value %= apart
		}
		spots = append(spots, Spot{value, s.size})
		sure = sure && !s.once
	}
	return spots, sure
}

func (k *Image) bytes(addr, size uint64) []byte {
	for _, s := range k.sections {
		if addr >= s.addr && addr-s.addr <= uint64(len(s.data)) && size <= uint64(len(s.data))-(addr-s.addr) {
			return s.data[addr-s.addr:][:size]
		}
	}
	return nil
}

// text is the string at an address; ok is false where there is none.
func (k *Image) text(addr uint64) (text []byte, ok bool) {
	for _, s := range k.sections {
		if addr >= s.addr && addr-s.addr < uint64(len(s.data)) {
			text, _, found := bytes.Cut(s.data[addr-s.addr:], []byte{0})
			return text, found
		}
	}
	return nil, false
}

// refersTo is what a place in the image refers to: an address, with the addend
// in it, or a symbol outside with the addend apart.
func (k *Image) refersTo(place uint64, field []byte, pc bool) (to uint64, outside string, addend int64) {
	if r, ok := k.relocs[place]; ok {
		if r.outside != "" {
			return 0, r.outside, r.addend
		}
		return r.addr + uint64(r.addend), "", 0
	}
	if len(field) == 8 {
		to = binary.LittleEndian.Uint64(field)
	} else {
		to = uint64(int64(int32(binary.LittleEndian.Uint32(field))))
	}
	if pc {
		to += place
	}
	return to, "", 0
}
