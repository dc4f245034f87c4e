// SPDX-License-Identifier: Apache-2.0

package source

import (
	"bytes"
	"debug/dwarf"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"slices"

	"klatch/internal/fault"
	"klatch/internal/forge/queue"
)

// tables is what the module's data says to the kernel: struct klp_patch and
// all that it leads to. It is read from the linked module with debug
// information, which has the layout of the structures of this very kernel.
type tables struct {
	Replace   bool
	Functions []entry
	Callbacks []queue.Callback // in the order of objects

	ranges []span // where the tables lie
	starts span   // struct klp_patch itself
}

// entry is one struct klp_func.
type entry struct {
	Object, Name string
	Position     uint64
	New          string // symbol of the new function
}

// span is a range of a section.
type span struct {
	section  int
	from, to uint64
}

func (s span) holds(section int, at uint64) bool {
	return s.section == section && at >= s.from && at < s.to
}

// shapeError says what of the module's form is not as we read it: the author
// must change it.
type shapeError struct{ why string }

func (e shapeError) Error() string { return e.why }

func shapef(format string, args ...any) error { return shapeError{fmt.Sprintf(format, args...)} }

// Limits of what is read of a module.
const (
	maxEntries  = 4096
	maxSections = 4096
	maxText     = 1 << 20 // bytes of a string or name section's part
	maxDIEs     = 4 << 20
)

// layout is the place of the members that we read, from debug information.
type layout struct {
	patch, object, function, callbacks int64 // sizes
	members                            map[string]int64
}

// file is a module, open for reading.
type file struct {
	*elf.File
	symbols []elf.Symbol
	data    map[int][]byte
	relocs  map[int][]reloc // by the section that they fill in, by offset
	info    *dwarf.Data
}

type reloc struct {
	off     uint64
	kind    elf.R_X86_64
	symbol  string // of an undefined symbol
	section int    // of a defined one, or 0
	at      int64  // in that section, addend included
}

func openModule(b []byte) (*file, error) {
	bad := func(format string, args ...any) (*file, error) {
		return nil, fault.New(fault.Internal, "bad_module", "module: "+format, args...)
	}
	e, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return bad("%w", err)
	}
	if e.Type != elf.ET_REL || e.Class != elf.ELFCLASS64 || e.Machine != elf.EM_X86_64 || len(e.Sections) > maxSections {
		return bad("not a module of x86-64")
	}
	for _, s := range e.Sections { // a file that says more than it has
		if s.Flags&elf.SHF_COMPRESSED != 0 || s.Type != elf.SHT_NOBITS && (s.FileSize > uint64(len(b)) || s.Size > uint64(len(b))) {
			return bad("section %.60q has %d bytes", s.Name, s.Size)
		}
	}
	f := &file{File: e, data: map[int][]byte{}, relocs: map[int][]reloc{}}
	if f.symbols, err = e.Symbols(); err != nil {
		return bad("symbols: %w", err)
	}
	for i, s := range e.Sections {
		if s.Type == elf.SHT_RELA {
			if err := f.readRelocs(s); err != nil {
				return bad("%s: %w", s.Name, err)
			}
		}
		if s.Flags&elf.SHF_ALLOC != 0 && s.Type == elf.SHT_PROGBITS {
			if f.data[i], err = s.Data(); err != nil {
				return bad("%s: %w", s.Name, err)
			}
		}
	}
	if f.info, err = e.DWARF(); err != nil {
		return bad("debug information: %w", err)
	}
	return f, nil
}

