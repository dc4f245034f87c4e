// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/livepatch"
)

// Functions that the headers call inline are not traced (include/linux/
// compiler_types.h, inline), and the compiler makes some of them functions of
// their own. The kernel cannot redirect those. But all that call one are in
// the same object file: the livepatch replaces them, and they call its own
// copy. For the differ this is a new function and callers that changed, so the
// copy gets a new name in the patched object.

// privatePrefix is put before the name of a function that the livepatch keeps
// to itself.
const privatePrefix = "klatch_"

// paddingPrefix begins the names that objtool gives to the no-ops before a
// function (tools/objtool/elf.c, elf_create_prefix_symbol).
const paddingPrefix = "__pfx_"

// detach finds the changed functions of every object that cannot be
// redirected, and names them anew.
func (j *job) detach() error {
	for _, o := range j.objects {
		if o.same {
			continue
		}
		changed, err := match.Changed(o.original, o.patched)
		if err != nil {
			return err
		}
		original, err := durable.ReadFile(o.original, livepatch.MaxModule)
		if err != nil {
			return err
		}
		patched, err := durable.ReadFile(o.patched, livepatch.MaxModule)
		if err != nil {
			return err
		}
		before, err := readCalls(original)
		if err != nil {
			return fmt.Errorf("read %s: %w", o.unit.Target, err)
		}
		after, err := readCalls(patched)
		if err != nil {
			return fmt.Errorf("read %s: %w", o.unit.Target, err)
		}
		names := private(before, after, changed)
		if len(names) == 0 {
			continue
		}
		renamed, err := renameFunctions(patched, names)
		if err != nil {
			return fmt.Errorf("rename in %s: %w", o.unit.Target, err)
		}
		o.patched = j.file("detached", o.flat())
		if err := j.write(o.patched, renamed); err != nil {
			return err
		}
		for _, n := range names {
			r := build.Refuse("callers_replaced", o.unit.Source)
			r.Function = n
			r.Detail = "replaced are " + strings.Join(after.callersOf(names), ", ")
			j.warn(r)
		}
	}
	return nil
}

// calls is who refers to whom in an object file.
type calls struct {
	functions map[string]*caller
	data      map[string]bool // functions that variables refer to
}

type caller struct {
	local, traced bool
	state         bool // it has variables of its own that live on
	refers        map[string]bool
}

// callersOf lists the functions that refer to some of the given ones.
func (c calls) callersOf(names []string) []string {
	var out []string
	for _, n := range slices.Sorted(maps.Keys(c.functions)) {
		for _, to := range names {
			if c.functions[n].refers[to] && !slices.Contains(names, n) {
				out = append(out, n)
				break
			}
		}
	}
	return out
}

// private lists the functions that must become private copies, sorted; none
// where that is impossible for one of them, and the differ says why.
func private(before, after calls, changed []string) []string {
	var todo []string
	hidden := func(n string) bool {
		old, is := before.functions[n], after.functions[n]
		return old != nil && is != nil && old.local && is.local && !old.traced && !is.traced && !part(n)
	}
	for _, n := range changed {
		if hidden(n) {
			todo = append(todo, n)
		}
	}
	for i := 0; i < len(todo); i++ {
		n := todo[i]
		if after.data[n] || before.data[n] || after.functions[n].state || before.functions[n].state {
			return nil
		}
		for _, by := range after.callersOf(todo[i : i+1]) {
			if hidden(by) && !slices.Contains(todo, by) {
				todo = append(todo, by)
			}
		}
	}
	slices.Sort(todo)
	return todo
}

// part says whether a symbol is a part of another function, which the
// compiler moved away from it.
func part(n string) bool { return strings.Contains(n, ".cold") }

func readCalls(object []byte) (calls, error) {
	c := calls{map[string]*caller{}, map[string]bool{}}
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return c, fault.New(fault.Invalid, "bad_object", "read object file: %w", err)
	}
	symbols, err := f.Symbols()
	if err != nil {
		return c, fault.New(fault.Invalid, "bad_object", "read symbols: %w", err)
	}
	bySection := map[int]string{} // one function in each section
	for _, s := range symbols {
		if elf.ST_TYPE(s.Info) != elf.STT_FUNC || int(s.Section) >= len(f.Sections) || s.Section == elf.SHN_UNDEF ||
			strings.HasPrefix(s.Name, paddingPrefix) {
			continue
		}
		whole, _, _ := strings.Cut(s.Name, ".cold")
		bySection[int(s.Section)] = whole
		if c.functions[whole] == nil {
			c.functions[whole] = &caller{refers: map[string]bool{}}
		}
		if whole == s.Name {
			c.functions[whole].local = elf.ST_BIND(s.Info) == elf.STB_LOCAL
		}
	}
	for _, rela := range f.Sections {
		if rela.Type != elf.SHT_RELA || int(rela.Info) >= len(f.Sections) {
			continue
		}
		from := f.Sections[rela.Info]
		if from.Flags&elf.SHF_ALLOC == 0 {
			continue
		}
		data, err := content(rela)
		if err != nil {
			return c, err
		}
		by := c.functions[bySection[int(rela.Info)]]
		const entry = 24 // Elf64_Rela
		for ; len(data) >= entry; data = data[entry:] {
			n := binary.LittleEndian.Uint64(data[8:]) >> 32
			if n == 0 || n > uint64(len(symbols)) {
				continue
			}
			s := symbols[n-1]
			to, _, _ := strings.Cut(s.Name, ".cold")
			inObject := int(s.Section) < len(f.Sections) && s.Section != elf.SHN_UNDEF
			if elf.ST_TYPE(s.Info) == elf.STT_SECTION && inObject {
				to = bySection[int(s.Section)]
			}
			switch {
			case by != nil && to == "__fentry__":
				by.traced = true
			case by != nil:
				by.refers[to] = true
				by.state = by.state || inObject && ownVariable(s, f.Sections[s.Section])
			case strings.HasPrefix(from.Name, ".data") || strings.HasPrefix(from.Name, ".rodata"):
				c.data[to] = true
			}
		}
	}
	return c, nil
}

