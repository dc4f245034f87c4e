// SPDX-License-Identifier: Apache-2.0

package layout

import (
	"bytes"
	"debug/dwarf"
	"debug/elf"
	"fmt"
	"strings"

	"klatch/internal/fault"
)

// Limits of an object that is read. The largest objects of a kernel have 12 MB
// of debug information in a million entries.
const (
	maxSection = 64 << 20 // bytes, uncompressed
	maxTotal   = 256 << 20
	maxEntries = 4 << 20
	maxMembers = 4 << 20  // of all types, where those without a name are counted in each that has them
	maxDepth   = 64       // of types within types
	maxText    = 64 << 20 // bytes of the names of members
	maxSame    = 1000     // types of one name
)

// lto is what gcc puts before the name of a section of early debug
// information.
const lto = ".gnu.debuglto_"

// die is an entry of the debug information, reduced to what layout needs.
type die struct {
	tag      dwarf.Tag
	name     string
	typ      dwarf.Offset
	size     int64 // bytes; -1 where it is not said
	at       int64 // bits, from the start of the type that has it
	bits     int64 // of a bit field
	count    int64 // of an array, or an enumerator's value
	signed   bool
	children []dwarf.Offset
	function string // that it is in
}

// Read reads the types of an object file.
func Read(object []byte) (*Types, error) {
	f, err := elf.NewFile(bytes.NewReader(object))
	if err != nil {
		return nil, bad("%w", err)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 || f.Type != elf.ET_REL {
		return nil, bad("not an x86-64 object file")
	}
	var total uint64
	for _, s := range f.Sections {
		// The reader of the standard library goes by the usual names.
		s.Name = strings.Replace(s.Name, lto, "", 1)
		if strings.Contains(s.Name, "debug_") || s.Type == elf.SHT_SYMTAB {
			if total += s.Size; s.Size > maxSection || total > maxTotal {
				return nil, bad("section %.40q has %d bytes", s.Name, s.Size)
			}
			if s.Flags&elf.SHF_COMPRESSED == 0 && s.FileSize > uint64(len(object)) {
				return nil, bad("section %.40q is larger than the file", s.Name)
			}
			if strings.HasPrefix(s.Name, ".zdebug_") { // an old form of compression, of which nobody knows the size
				return nil, bad("section %.40q is of an unknown form", s.Name)
			}
		}
	}
	d, err := f.DWARF()
	if err != nil {
		return nil, bad("%w", err)
	}
	r := reader{dies: map[dwarf.Offset]*die{}, names: map[dwarf.Offset]string{}, types: &Types{Defs: map[string][]Type{}, Constants: map[string]int64{}}}
	if err := r.entries(d); err != nil {
		return nil, err
	}
	if r.units == 0 {
		return nil, bad("the object has no debug information")
	}
	return r.types, r.all()
}

func bad(format string, args ...any) error {
	return fault.New(fault.Invalid, "bad_debug_information", "read types: %w", fmt.Errorf(format, args...))
}

type reader struct {
	dies    map[dwarf.Offset]*die
	named   []dwarf.Offset          // types and variables, in their order
	names   map[dwarf.Offset]string // what describe said
	types   *Types
	units   int
	members int
	text    int
	err     error // of describe
}

// entries reads all entries that say something of types.
func (r *reader) entries(d *dwarf.Data) error {
	in := d.Reader()
	type open struct {
		*die
		function string
	}
	var parents []open
	for n := 0; ; n++ {
		e, err := in.Next()
		if err != nil {
			return bad("%w", err)
		}
		if e == nil {
			break
		}
		if n > maxEntries || len(parents) > 1024 {
			return bad("over %d entries, or 1024 within each other", maxEntries)
		}
		if e.Tag == 0 {
			parents = parents[:max(0, len(parents)-1)]
			continue
		}
		if e.Tag == dwarf.TagCompileUnit {
			r.units++
		}
		var parent open
		if len(parents) > 0 {
			parent = parents[len(parents)-1]
		}
		x := r.entry(e, parent.function)
		if x != nil {
			r.dies[e.Offset] = x
			if parent.die != nil {
				parent.children = append(parent.children, e.Offset)
			}
		}
		if e.Children {
			function := parent.function
			if e.Tag == dwarf.TagSubprogram {
				function, _ = e.Val(dwarf.AttrName).(string)
			}
			parents = append(parents, open{x, function})
		}
	}
	return nil
}

func (r *reader) entry(e *dwarf.Entry, function string) *die {
	switch e.Tag {
	case dwarf.TagStructType, dwarf.TagUnionType, dwarf.TagEnumerationType, dwarf.TagTypedef, dwarf.TagVariable:
		r.named = append(r.named, e.Offset)
	case dwarf.TagMember, dwarf.TagEnumerator, dwarf.TagBaseType, dwarf.TagPointerType, dwarf.TagArrayType, dwarf.TagSubrangeType,
		dwarf.TagConstType, dwarf.TagVolatileType, dwarf.TagRestrictType, dwarf.TagAtomicType, dwarf.TagSubroutineType,
		dwarf.TagFormalParameter, dwarf.TagUnspecifiedParameters, dwarf.TagUnspecifiedType:
	default:
		return nil
	}
	x := &die{tag: e.Tag, size: -1, at: 0, count: -1, function: function}
	var oldBit, dataBit int64 = -1, -1
	for _, f := range e.Field {
		switch f.Attr { //nolint:exhaustive // the others say nothing of a layout
		case dwarf.AttrName:
			x.name, _ = f.Val.(string)
		case dwarf.AttrType:
			x.typ, _ = f.Val.(dwarf.Offset)
		case dwarf.AttrByteSize:
			x.size = number(f.Val, -1)
		case dwarf.AttrDataMemberLoc:
			x.at = 8 * number(f.Val, 0)
		case dwarf.AttrBitSize:
			x.bits = number(f.Val, 0)
		case dwarf.AttrBitOffset:
			oldBit = number(f.Val, -1)
		case dwarf.AttrDataBitOffset:
			dataBit = number(f.Val, -1)
		case dwarf.AttrConstValue:
			x.count = number(f.Val, 0)
		case dwarf.AttrUpperBound:
			x.count = number(f.Val, -2) + 1
		case dwarf.AttrCount:
			x.count = number(f.Val, -1)
		case dwarf.AttrEncoding:
			n := number(f.Val, 0)
			x.signed = n == encSigned || n == encSignedChar
			if n == encBoolean {
				x.count = 1
			}
		case dwarf.AttrDeclaration:
			if yes, _ := f.Val.(bool); yes && e.Tag != dwarf.TagVariable {
				x.size = -2 // declared, not defined
			}
		}
	}
	switch {
	case dataBit >= 0:
		x.at = dataBit
	case oldBit >= 0 && x.size > 0: // DWARF 4, section 5.5.6: counted from the most significant bit
		x.at += 8*x.size - oldBit - x.bits
	}
	return x
}

// Encodings of base types (DWARF 5, table 7.11).
const (
	encBoolean    = 2
	encSigned     = 5
	encSignedChar = 6
)

// number is an attribute's value; opPlusUconst is how DWARF 3 wrote the place
// of a member.
func number(v any, other int64) int64 {
	switch n := v.(type) {
	case int64:
		return n
	case uint64:
		return int64(n) //nolint:gosec // the same bits
	case []byte:
		const opPlusUconst = 0x23
		if len(n) < 2 || n[0] != opPlusUconst {
			return other
		}
		var out, shift uint64
		for _, b := range n[1:] {
			if shift > 56 {
				return other
			}
			out |= uint64(b&0x7f) << shift
			shift += 7
		}
		return int64(out)
	}
	return other
}
