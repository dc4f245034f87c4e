// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"klatch/internal/fault"
)

// The compiler moves what is rarely run out of a function F into a part of its
// own, F.cold, which jumps back into F. Where only F changes the differ lets
// the new F jump to the kernel's own F.cold, and that jumps back into the old
// F: the fix would be lost on this path, without a word (seen with
// create-diff-object 0.9.10; cold_vm_test.go). So such a part must come along.
// The differ takes it along where it differs, so it gets to see an unpatched
// object in which it does. That object is for comparison only: what goes into
// the livepatch is the patched one.

// leftBehind lists the cold parts of replaced functions that a differ's output
// expects in the kernel.
func leftBehind(diff []byte) ([]string, error) {
	symbols, err := readTable(diff, ".kpatch.symbols", symbolEntry)
	if err != nil {
		return nil, err
	}
	functions, err := replacedFunctions(diff)
	if err != nil {
		return nil, err
	}
	var out []string
	for i := range symbols.len() {
		name := symbols.text(i, symbolName)
		parent, ok := coldOf(name)
		if !ok || slices.Contains(out, name) {
			continue
		}
		for _, r := range functions {
			if withoutNumber(r.Name) == withoutNumber(parent) {
				out = append(out, name)
				break
			}
		}
	}
	return out, nil
}

// coldOf names the function that a cold part belongs to.
func coldOf(name string) (parent string, ok bool) {
	i := strings.LastIndex(name, ".cold")
	if i < 0 || strings.Trim(name[i+len(".cold"):], ".0123456789") != "" {
		return "", false
	}
	return name[:i], true
}

func withoutNumber(name string) string { return strings.TrimRight(name, ".0123456789") }

const relaEntry = 24 // Elf64_Rela

// differing returns an object in which the cold parts differ from what they
// are: one reference of each leads one byte further. A part that nothing leads
// back from is left alone; one that cannot be made to differ is listed.
func differing(object []byte, parts []string) (changed []byte, left []string, err error) {
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return nil, nil, fmt.Errorf("read object: %w", err)
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, nil, fmt.Errorf("read symbols: %w", err)
	}
	changed = bytes.Clone(object)
	for _, p := range parts {
		parent, _ := coldOf(p)
		own, home := -1, -1
		for _, s := range symbols {
			if s.Name == p {
				own = int(s.Section)
			}
			if s.Name == parent {
				home = int(s.Section)
			}
		}
		if own < 0 || home < 0 || own >= len(f.Sections) || home >= len(f.Sections) {
			return nil, nil, fault.New(fault.Internal, "bad_object", "the unpatched object has no %s", p)
		}
		back, err := leadsBack(f, symbols, own, home)
		if err != nil {
			return nil, nil, err
		}
		if back < 0 {
			tables, err := jumps(f, symbols, own)
			if err != nil {
				return nil, nil, err
			}
			if tables { // back by a jump label, which no byte of the part shows
				left = append(left, p)
			}
			continue
		}
		binary.LittleEndian.PutUint64(changed[back:], binary.LittleEndian.Uint64(changed[back:])+1)
	}
	return changed, left, nil
}

// leadsBack is where in the file the addend of a relocation lies by which one
// section refers to another; -1 if none does.
func leadsBack(f *elf.File, symbols []elf.Symbol, own, home int) (int64, error) {
	for _, s := range f.Sections {
		if s.Type != elf.SHT_RELA || int(s.Info) != own {
			continue
		}
		data, err := s.Data()
		if err != nil {
			return -1, fmt.Errorf("read %s: %w", s.Name, err)
		}
		for i := 0; i+relaEntry <= len(data); i += relaEntry {
			n := binary.LittleEndian.Uint64(data[i+8:]) >> 32
			if n > 0 && n <= uint64(len(symbols)) && int(symbols[n-1].Section) == home {
				return int64(s.Offset) + int64(i) + 16, nil //nolint:gosec // of a file that was read
			}
		}
	}
	return -1, nil
}

// jumps says whether a section has jump labels.
func jumps(f *elf.File, symbols []elf.Symbol, own int) (bool, error) {
	s := f.Section(".rela__jump_table")
	if s == nil {
		return false, nil
	}
	data, err := s.Data()
	if err != nil {
		return false, fmt.Errorf("read %s: %w", s.Name, err)
	}
	for ; len(data) >= relaEntry; data = data[relaEntry:] {
		n := binary.LittleEndian.Uint64(data[8:]) >> 32
		if n > 0 && n <= uint64(len(symbols)) && int(symbols[n-1].Section) == own {
			return true, nil
		}
	}
	return false, nil
}