// ownVariable says whether a symbol is a static local that keeps a value: the
// compiler gives it a number, and -fdata-sections a section.
func ownVariable(s elf.Symbol, sec *elf.Section) bool {
	writable := strings.HasPrefix(sec.Name, ".data.") || strings.HasPrefix(sec.Name, ".bss.")
	if !writable || strings.HasPrefix(sec.Name, ".data.once") || strings.HasPrefix(sec.Name, ".data..once") {
		return false
	}
	i := strings.LastIndexByte(sec.Name, '.')
	number := sec.Name[i+1:]
	return number != "" && strings.Trim(number, "0123456789") == "" && elf.ST_BIND(s.Info) == elf.STB_LOCAL
}

// renameFunctions gives functions of a relocatable object the private prefix:
// their symbols, those of their parts, and their sections. New string tables
// go to the end of the file; nothing else moves.
func renameFunctions(object []byte, names []string) ([]byte, error) {
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_object", "read object file: %w", err)
	}
	var head elf.Header64
	if err := binary.Read(bytes.NewReader(object), binary.LittleEndian, &head); err != nil || f.Class != elf.ELFCLASS64 ||
		head.Shentsize != 64 || int(head.Shnum) != len(f.Sections) || int(head.Shstrndx) >= len(f.Sections) {
		return nil, fault.New(fault.Invalid, "bad_object", "not a plain 64-bit object file")
	}
	out := bytes.Clone(object)
	tables := map[int][]byte{} // grown string tables
	text := func(table int) ([]byte, error) {
		if b, ok := tables[table]; ok {
			return b, nil
		}
		if table >= len(f.Sections) {
			return nil, fault.New(fault.Invalid, "bad_object", "no string table %d", table)
		}
		b, err := content(f.Sections[table])
		return bytes.Clone(b), err
	}
	rename := func(table int, at uint64, name string) error {
		b, err := text(table)
		if err != nil {
			return err
		}
		if at+4 > uint64(len(out)) {
			return fault.New(fault.Invalid, "bad_object", "a name outside the file")
		}
		binary.LittleEndian.PutUint32(out[at:], uint32(len(b))) //nolint:gosec // below the file's size
		tables[table] = append(append(b, name...), 0)
		return nil
	}
	for i, s := range f.Sections {
		if s.Type == elf.SHT_SYMTAB {
			symbols, err := f.Symbols()
			if err != nil {
				return nil, fault.New(fault.Invalid, "bad_object", "read symbols: %w", err)
			}
			for n, sym := range symbols {
				name, padding := strings.CutPrefix(sym.Name, paddingPrefix)
				whole, _, _ := strings.Cut(name, ".cold")
				if elf.ST_TYPE(sym.Info) != elf.STT_FUNC || !slices.Contains(names, whole) {
					continue
				}
				if name = privatePrefix + name; padding {
					name = paddingPrefix + name
				}
				if err := rename(int(s.Link), s.Offset+uint64(n+1)*24, name); err != nil { // Elf64_Sym has 24 bytes
					return nil, err
				}
			}
		}
		if name, ok := privateSection(s.Name, names); ok {
			if err := rename(int(head.Shstrndx), head.Shoff+uint64(i)*64, name); err != nil {
				return nil, err
			}
		}
	}
	for _, t := range slices.Sorted(maps.Keys(tables)) {
		header := out[head.Shoff+uint64(t)*64:] //nolint:gosec // an index that was checked
		binary.LittleEndian.PutUint64(header[24:], uint64(len(out)))
		binary.LittleEndian.PutUint64(header[32:], uint64(len(tables[t])))
		out = append(out, tables[t]...)
	}
	return out, nil
}

// privateSection is the new name of a function's section, or of its
// relocations.
func privateSection(section string, names []string) (string, bool) {
	rest, rela := strings.CutPrefix(section, ".rela")
	for _, prefix := range []string{".text.unlikely.", ".text."} {
		n, ok := strings.CutPrefix(rest, prefix)
		whole, _, _ := strings.Cut(n, ".cold")
		if !ok || !slices.Contains(names, whole) {
			continue
		}
		name := prefix + privatePrefix + n
		if rela {
			name = ".rela" + name
		}
		return name, true
	}
	return "", false
}
