// SPDX-License-Identifier: Apache-2.0

package delta

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"regexp"
	"strings"

	"klatch/internal/fault"
)

// Limits of an object file that is read. A kernel's largest objects without
// debug information have 3 MiB.
const (
	maxObject  = 256 << 20 // bytes of one section
	maxSymbols = 1 << 20
)

// thing is a function or a variable of an object file.
type thing struct {
	name     string // without the number that the compiler gives to static locals
	symbol   string // as it is
	section  string
	function bool
	local    bool
	size     uint64
	content  []byte // empty for one without initial value
	refs     []reference
}

// reference is what a relocation means, not how it is written.
type reference struct {
	off    uint64 // in the thing
	target string // a symbol's name, or the text of a string in quotes
	symbol string // as it is in this object, to tell variables of one name apart
	addend int64
	code   bool // it refers to a function
	// address: the whole address is taken, as for a pointer
	address bool
}

// means says whether two references of two objects mean the same.
func (r reference) means(o reference) bool {
	r.symbol, o.symbol = "", ""
	return r == o
}

// object is what Compare knows of an object file.
type object struct {
	things    []thing
	undefined map[string]bool
	exported  map[string]bool
	sections  map[string][]byte // of those without things in them
}

// numbered finds the suffix of static locals and of clones whose numbers move.
// So do those of __UNIQUE_ID and BTF_ID, which count with __COUNTER__.
var numbered = regexp.MustCompile(`\.[0-9]+$|^(__UNIQUE_ID_.*?|__BTF_ID__.*__)[0-9]+$`)

func baseName(n string) string { return numbered.ReplaceAllString(n, "$1") }

func read(b []byte) (*object, error) {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_object", "read object file: %w", err)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 || f.Type != elf.ET_REL {
		return nil, fault.New(fault.Invalid, "bad_object", "not an x86-64 object file")
	}
	symbols, err := f.Symbols()
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_object", "read symbols: %w", err)
	}
	if len(symbols) > maxSymbols {
		return nil, fault.New(fault.Invalid, "bad_object", "%d symbols, limit %d", len(symbols), maxSymbols)
	}
	r := reader{f: f, symbols: symbols, data: map[int][]byte{}}
	if err := r.relocations(); err != nil {
		return nil, err
	}
	return r.object()
}

type reader struct {
	f       *elf.File
	symbols []elf.Symbol
	data    map[int][]byte
	relocs  map[int][]rela
}

type rela struct {
	off    uint64
	symbol int // in symbols
	addend int64
	pc     bool // relative to the place
	whole  bool // the address itself
}

func (r *reader) section(i int) ([]byte, error) {
	if d, ok := r.data[i]; ok {
		return d, nil
	}
	s := r.f.Sections[i]
	if s.Type == elf.SHT_NOBITS {
		return nil, nil
	}
	if s.Size > maxObject {
		return nil, fault.New(fault.Invalid, "bad_object", "section %s has %d bytes", s.Name, s.Size)
	}
	d, err := s.Data()
	if err != nil {
		return nil, fault.New(fault.Invalid, "bad_object", "read section %s: %w", s.Name, err)
	}
	r.data[i] = d
	return d, nil
}

func (r *reader) relocations() error {
	r.relocs = map[int][]rela{}
	const entry = 24 // Elf64_Rela
	for i, s := range r.f.Sections {
		if s.Type != elf.SHT_RELA {
			continue
		}
		data, err := r.section(i)
		if err != nil {
			return err
		}
		for ; len(data) >= entry; data = data[entry:] {
			info := binary.LittleEndian.Uint64(data[8:])
			n := int(info >> 32)
			if n == 0 || n > len(r.symbols) {
				continue
			}
			kind := elf.R_X86_64(info & 0xffffffff)
			r.relocs[int(s.Info)] = append(r.relocs[int(s.Info)], rela{binary.LittleEndian.Uint64(data), n - 1,
				int64(binary.LittleEndian.Uint64(data[16:])), //nolint:gosec // two's complement
				kind == elf.R_X86_64_PC32 || kind == elf.R_X86_64_PLT32 || kind == elf.R_X86_64_PC64,
				kind == elf.R_X86_64_64 || kind == elf.R_X86_64_32S || kind == elf.R_X86_64_32})
		}
	}
	return nil
}