func (f *file) readRelocs(s *elf.Section) error {
	to := int(s.Info)
	if to >= len(f.Sections) || f.Sections[to].Flags&elf.SHF_ALLOC == 0 {
		return nil // of debug information
	}
	data, err := s.Data()
	if err != nil {
		return err
	}
	const size = 24 // Elf64_Rela
	for ; len(data) >= size; data = data[size:] {
		info := binary.LittleEndian.Uint64(data[8:])
		r := reloc{off: binary.LittleEndian.Uint64(data), kind: elf.R_X86_64(info & 0xffffffff),
			at: int64(binary.LittleEndian.Uint64(data[16:]))} //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
		n := info >> 32
		if n == 0 || n > uint64(len(f.symbols)) {
			continue
		}
		sym := f.symbols[n-1]
		if int(sym.Section) < len(f.Sections) && sym.Section != elf.SHN_UNDEF {
			r.section = int(sym.Section)
			r.at += int64(sym.Value) //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
		} else {
			r.symbol = sym.Name
		}
		f.relocs[to] = append(f.relocs[to], r)
	}
	slices.SortStableFunc(f.relocs[to], func(a, b reloc) int {
		switch {
		case a.off < b.off:
			return -1
		case a.off > b.off:
			return 1
		}
		return 0
	})
	return nil
}

// readTables follows the one struct klp_patch of a module.
func (f *file) readTables() (tables, error) {
	var t tables
	l, names, err := f.readLayout()
	if err != nil {
		return t, err
	}
	if len(names) != 1 {
		return t, shapef("the module has %d variables of type struct klp_patch: %q", len(names), names)
	}
	at, err := f.variable(names[0], uint64(l.patch)) //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
	if err != nil {
		return t, err
	}
	t.starts = at
	t.ranges = append(t.ranges, at)
	flag, err := f.bytes(at.section, at.from+uint64(l.members["klp_patch.replace"]), 1) //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
	if err != nil {
		return t, err
	}
	t.Replace = flag[0] != 0
	objs, err := f.follow(at.section, at.from+uint64(l.members["klp_patch.objs"])) //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
	if err != nil {
		return t, err
	}
	if objs.section == 0 {
		return t, shapef("struct klp_patch %s has no objects", names[0])
	}
	return t, f.readObjects(&t, l, objs)
}

func (f *file) readObjects(t *tables, l layout, objs span) error {
	member := func(at uint64, name string) uint64 { return at + uint64(l.members[name]) } //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
	at := objs.from
	for {
		if (at-objs.from)/uint64(l.object) > maxEntries { //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
			return shapef("the list of objects has no end")
		}
		if _, err := f.bytes(objs.section, at, uint64(l.object)); err != nil { //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
			return err
		}
		name, named, err := f.text(objs.section, member(at, "klp_object.name"))
		if err != nil {
			return err
		}
		funcs, err := f.follow(objs.section, member(at, "klp_object.funcs"))
		if err != nil {
			return err
		}
		if !named && funcs.section == 0 {
			break
		}
		switch {
		case !named:
			name = vmlinux
		case name == vmlinux:
			return shapef("an object is called vmlinux; the kernel itself has no name there")
		}
		c := queue.Callback{Object: name}
		for _, w := range queue.CallbackTimes {
			place := member(at, "klp_object.callbacks") + uint64(l.members["klp_callbacks."+w]) //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
			if _, ok := f.reloc(objs.section, place); ok {
				c.When = append(c.When, w)
			}
		}
		if len(c.When) > 0 {
			t.Callbacks = append(t.Callbacks, c)
		}
		if funcs.section != 0 {
			if err := f.readFunctions(t, l, name, funcs); err != nil {
				return err
			}
		}
		at += uint64(l.object) //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
	}
	return f.add(t, span{objs.section, objs.from, at + uint64(l.object)}) //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
}

func (f *file) readFunctions(t *tables, l layout, object string, funcs span) error {
	member := func(at uint64, name string) uint64 { return at + uint64(l.members[name]) } //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
	at := funcs.from
	for {
		if len(t.Functions) > maxEntries {
			return shapef("the list of functions of %s has no end", object)
		}
		if _, err := f.bytes(funcs.section, at, uint64(l.function)); err != nil { //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
			return err
		}
		name, named, err := f.text(funcs.section, member(at, "klp_func.old_name"))
		if err != nil {
			return err
		}
		raw, err := f.bytes(funcs.section, member(at, "klp_func.old_sympos"), 8)
		if err != nil {
			return err
		}
		e := entry{Object: object, Name: name, Position: binary.LittleEndian.Uint64(raw)}
		code, err := f.follow(funcs.section, member(at, "klp_func.new_func"))
		if err != nil {
			return err
		}
		if !named && code.section == 0 && e.Position == 0 {
			break
		}
		if e.New = f.functionAt(code); e.New == "" || !named {
			return shapef("a function of %s, %q, has no name or no new function", object, name)
		}
		t.Functions = append(t.Functions, e)
		at += uint64(l.function) //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
	}
	return f.add(t, span{funcs.section, funcs.from, at + uint64(l.function)}) //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
}

