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
	f, err := elf.NewFile(bytes.NewReader(diff))
	if err != nil {
		return nil, fmt.Errorf("read the differ's output: %w", err)
	}
	symbols, err := readTable(f, ".kpatch.symbols", symbolEntry, symbolName)
	if err != nil {
		return nil, err
	}
	replaced, err := replacedFunctions(diff)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, s := range symbols {
		parent, ok := coldOf(s.name)
		if !ok || slices.Contains(out, s.name) {
			continue
		}
		for _, r := range replaced {
			if withoutNumber(r.Name) == withoutNumber(parent) {
				out = append(out, s.name)
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

// A .kpatch.symbols entry, struct kpatch_symbol of kpatch-intermediate.h, in
// bytes; its name is filled in by a relocation.
const (
	symbolEntry = 40
	symbolName  = 24
)

// entry is a row of one of the differ's tables.
type entry struct {
	name string
	data []byte
}

// readTable reads the rows of a table of the differ's, and the string that the
// relocation at an offset in each leads to.
func readTable(f *elf.File, section string, size, nameAt uint64) ([]entry, error) {
	table, rela := f.Section(section), f.Section(".rela"+section)
	if table == nil || rela == nil {
		return nil, nil
	}
	data, err := table.Data()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", section, err)
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fmt.Errorf("read symbols of the differ's output: %w", err)
	}
	relas, err := rela.Data()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", rela.Name, err)
	}
	out := make([]entry, uint64(len(data))/size)
	for i := range out {
		out[i].data = data[uint64(i)*size:][:size]
	}
	for ; len(relas) >= relaEntry; relas = relas[relaEntry:] {
		off, sym := binary.LittleEndian.Uint64(relas), binary.LittleEndian.Uint64(relas[8:])>>32
		if off%size != nameAt || off/size >= uint64(len(out)) || sym == 0 || sym > uint64(len(symbols)) || int(symbols[sym-1].Section) >= len(f.Sections) {
			continue
		}
		text, err := f.Sections[symbols[sym-1].Section].Data()
		if err != nil {
			return nil, fmt.Errorf("read names of %s: %w", section, err)
		}
		at := int64(binary.LittleEndian.Uint64(relas[16:])) + int64(symbols[sym-1].Value) //nolint:gosec // checked next
		if at >= 0 && at < int64(len(text)) {
			name, _, _ := bytes.Cut(text[at:], []byte{0})
			out[off/size].name = string(name)
		}
	}
	for _, e := range out {
		if e.name == "" {
			return nil, fault.New(fault.Internal, "bad_module", "the differ's output has an entry without a name in %s", section)
		}
	}
	return out, nil
}

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