func (r *reader) object() (*object, error) {
	o := &object{undefined: map[string]bool{}, exported: map[string]bool{}, sections: map[string][]byte{}}
	with := map[int]bool{}
	for _, s := range r.symbols {
		kind := elf.ST_TYPE(s.Info)
		if name, ok := strings.CutPrefix(s.Name, "__ksymtab_"); ok {
			o.exported[name] = true
		}
		if s.Section == elf.SHN_UNDEF {
			if s.Name != "" {
				o.undefined[s.Name] = true
			}
			continue
		}
		if kind != elf.STT_FUNC && kind != elf.STT_OBJECT || int(s.Section) >= len(r.f.Sections) || s.Size == 0 {
			continue
		}
		t, err := r.thing(s, kind == elf.STT_FUNC)
		if err != nil {
			return nil, err
		}
		with[int(s.Section)] = true
		o.things = append(o.things, t)
	}
	for i, s := range r.f.Sections {
		if with[i] || s.Type != elf.SHT_PROGBITS || s.Flags&elf.SHF_ALLOC == 0 || s.Flags&elf.SHF_STRINGS != 0 || s.Size == 0 {
			continue
		}
		d, err := r.section(i)
		if err != nil {
			return nil, err
		}
		var text strings.Builder
		for _, ref := range r.refs(i, 0, uint64(len(d))) {
			fmt.Fprintf(&text, "%d:%s%+d;", ref.off, ref.target, ref.addend)
		}
		o.sections[s.Name] = append(append(o.sections[s.Name], d...), text.String()...)
	}
	return o, nil
}

func (r *reader) thing(s elf.Symbol, function bool) (thing, error) {
	sec := r.f.Sections[s.Section]
	t := thing{name: baseName(s.Name), symbol: s.Name, section: sec.Name, function: function, local: elf.ST_BIND(s.Info) == elf.STB_LOCAL, size: s.Size}
	data, err := r.section(int(s.Section))
	if err != nil || sec.Type == elf.SHT_NOBITS {
		return t, err
	}
	if s.Value > uint64(len(data)) || s.Size > uint64(len(data))-s.Value {
		return t, fault.New(fault.Invalid, "bad_object", "%s is outside its section", s.Name)
	}
	t.content = bytes.Clone(data[s.Value:][:s.Size])
	t.refs = r.refs(int(s.Section), s.Value, s.Size)
	for _, ref := range t.refs { // what the linker fills in is compared as a reference
		for i := ref.off; i < ref.off+4 && i < uint64(len(t.content)); i++ {
			t.content[i] = 0
		}
	}
	return t, nil
}

// refs says what the relocations of a part of a section mean.
func (r *reader) refs(section int, start, size uint64) []reference {
	var out []reference
	for _, rel := range r.relocs[section] {
		if rel.off < start || rel.off-start >= size {
			continue
		}
		s := r.symbols[rel.symbol]
		ref := reference{off: rel.off - start, target: baseName(s.Name), symbol: s.Name, addend: rel.addend, address: rel.whole, code: elf.ST_TYPE(s.Info) == elf.STT_FUNC}
		if elf.ST_TYPE(s.Info) == elf.STT_SECTION && int(s.Section) < len(r.f.Sections) {
			r.inSection(&ref, int(s.Section), rel)
		}
		out = append(out, ref)
	}
	return out
}

// inSection gives a reference to a place in a section the name of what is
// there: the text of a string, a symbol with an offset, else the section's.
func (r *reader) inSection(ref *reference, section int, rel rela) {
	sec := r.f.Sections[section]
	at := rel.addend
	if rel.pc {
		at += 4 // counted from the end of the field (psABI 4.4.1)
	}
	if sec.Flags&elf.SHF_STRINGS != 0 {
		data, err := r.section(section)
		if err == nil && at >= 0 && at < int64(len(data)) {
			text, _, _ := bytes.Cut(data[at:], []byte{0})
			ref.target, ref.addend = fmt.Sprintf("%q", text), 0
			return
		}
	}
	for _, s := range r.symbols {
		if int(s.Section) == section && at >= 0 && uint64(at) >= s.Value && uint64(at) < s.Value+s.Size {
			ref.target, ref.symbol = baseName(s.Name), s.Name
			ref.addend, ref.code = at-int64(s.Value), elf.ST_TYPE(s.Info) == elf.STT_FUNC //nolint:gosec // in a section
			return
		}
	}
	// An empty variable, such as a lock class without lock debugging, has no
	// symbol that covers a byte; its section has its number.
	ref.target, ref.code = baseName(sec.Name), sec.Flags&elf.SHF_EXECINSTR != 0
}
