// SPDX-License-Identifier: Apache-2.0

package klpbuild

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"klatch/internal/fault"
	"klatch/internal/forge/build/module"
	"klatch/internal/livepatch"
)

// contents is what a module made by klp-build says that it does.
type contents struct {
	replaced []replaced
	needs    []symbol
}

// replaced is one function that the module replaces.
type replaced struct {
	livepatch.Function
	pos uint64 // which of its name in the object, from 1; 0 where there is one only
}

// symbol is one that the kernel resolves when it loads the module.
type symbol struct {
	object, name string
	pos          uint64
}

func (c contents) functions() []livepatch.Function {
	var out []livepatch.Function
	for _, r := range c.replaced {
		out = append(out, r.Function)
	}
	slices.SortFunc(out, func(a, b livepatch.Function) int { return strings.Compare(a.String(), b.String()) })
	return slices.Compact(out)
}

// Layout of struct klp_object_ext and struct klp_func_ext, in bytes
// (include/linux/livepatch_external.h).
const (
	objectEntry = 64
	objectName  = 0
	objectFuncs = 8
	objectCount = 56
	funcEntry   = 24
	funcName    = 0
	funcPos     = 16

	maxFuncs  = 10_000
	symPrefix = ".klp.sym." // then object, dot, name, comma, position (module-elf-format.rst)
)

// readLivepatch reads a module's sections .init.klp_objects and
// .init.klp_funcs, of which its init code makes the list that it gives to the
// kernel, and the symbols that the kernel must resolve.
func readLivepatch(file []byte) (contents, error) {
	var c contents
	bad := func(format string, args ...any) (contents, error) {
		return contents{}, fault.New(fault.Internal, "bad_module", "module of klp-build: "+format, args...)
	}
	f, err := elf.NewFile(bytes.NewReader(file))
	if err != nil {
		return bad("%w", err)
	}
	symbols, err := f.Symbols()
	if err != nil {
		return bad("symbols: %w", err)
	}
	if c.needs, err = needed(symbols); err != nil {
		return bad("%w", err)
	}
	objects, at, err := entries(f, symbols, ".init.klp_objects")
	if err != nil {
		return bad("%w", err)
	}
	funcs, funcAt, err := entries(f, symbols, ".init.klp_funcs")
	if err != nil {
		return bad("%w", err)
	}
	for o := 0; o+objectEntry <= len(objects); o += objectEntry {
		object := "vmlinux"
		if to, ok := at[uint64(o+objectName)]; ok {
			if object, ok = text(f, to); !ok || object == "" {
				return bad("object at %#x has no name", o)
			}
		}
		first, ok := at[uint64(o+objectFuncs)]
		count := binary.LittleEndian.Uint32(objects[o+objectCount:])
		if !ok || count > maxFuncs {
			return bad("object %s has a list of %d functions", object, count)
		}
		for i := range uint64(count) {
			off := first.off + i*funcEntry
			if off > uint64(len(funcs)) || uint64(len(funcs))-off < funcEntry {
				return bad("object %s: function %d is outside of the list", object, i)
			}
			to, ok := funcAt[off+funcName]
			name := ""
			if ok {
				name, ok = text(f, to)
			}
			if !ok || name == "" {
				return bad("object %s: function %d has no name", object, i)
			}
			c.replaced = append(c.replaced, replaced{livepatch.Function{Object: object, Name: name}, binary.LittleEndian.Uint64(funcs[off+funcPos:])})
		}
	}
	return c, nil
}

// place is where a relocation leads to.
type place struct {
	section elf.SectionIndex
	off     uint64
}

// entries reads a section of pointers: its bytes, and where each pointer leads.
func entries(f *elf.File, symbols []elf.Symbol, name string) ([]byte, map[uint64]place, error) {
	s, rela := f.Section(name), f.Section(".rela"+name)
	if s == nil || rela == nil {
		return nil, nil, fmt.Errorf("no section %s", name)
	}
	if s.Size > maxFuncs*objectEntry || rela.Size > maxFuncs*objectEntry*2 {
		return nil, nil, fmt.Errorf("section %s has %d bytes", name, s.Size)
	}
	data, err := s.Data()
	if err != nil {
		return nil, nil, fmt.Errorf("section %s: %w", name, err)
	}
	relocs, err := rela.Data()
	if err != nil {
		return nil, nil, fmt.Errorf("section %s: %w", rela.Name, err)
	}
	to := map[uint64]place{}
	const entry = 24 // Elf64_Rela
	for ; len(relocs) >= entry; relocs = relocs[entry:] {
		sym := binary.LittleEndian.Uint64(relocs[8:]) >> 32
		if sym == 0 || sym > uint64(len(symbols)) {
			return nil, nil, fmt.Errorf("section %s names symbol %d", rela.Name, sym)
		}
		s := symbols[sym-1]
		to[binary.LittleEndian.Uint64(relocs)] = place{s.Section, s.Value + binary.LittleEndian.Uint64(relocs[16:])}
	}
	return data, to, nil
}

// text is the string at a place.
func text(f *elf.File, p place) (string, bool) {
	if int(p.section) >= len(f.Sections) || f.Sections[p.section].Size > 1<<20 {
		return "", false
	}
	data, err := f.Sections[p.section].Data()
	if err != nil || p.off >= uint64(len(data)) {
		return "", false
	}
	s, _, ok := bytes.Cut(data[p.off:], []byte{0})
	return string(s), ok
}

// needed lists the symbols that the kernel resolves by name and position.
func needed(symbols []elf.Symbol) ([]symbol, error) {
	var out []symbol
	for _, s := range symbols {
		rest, ok := strings.CutPrefix(s.Name, symPrefix)
		if !ok {
			continue
		}
		object, rest, ok1 := strings.Cut(rest, ".")
		comma := strings.LastIndexByte(rest, ',')
		if !ok1 || comma < 1 {
			return nil, fmt.Errorf("symbol %.100q has no object, name or position", s.Name)
		}
		pos, err := strconv.ParseUint(rest[comma+1:], 10, 32)
		if err != nil {
			return nil, fmt.Errorf("position of symbol %.100q: %w", s.Name, err)
		}
		out = append(out, symbol{object, rest[:comma], pos})
	}
	return out, nil
}

// inspect checks the finished module before anybody signs it: what it says of
// itself, and that it replaces what was proved and nothing else.
func (j *job) inspect() error {
	refusals, err := module.Inspect(j.module, j.plan)
	if err != nil {
		return err
	}
	for _, r := range refusals {
		j.refuse(r)
	}
	var proved []livepatch.Function
	for _, p := range j.result.Match.Replaced {
		proved = append(proved, livepatch.Function{Object: p.Object, Name: p.Function})
	}
	var have []livepatch.Function
	for _, r := range j.patch.replaced {
		have = append(have, r.Function)
	}
	byName := func(a, b livepatch.Function) int { return strings.Compare(a.String(), b.String()) }
	slices.SortFunc(proved, byName)
	slices.SortFunc(have, byName)
	if !slices.Equal(proved, have) {
		return fault.New(fault.Internal, "bad_module", "module replaces %q, proved were %q", have, proved)
	}
	return nil
}
