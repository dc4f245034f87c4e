// SPDX-License-Identifier: Apache-2.0

package layout

import (
	"debug/dwarf"
	"fmt"
	"hash/fnv"
	"maps"
	"strings"
)

// all lists the types that have a name, or that a typedef or a variable names.
func (r *reader) all() error {
	for _, off := range r.named {
		x := r.dies[off]
		name, of := "", x
		switch x.tag {
		case dwarf.TagTypedef:
			if x.name == "" {
				continue
			}
			name, of = "typedef "+x.name, r.nameless(x.typ)
			if of == nil {
				if err := r.alias(name, x); err != nil {
					return err
				}
				continue
			}
		case dwarf.TagVariable:
			// One of a function's own lives as long as the call. A static one
			// shows in the data, unless it keeps its size and has no value.
			if x.function != "" {
				continue
			}
			if of = r.nameless(r.element(x.typ)); of == nil || x.name == "" {
				continue
			}
			name = "variable " + x.name
		default:
			if x.name == "" {
				if x.tag == dwarf.TagEnumerationType && x.function == "" {
					maps.Copy(r.types.Constants, r.values(x))
				}
				continue
			}
			name = keyword(x.tag) + x.name
		}
		if of.size == -2 {
			continue
		}
		t, err := r.layout(of)
		if err != nil {
			return err
		}
		if err := r.define(name, x.function, t); err != nil {
			return err
		}
	}
	return r.err
}

func (r *reader) define(name, function string, t Type) error {
	if function != "" {
		name += " in " + function
	}
	if len(r.types.Defs[name]) >= maxSame {
		return bad("over %d types called %.100q", maxSame, name)
	}
	r.types.Defs[name] = append(r.types.Defs[name], t)
	return nil
}

// alias is a typedef of a type that has a name, which then has the layout, or
// of one that can have none.
func (r *reader) alias(name string, x *die) error {
	if e := r.dies[r.element(x.typ)]; e != nil && aggregate(e.tag) {
		return r.define(name, x.function, Type{Is: r.describe(x.typ, 0)})
	}
	size, err := r.size(x.typ, 0)
	if err != nil {
		return err
	}
	return r.define(name, x.function, Type{Bytes: size, Is: r.describe(x.typ, 0)})
}

func keyword(t dwarf.Tag) string {
	switch t { //nolint:exhaustive // of the three that have one
	case dwarf.TagStructType:
		return "struct "
	case dwarf.TagUnionType:
		return "union "
	}
	return "enum "
}

func aggregate(t dwarf.Tag) bool { return t == dwarf.TagStructType || t == dwarf.TagUnionType }

func qualifier(t dwarf.Tag) bool {
	return t == dwarf.TagConstType || t == dwarf.TagVolatileType || t == dwarf.TagRestrictType || t == dwarf.TagAtomicType
}

// bare takes the qualifiers off.
func (r *reader) bare(off dwarf.Offset) *die {
	for range maxDepth {
		x := r.dies[off]
		if x == nil || !qualifier(x.tag) {
			return x
		}
		off = x.typ
	}
	return nil
}

// nameless gives a struct, union or enumeration that has no name; nil for any
// other type.
func (r *reader) nameless(off dwarf.Offset) *die {
	x := r.bare(off)
	if x == nil || x.name != "" || !aggregate(x.tag) && x.tag != dwarf.TagEnumerationType {
		return nil
	}
	return x
}

// element is what an array or a pointer is made of.
func (r *reader) element(off dwarf.Offset) dwarf.Offset {
	for range maxDepth {
		x := r.dies[off]
		if x == nil || x.tag != dwarf.TagArrayType && x.tag != dwarf.TagPointerType && !qualifier(x.tag) {
			break
		}
		off = x.typ
	}
	return off
}

func (r *reader) values(x *die) map[string]int64 {
	out := map[string]int64{}
	for _, c := range x.children {
		if e := r.dies[c]; e.tag == dwarf.TagEnumerator && e.name != "" {
			out[e.name] = e.count
		}
	}
	return out
}

func (r *reader) layout(x *die) (Type, error) {
	t := Type{Bytes: max(0, x.size)}
	if x.tag == dwarf.TagEnumerationType {
		t.Values = r.values(x)
		return t, nil
	}
	return t, r.flatten(&t, x, "", 0, 0)
}

