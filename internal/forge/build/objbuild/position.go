// SPDX-License-Identifier: Apache-2.0

package objbuild

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"klatch/internal/durable"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/livepatch"
)

// A livepatch names what it replaces and what it refers to by name and
// position among all symbols of that name (kernel/livepatch/core.c,
// klp_find_object_symbol). The kernel counts vmlinux's by address, variables
// and functions, local and global ones. The differ counts local ones in the
// order of the symbol table, which is the linker's: a wrong position replaces
// another function, or nothing. So all positions are counted again, from the
// address that was proved.

// Layouts of what the differ writes (kpatch-patch.h, kpatch-intermediate.h), in bytes.
const (
	funcEntry    = 56 // struct kpatch_patch_func
	funcNew      = 0  // relocated
	funcOld      = 16 // address in the object
	funcPosition = 32
	funcName     = 40 // relocated
	funcObject   = 48 // relocated

	symbolEntry    = 40 // struct kpatch_symbol
	symbolAddr     = 0
	symbolPosition = 8
	symbolName     = 24 // relocated
	symbolObject   = 32 // relocated
)

// table is one of the differ's tables, ready to be changed in place.
type table struct {
	entry   int
	data    []byte // in the file
	targets map[uint64]string
}

func (t table) len() int { return len(t.data) / t.entry }

func (t table) value(i, field int) uint64 {
	return binary.LittleEndian.Uint64(t.data[i*t.entry+field:])
}

func (t table) set(i, field int, v uint64) {
	binary.LittleEndian.PutUint64(t.data[i*t.entry+field:], v)
}

// text is what a relocated field of an entry leads to: a string or a function.
func (t table) text(i, field int) string { return t.targets[uint64(i*t.entry+field)] } //nolint:gosec // in a section

// readTable finds a table in a differ's output, or in the module made of it.
// One that is not there has no entries.
func readTable(object []byte, name string, entry int) (table, error) {
	t := table{entry: entry, targets: map[uint64]string{}}
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return t, fmt.Errorf("read the differ's output: %w", err)
	}
	sec, rela := f.Section(name), f.Section(".rela"+name)
	if sec == nil && rela == nil || sec != nil && sec.Size == 0 {
		return t, nil
	}
	end := uint64(len(object))
	if sec == nil || rela == nil || sec.Type != elf.SHT_PROGBITS || sec.Offset > end || sec.Size > end-sec.Offset || sec.Size%uint64(entry) != 0 { //nolint:gosec // a constant
		return t, fault.New(fault.Internal, "bad_module", "the differ's output has no usable %s", name)
	}
	t.data = object[sec.Offset:][:sec.Size]
	symbols, err := f.Symbols()
	if err != nil {
		return t, fmt.Errorf("read symbols of the differ's output: %w", err)
	}
	relocs, err := content(rela)
	if err != nil {
		return t, err
	}
	const relocEntry = 24 // Elf64_Rela
	for ; len(relocs) >= relocEntry; relocs = relocs[relocEntry:] {
		off := binary.LittleEndian.Uint64(relocs)
		sym := binary.LittleEndian.Uint64(relocs[8:]) >> 32
		addend := int64(binary.LittleEndian.Uint64(relocs[16:])) //nolint:gosec // two's complement
		if sym == 0 || sym > uint64(len(symbols)) {
			continue
		}
		if t.targets[off], err = leadsTo(f, symbols[sym-1], addend); err != nil {
			return t, err
		}
	}
	return t, nil
}

// content reads a section of an object; a compressed one may claim any size.
func content(s *elf.Section) ([]byte, error) {
	if s.Size > livepatch.MaxModule {
		return nil, fault.New(fault.Invalid, "bad_object", "section %s has %d bytes", s.Name, s.Size)
	}
	b, err := s.Data()
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_object", "read section %s: %w", s.Name, err)
	}
	return b, nil
}

// leadsTo is the name of a function, or the text of a string.
func leadsTo(f *elf.File, s elf.Symbol, addend int64) (string, error) {
	if int(s.Section) >= len(f.Sections) || s.Section == elf.SHN_UNDEF {
		return s.Name, nil
	}
	sec := f.Sections[s.Section]
	switch {
	case sec.Flags&elf.SHF_EXECINSTR != 0 && elf.ST_TYPE(s.Info) == elf.STT_SECTION:
		return strings.TrimPrefix(strings.TrimPrefix(sec.Name, ".text."), "unlikely."), nil
	case elf.ST_TYPE(s.Info) == elf.STT_FUNC:
		return s.Name, nil
	}
	text, err := content(sec)
	if err != nil {
		return "", err
	}
	at := addend + int64(s.Value) //nolint:gosec // checked next
	if at < 0 || at >= int64(len(text)) {
		return "", nil
	}
	name, _, _ := bytes.Cut(text[at:], []byte{0})
	return string(name), nil
}

// replacedFunctions reads which functions a differ's output, or the module made
// of it, replaces, each with its position. One that cannot be named is an
// error: nobody could prove it.
func replacedFunctions(object []byte) ([]replaced, error) {
	t, err := readTable(object, ".kpatch.funcs", funcEntry)
	if err != nil {
		return nil, err
	}
	var out []replaced
	for i := range t.len() {
		r := replaced{livepatch.Function{Object: t.text(i, funcObject), Name: t.text(i, funcName)}, int(t.value(i, funcPosition))} //nolint:gosec // small
		if r.Name == "" || r.Object == "" || t.text(i, funcNew) == "" {
			return nil, fault.New(fault.Internal, "bad_module", "the differ's output replaces %d functions, one of them without name or object", t.len())
		}
		out = append(out, r)
	}
	return out, nil
}

