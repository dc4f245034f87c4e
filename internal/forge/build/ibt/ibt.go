// SPDX-License-Identifier: Apache-2.0

// Package ibt knows which functions of a kernel may be called by address.
//
// A kernel with indirect branch tracking (CONFIG_X86_KERNEL_IBT) takes, at
// boot, the landing pad away from each function whose address nothing in the
// kernel takes: objtool lists them in .ibt_endbr_seal. A call by address of
// such a function ends in a fault on processors with that feature, and works
// on all others, so that no test elsewhere would show it.
//
// Start with Sealed and Taken.
package ibt

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"klatch/internal/fault"
)

const (
	sealSection = ".ibt_endbr_seal"
	maxSection  = 256 << 20
	relaEntry   = 24 // Elf64_Rela
	sealEntry   = 4  // a PC-relative address
)

// Sealed lists the functions, by name, of a vmlinux or module that must not be
// called by address. Several functions may share a name; then one is enough.
func Sealed(f *elf.File) (map[string]bool, error) {
	out := map[string]bool{}
	seal := f.Section(sealSection)
	if seal == nil {
		return out, nil
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fmt.Errorf("read symbols: %w", err)
	}
	type place struct {
		section elf.SectionIndex // none in a linked kernel, whose addresses are absolute
		at      uint64
	}
	functions := map[place][]string{}
	for _, s := range symbols {
		if elf.ST_TYPE(s.Info) != elf.STT_FUNC {
			continue
		}
		p := place{at: s.Value}
		if f.Type == elf.ET_REL {
			p.section = s.Section
		}
		functions[p] = append(functions[p], s.Name)
	}
	add := func(p place) {
		for _, n := range functions[p] {
			out[n] = true
		}
	}
	if f.Type != elf.ET_REL {
		data, err := contents(seal)
		if err != nil {
			return nil, err
		}
		for i := 0; i+sealEntry <= len(data); i += sealEntry {
			rel := int64(int32(binary.LittleEndian.Uint32(data[i:]))) //nolint:gosec // two's complement
			add(place{at: seal.Addr + uint64(i) + uint64(rel)})       //nolint:gosec // wraps as the kernel's own sum does
		}
		return out, nil
	}
	err = relocations(f, sealSection, symbols, func(_ elf.R_X86_64, s elf.Symbol, addend int64) {
		add(place{s.Section, s.Value + uint64(addend)}) //nolint:gosec // as above
	})
	return out, err
}

// Taken lists the functions whose address an object takes, by name. A function
// in a section of its own is named by the section, as with -ffunction-sections.
func Taken(object []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_object", "read ELF: %w", err)
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fmt.Errorf("read symbols: %w", err)
	}
	var out []string
	for _, sec := range f.Sections {
		if sec.Flags&elf.SHF_ALLOC == 0 || notForCalls(sec.Name) {
			continue
		}
		err := relocations(f, sec.Name, symbols, func(kind elf.R_X86_64, s elf.Symbol, _ int64) {
			if kind == elf.R_X86_64_PLT32 { // a direct call or jump
				return
			}
			t := elf.ST_TYPE(s.Info)
			if t == elf.STT_FUNC || t == elf.STT_NOTYPE { // undefined ones have no type
				out = append(out, s.Name)
			}
			if t == elf.STT_SECTION && int(s.Section) < len(f.Sections) {
				if n, ok := strings.CutPrefix(f.Sections[s.Section].Name, ".text."); ok {
					out = append(out, n)
				}
			}
		})
		if err != nil {
			return nil, err
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// notForCalls says whether a section holds addresses of code that nobody calls
// (tools/objtool/check.c, validate_ibt: the same list).
func notForCalls(name string) bool {
	for _, p := range []string{".discard", ".debug", ".eh_frame", ".altinstructions", ".ibt_endbr_seal", ".orc_unwind_ip", ".parainstructions",
		".retpoline_sites", ".return_sites", ".call_sites", ".smp_locks", ".static_call_sites", "_error_injection_whitelist",
		"_kprobe_blacklist", "__bug_table", "__ex_table", "__jump_table", "__mcount_loc", "__tracepoints", "__patchable_function_entries"} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

// relocations calls each for every relocation of a section.
func relocations(f *elf.File, section string, symbols []elf.Symbol, each func(elf.R_X86_64, elf.Symbol, int64)) error {
	for i, rela := range f.Sections {
		if rela.Type != elf.SHT_RELA || int(rela.Info) >= len(f.Sections) || f.Sections[rela.Info].Name != section {
			continue
		}
		data, err := contents(f.Sections[i])
		if err != nil {
			return err
		}
		for ; len(data) >= relaEntry; data = data[relaEntry:] {
			info := binary.LittleEndian.Uint64(data[8:])
			if n := info >> 32; n > 0 && n <= uint64(len(symbols)) {
				each(elf.R_X86_64(uint32(info)), symbols[n-1], int64(binary.LittleEndian.Uint64(data[16:]))) //nolint:gosec // low half; two's complement
			}
		}
	}
	return nil
}

func contents(s *elf.Section) ([]byte, error) {
	if s.Size > maxSection {
		return nil, fault.New(fault.Invalid, "bad_object", "section %s has %d bytes", s.Name, s.Size)
	}
	b, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("read section %s: %w", s.Name, err)
	}
	return b, nil
}