// flatten lists the members of a type, with those of members whose type has no
// name.
func (r *reader) flatten(t *Type, x *die, prefix string, at int64, depth int) error {
	if depth > maxDepth {
		return bad("types within each other, deeper than %d", maxDepth)
	}
	for _, c := range x.children {
		m := r.dies[c]
		if m.tag != dwarf.TagMember {
			continue
		}
		if r.members++; r.members > maxMembers {
			return bad("over %d members", maxMembers)
		}
		if r.text += len(prefix) + len(m.name); r.text > maxText {
			return bad("over %d bytes of names", maxText)
		}
		size, err := r.size(m.typ, 0)
		if err != nil {
			return err
		}
		bits := 8 * size
		if m.bits > 0 {
			bits = m.bits
		}
		inner := r.nameless(r.element(m.typ))
		if inner != nil && !aggregate(inner.tag) {
			inner = nil
		}
		if m.name != "" && (inner == nil || r.nameless(m.typ) == nil) {
			t.Members = append(t.Members, Member{prefix + m.name, at + m.at, bits, r.describe(m.typ, 0)})
		}
		if inner == nil {
			continue
		}
		below, base := prefix, at+m.at
		if m.name != "" {
			below += m.name + "."
		}
		if r.nameless(m.typ) == nil { // an array of them, or a pointer: places within one
			below, base = prefix+m.name+"[].", 0
		}
		if err := r.flatten(t, inner, below, base, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// size is that of a type in bytes.
func (r *reader) size(off dwarf.Offset, depth int) (int64, error) {
	x := r.dies[off]
	if x == nil {
		return 0, nil // void
	}
	if depth > maxDepth {
		return 0, bad("types made of each other, deeper than %d", maxDepth)
	}
	switch {
	case x.tag == dwarf.TagArrayType && x.size < 0:
		n, err := r.size(x.typ, depth+1)
		if err != nil {
			return 0, err
		}
		for _, c := range x.children {
			if d := r.dies[c]; d.tag == dwarf.TagSubrangeType {
				n *= max(0, d.count) // a flexible array has no bound, and no size
			}
		}
		if n < 0 || n > 1<<50 {
			return 0, bad("array of %d bytes", n)
		}
		return n, nil
	case x.tag == dwarf.TagTypedef || qualifier(x.tag):
		return r.size(x.typ, depth+1)
	case x.tag == dwarf.TagPointerType && x.size < 0:
		return 8, nil
	}
	return min(max(0, x.size), 1<<50), nil
}

// describe names a type so that two builds of one type have one name: typedefs
// of what has no name end it, others are followed; qualifiers do not count.
func (r *reader) describe(off dwarf.Offset, depth int) string {
	if s, ok := r.names[off]; ok {
		return s
	}
	if depth > maxDepth {
		r.err = bad("types made of each other, deeper than %d", maxDepth)
		return ""
	}
	r.names[off] = "…" // for one that leads to itself
	s := r.describeNew(off, depth+1)
	if len(s) > maxName {
		sum := fnv.New64a()
		_, _ = sum.Write([]byte(s)) // never an error
		s = fmt.Sprintf("%s… %x", s[:maxName], sum.Sum64())
	}
	r.names[off] = s
	return s
}

func (r *reader) describeNew(off dwarf.Offset, depth int) string {
	x := r.dies[off]
	if x == nil {
		return "void"
	}
	switch {
	case qualifier(x.tag):
		return r.describe(x.typ, depth)
	case x.tag == dwarf.TagTypedef:
		if r.nameless(x.typ) != nil {
			return x.name
		}
		return r.describe(x.typ, depth)
	case x.tag == dwarf.TagPointerType:
		return r.describe(x.typ, depth) + " *"
	case x.tag == dwarf.TagArrayType:
		var s strings.Builder
		s.WriteString(r.describe(x.typ, depth))
		for _, c := range x.children {
			if d := r.dies[c]; d.tag == dwarf.TagSubrangeType {
				fmt.Fprintf(&s, "[%d]", max(0, d.count))
			}
		}
		return s.String()
	case x.tag == dwarf.TagSubroutineType:
		var params []string
		for i, c := range x.children {
			switch p := r.dies[c]; {
			case i > maxParameters:
			case p.tag == dwarf.TagFormalParameter:
				params = append(params, r.describe(p.typ, depth))
			case p.tag == dwarf.TagUnspecifiedParameters:
				params = append(params, "...")
			}
		}
		return r.describe(x.typ, depth) + " (" + strings.Join(params, ", ") + ")"
	case x.tag == dwarf.TagBaseType:
		n := fmt.Sprintf("%d bit", 8*max(0, x.size))
		switch {
		case x.count == 1:
			return "bool " + n
		case x.signed:
			return "int " + n
		}
		return "unsigned " + n
	case aggregate(x.tag) || x.tag == dwarf.TagEnumerationType:
		if x.name == "" {
			return keyword(x.tag) + "without a name"
		}
		return keyword(x.tag) + x.name
	}
	return x.name
}

const (
	maxParameters = 64  // of a function that a pointer leads to; C has 127 at least, the kernel a dozen
	maxName       = 300 // bytes of a type's name, before the rest becomes a digest
)