// replaced is a function that a livepatch replaces.
type replaced struct {
	livepatch.Function
	position int // 0 where the name is there once
}

func (r replaced) String() string { return fmt.Sprintf("%s,%d", r.Function, r.position) }

// place counts the positions of everything that the livepatch names anew and
// keeps the result beside the differ's output, out of its reach.
func (j *job) place() error {
	for _, o := range j.objects {
		if o.same {
			continue
		}
		diff, err := durable.ReadFile(j.diffFile(o), livepatch.MaxModule)
		if err != nil {
			return err
		}
		if err := j.placeFunctions(o, diff); err != nil {
			return err
		}
		if err := j.placeSymbols(o, diff); err != nil {
			return err
		}
		if err := j.write(j.placedFile(o), diff); err != nil {
			return err
		}
	}
	return nil
}

// placedFile is the differ's output with its positions counted again.
func (j *job) placedFile(o *object) string { return j.file("placed", o.flat()) }

func (j *job) placeFunctions(o *object, diff []byte) error {
	t, err := readTable(diff, ".kpatch.funcs", funcEntry)
	if err != nil {
		return err
	}
	image, err := j.image(j.tree, o.unit.Object)
	if err != nil {
		return err
	}
	for i := range t.len() {
		name := t.text(i, funcName)
		k := slices.IndexFunc(j.result.Match.Replaced, func(p match.Proved) bool {
			return p.Object == o.unit.Object && p.File == o.unit.Source && p.Function == name
		})
		if k < 0 {
			return fault.New(fault.Internal, "bad_module", "function %s of %s was not proved", name, o.unit.Source)
		}
		p := &j.result.Match.Replaced[k]
		if old := t.value(i, funcOld); o.unit.Object == vmlinux && old != p.Addr {
			return fault.New(fault.Internal, "bad_module", "the differ would replace %s at %#x, proved was the one at %#x", name, old, p.Addr)
		}
		pos, of := image.Position(name, p.Addr)
		switch {
		case pos == 0 || !image.Certain(name, p.Addr):
			j.refuseAmbiguous(o, name)
			return nil
		case of == 1:
			pos = 0
		}
		t.set(i, funcPosition, uint64(pos))
		p.Position = pos
	}
	return nil
}

// placeSymbols does the same for what the new code refers to.
func (j *job) placeSymbols(o *object, diff []byte) error {
	t, err := readTable(diff, ".kpatch.symbols", symbolEntry)
	if err != nil {
		return err
	}
	for i := range t.len() {
		name, object := t.text(i, symbolName), t.text(i, symbolObject)
		if name == "" || object == "" {
			return fault.New(fault.Internal, "bad_module", "the differ's output refers to a symbol without name or object")
		}
		image, err := j.image(j.tree, object)
		if err != nil {
			return err
		}
		if image.Count(name) == 1 {
			t.set(i, symbolPosition, 0)
			continue
		}
		var pos int
		var sure bool
		if object == vmlinux {
			addr := t.value(i, symbolAddr)
			pos, _ = image.Position(name, addr)
			sure = image.Certain(name, addr)
		} else {
			pos = int(t.value(i, symbolPosition)) //nolint:gosec // checked next
			if sure, err = j.sameOrder(image, object, name, pos); err != nil {
				return err
			}
		}
		if pos == 0 || !sure {
			j.refuseAmbiguous(o, name)
			return nil
		}
		t.set(i, symbolPosition, uint64(pos)) //nolint:gosec // a count
	}
	return nil
}

// sameOrder says whether the differ counted a module's symbols as the kernel
// does: its table is that of the debug information, where local symbols come
// before global ones as in the module (ELF, Symbol Table).
func (j *job) sameOrder(image *match.Image, object, name string, pos int) (bool, error) {
	want, sure := image.Spots(name)
	text, err := durable.ReadFile(j.tree.ModuleSymbols(object), maxSymbols)
	if err != nil {
		return false, err
	}
	var have []match.Spot
	locals := 0
	for line := range bytes.Lines(text) {
		w := strings.Fields(string(line)) // Num: Value Size Type Bind Vis Ndx Name
		if len(w) != 8 || w[7] != name || w[6] == "UND" {
			continue
		}
		value, err1 := strconv.ParseUint(w[1], 16, 64)
		size, err2 := strconv.ParseUint(w[2], 0, 64)
		if err := errors.Join(err1, err2); err != nil {
			return false, fault.New(fault.Internal, "bad_symbols", "symbols of %s: %w", object, err)
		}
		have = append(have, match.Spot{Value: value, Size: size})
		if w[4] == "LOCAL" {
			locals++
		}
	}
	return sure && pos >= 1 && pos <= locals && slices.Equal(have, want), nil
}

// maxSymbols limits the table of one module, in bytes.
const maxSymbols = 64 << 20

func (j *job) refuseAmbiguous(o *object, name string) {
	r := build.Refuse("ambiguous_symbol", o.unit.Source)
	r.Function = name
	r.Detail = fmt.Sprintf("%s has several symbols of the name %s", o.unit.Object, name)
	j.refuse(r)
}