// add takes a list with its end, which must lie in one variable: else the
// kernel would go on reading in another.
func (f *file) add(t *tables, list span) error {
	for _, s := range f.symbols {
		if elf.ST_TYPE(s.Info) == elf.STT_OBJECT && int(s.Section) == list.section && s.Value == list.from && s.Value+s.Size >= list.to {
			t.ranges = append(t.ranges, list)
			return nil
		}
	}
	return shapef("a list of functions or objects does not end in its own variable; it needs an empty member at its end")
}

// variable finds the symbol of a variable, which must be the only one.
func (f *file) variable(name string, size uint64) (span, error) {
	var found []span
	for _, s := range f.symbols {
		if s.Name == name && elf.ST_TYPE(s.Info) == elf.STT_OBJECT && int(s.Section) < len(f.Sections) && s.Section != elf.SHN_UNDEF {
			found = append(found, span{int(s.Section), s.Value, s.Value + s.Size})
		}
	}
	if len(found) != 1 || found[0].to-found[0].from != size {
		return span{}, shapef("%d variables are called %s; want one, of %d bytes", len(found), name, size)
	}
	return found[0], nil
}

// bytes gives part of a section with data.
func (f *file) bytes(section int, at, size uint64) ([]byte, error) {
	data := f.data[section]
	if at > uint64(len(data)) || size > uint64(len(data))-at {
		return nil, shapef("the tables of the livepatch lie outside of initialized data")
	}
	return data[at:][:size], nil
}

func (f *file) reloc(section int, at uint64) (reloc, bool) {
	list := f.relocs[section]
	i, ok := slices.BinarySearchFunc(list, at, func(r reloc, at uint64) int {
		switch {
		case r.off < at:
			return -1
		case r.off > at:
			return 1
		}
		return 0
	})
	if !ok {
		return reloc{}, false
	}
	return list[i], true
}

// follow reads a pointer of the tables; section 0 is NULL.
func (f *file) follow(section int, at uint64) (span, error) {
	raw, err := f.bytes(section, at, 8)
	if err != nil {
		return span{}, err
	}
	r, ok := f.reloc(section, at)
	if !ok {
		if !bytes.Equal(raw, make([]byte, 8)) {
			return span{}, shapef("the tables of the livepatch have a number in place of a pointer")
		}
		return span{}, nil
	}
	if r.kind != elf.R_X86_64_64 || r.section == 0 || r.at < 0 {
		return span{}, shapef("the tables of the livepatch refer to %q, which is not in the module", r.symbol)
	}
	return span{section: r.section, from: uint64(r.at)}, nil
}

// text reads a pointer to a string.
func (f *file) text(section int, at uint64) (string, bool, error) {
	p, err := f.follow(section, at)
	if err != nil || p.section == 0 {
		return "", false, err
	}
	data := f.data[p.section]
	if p.from < uint64(len(data)) {
		data = data[p.from:]
		if text, _, ok := bytes.Cut(data[:min(len(data), maxText)], []byte{0}); ok {
			return string(text), true, nil
		}
	}
	return "", false, shapef("a name in the tables of the livepatch is no string")
}

// functionAt is the function that begins at a place, or "".
func (f *file) functionAt(p span) string {
	for _, s := range f.symbols {
		if elf.ST_TYPE(s.Info) == elf.STT_FUNC && int(s.Section) == p.section && s.Value == p.from && p.section != 0 {
			return s.Name
		}
	}
	return ""
}
