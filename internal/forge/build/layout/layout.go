// SPDX-License-Identifier: Apache-2.0

// Package layout compares the data types of two builds of one object file by
// their debug information, and says which types changed: members that came,
// went, moved or have another size, enumerators with another value. It reads
// DWARF 4 and 5 of relocatable x86-64 objects, also the early debug
// information of -flto, and decides nothing about a build.
//
// Start reading at Read and Compare.
package layout

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
)

// Types are the data types that an object file describes, by their C name:
// "struct sock", "typedef pgprot_t" for one that only the typedef names,
// "variable x" for one that only a variable has, with " in f" for one of a
// function's own. C lets two functions have a type of one name.
type Types struct {
	Defs map[string][]Type `json:"defs"`
	// Constants are the enumerators of enumerations without a name.
	Constants map[string]int64 `json:"constants"`
}

// Type is the layout of one type. Offsets and sizes are in bits, those of
// types in bytes.
type Type struct {
	Bytes   int64            `json:"b"`
	Members []Member         `json:"m,omitempty"`
	Values  map[string]int64 `json:"v,omitempty"` // of an enumeration
	Is      string           `json:"i,omitempty"` // what a typedef stands for
}

// Member is one member. Those of a member without a type name are listed as
// members of the whole, as "outer.inner".
type Member struct {
	Name string `json:"n"`
	At   int64  `json:"a"`
	Bits int64  `json:"b"`
	Type string `json:"t"` // pointers by the name of what they point to
}

// Kind says how a type changed.
type Kind string

// The kinds. Renamed and Meaning leave every bit where it was.
const (
	Added   Kind = "added"
	Removed Kind = "removed"
	Moved   Kind = "moved"
	Resized Kind = "resized"
	Retyped Kind = "retyped" // another type of the same size
	Value   Kind = "value"   // of an enumerator
	Size    Kind = "size"    // of the whole
	Renamed Kind = "renamed"
	Meaning Kind = "meaning" // the same bits, read otherwise: int or unsigned, void pointer or not
)

// Harmless says that objects of the old layout have everything in its place.
func (k Kind) Harmless() bool { return k == Renamed || k == Meaning }

// Change is one difference of a type. Offsets and sizes are in bits; of
// enumerators, the values.
type Change struct {
	Type     string
	Kind     Kind
	Member   string
	Old, New Place
	Was, Is  string // types, or names
	Hole     bool   // an added member lies where the old layout had nothing
}

// Place is where a member lies.
type Place struct{ At, Bits int64 }

func (p Place) String() string {
	if p.At%8 == 0 && p.Bits%8 == 0 {
		return fmt.Sprintf("offset %d, size %d", p.At/8, p.Bits/8)
	}
	return fmt.Sprintf("offset %d bit %d, size %d bit", p.At/8, p.At%8, p.Bits)
}

func (c Change) String() string {
	m := "member " + c.Member
	switch c.Kind {
	case Added:
		s := fmt.Sprintf("%s added: %s", m, c.New)
		if c.Hole {
			s += ", in a hole of the old layout: old objects have anything there"
		}
		return s
	case Removed:
		return fmt.Sprintf("%s removed: old %s", m, c.Old)
	case Moved, Resized:
		return fmt.Sprintf("%s %s: old %s; new %s", m, c.Kind, c.Old, c.New)
	case Retyped, Meaning:
		return fmt.Sprintf("%s was %s, is %s: %s", m, c.Was, c.Is, c.New)
	case Renamed:
		if c.Member == "" {
			return fmt.Sprintf("it seems that the type is now called %s", c.Is)
		}
		return fmt.Sprintf("member %s is now called %s: %s", c.Was, c.Is, c.New)
	case Value:
		return fmt.Sprintf("enumerator %s: %s, before %s", c.Member, c.Is, c.Was)
	default:
		return fmt.Sprintf("total size: old %d, new %d", c.Old.Bits/8, c.New.Bits/8)
	}
}

// Compare lists the changes from one build to the other, those first that
// make the others: a member that came, before what moved with it. A type that
// only one build has is new or gone, and no change, unless one that is gone
// seems to have got another name.
func Compare(old, now *Types) []Change {
	var out []Change
	for _, name := range sorted(old.Defs) {
		before, after := unequal(old.Defs[name], now.Defs[name])
		for i := range min(len(before), len(after)) {
			out = append(out, compare(name, before[i], after[i])...)
		}
	}
	out = append(out, renamed(old, now)...)
	for _, n := range sorted(old.Constants) {
		if v, ok := now.Constants[n]; ok && v != old.Constants[n] {
			out = append(out, Change{Type: "enum", Kind: Value, Member: n, Was: fmt.Sprint(old.Constants[n]), Is: fmt.Sprint(v)})
		}
	}
	cause := causes(out)
	slices.SortStableFunc(out, func(a, b Change) int {
		switch {
		case a.Type == b.Type:
			return slices.Index(kinds, a.Kind) - slices.Index(kinds, b.Kind)
		case cause[a.Type] == cause[b.Type]:
			return strings.Compare(a.Type, b.Type)
		case cause[a.Type]:
			return -1
		}
		return 1
	})
	return out
}

// renamed compares types that are gone with new ones that have most of their
// members.
func renamed(old, now *Types) []Change {
	var fresh []string
	for _, n := range sorted(now.Defs) {
		if len(old.Defs[n]) == 0 && len(now.Defs[n][0].Members) > 0 {
			fresh = append(fresh, n)
		}
	}
	var out []Change
	for _, n := range sorted(old.Defs) {
		if len(now.Defs[n]) > 0 || len(fresh) > maxFresh {
			continue
		}
		for _, to := range fresh {
			o, f := old.Defs[n][0], now.Defs[to][0]
			is, shared := byName(f.Members), 0
			for _, m := range o.Members {
				if _, has := is[m.Name]; has {
					shared++
				}
			}
			cs := compare(n, o, f)
			if 2*shared < max(len(o.Members), len(f.Members)) || !slices.ContainsFunc(cs, func(c Change) bool { return !c.Kind.Harmless() }) {
				continue
			}
			out = append(append(out, Change{Type: n, Kind: Renamed, Was: n, Is: to, New: Place{0, 8 * f.Bytes}}), cs...)
			break
		}
	}
	return out
}

// maxFresh is how many new types are looked at: a fix has a few, a new
// #include brings hundreds, which are nobody's new name.
const maxFresh = 100

// kinds in the order in which they are told.
var kinds = []Kind{Added, Removed, Retyped, Resized, Value, Moved, Renamed, Meaning, Size}

// causes are the types that did not only change with a type that they contain.
func causes(cs []Change) map[string]bool {
	changed, cause := map[string]bool{}, map[string]bool{}
	for _, c := range cs {
		changed[c.Type] = true
	}
	for _, c := range cs {
		switch c.Kind {
		case Moved, Size:
		case Resized:
			of, _, _ := strings.Cut(c.Is, "[")
			cause[c.Type] = cause[c.Type] || !changed[of] && !changed["typedef "+of]
		default:
			cause[c.Type] = true
		}
	}
	return cause
}

func sorted[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// unequal takes the types of one name that both builds have alike out.
func unequal(old, now []Type) (before, after []Type) {
	after = slices.Clone(now)
	for _, o := range old {
		if i := slices.IndexFunc(after, func(n Type) bool { return len(compare("", o, n)) == 0 }); i >= 0 {
			after = slices.Delete(after, i, i+1)
			continue
		}
		before = append(before, o)
	}
	return before, after
}

func compare(name string, old, now Type) []Change {
	if old.Bytes == now.Bytes && old.Is == now.Is && slices.Equal(old.Members, now.Members) && maps.Equal(old.Values, now.Values) {
		return nil
	}
	var out []Change
	add := func(c Change) {
		c.Type = name
		out = append(out, c)
	}
	was, is := byName(old.Members), byName(now.Members)
	for _, n := range now.Members {
		o, had := was[n.Name]
		if had {
			if k := differs(o, n); k != "" {
				add(Change{Kind: k, Member: n.Name, Old: o.place(), New: n.place(), Was: o.Type, Is: n.Type})
			}
			continue
		}
		// The same bits under another name: a new name, or one more.
		if a, renamed := alike(n, old.Members, is); renamed {
			add(Change{Kind: Renamed, Member: n.Name, Old: a.place(), New: n.place(), Was: a.Name, Is: n.Name})
		} else if a.Name == "" {
			hole := within(n.Name) == "" && n.Bits > 0 && n.At+n.Bits <= 8*old.Bytes && free(n, old.Members)
			add(Change{Kind: Added, Member: n.Name, New: n.place(), Is: n.Type, Hole: hole})
		}
	}
	for _, o := range old.Members {
		if _, has := is[o.Name]; has {
			continue
		}
		if a, _ := alike(o, now.Members, was); a.Name == "" {
			add(Change{Kind: Removed, Member: o.Name, Old: o.place(), Was: o.Type})
		}
	}
	for _, n := range sorted(old.Values) {
		v, has := now.Values[n]
		switch {
		case !has && !slices.Contains(valuesOf(now), old.Values[n]):
			add(Change{Kind: Value, Member: n, Was: fmt.Sprint(old.Values[n]), Is: "none"})
		case has && v != old.Values[n]:
			add(Change{Kind: Value, Member: n, Was: fmt.Sprint(old.Values[n]), Is: fmt.Sprint(v)})
		}
	}
	if old.Bytes != now.Bytes {
		add(Change{Kind: Size, Old: Place{0, 8 * old.Bytes}, New: Place{0, 8 * now.Bytes}})
	} else if old.Is != now.Is {
		add(Change{Kind: retyped(old.Is, now.Is), Member: "", Old: Place{0, 8 * old.Bytes}, New: Place{0, 8 * now.Bytes}, Was: old.Is, Is: now.Is})
	}
	return out
}

func valuesOf(t Type) []int64 {
	var out []int64
	for _, v := range t.Values {
		out = append(out, v)
	}
	return out
}

func byName(ms []Member) map[string]Member {
	out := make(map[string]Member, len(ms))
	for _, m := range ms {
		out[m.Name] = m
	}
	return out
}

func (m Member) place() Place { return Place{m.At, m.Bits} }

func differs(o, n Member) Kind {
	switch {
	case o.Bits != n.Bits:
		return Resized
	case o.At != n.At:
		return Moved
	case o.Type != n.Type:
		return retyped(o.Type, n.Type)
	}
	return ""
}

// retyped tells a change of what the bits are from one of how they are read.
func retyped(was, is string) Kind {
	pointer := func(s string) bool { return strings.HasSuffix(s, " *") }
	const void = "void *"
	if was == void && pointer(is) || is == void && pointer(was) || integer.MatchString(was) && integer.MatchString(is) {
		return Meaning
	}
	return Retyped
}

// integer matches what reader.describe says of integers and enumerations.
var integer = regexp.MustCompile(`^(int|unsigned|bool) [0-9]+ bit$|^enum [^ ]+$|^enum without a name$`)

// alike finds a member of the same place and type in the other layout, and
// says whether that name is free: not a member of this layout too.
func alike(m Member, others []Member, mine map[string]Member) (Member, bool) {
	var found Member
	for _, o := range others {
		if within(o.Name) != within(m.Name) || o.At != m.At || o.Bits != m.Bits || o.Type != m.Type {
			continue
		}
		if _, kept := mine[o.Name]; !kept {
			return o, true
		}
		found = o
	}
	return found, false
}

// free says whether no old member has one of the bits.
func free(m Member, old []Member) bool {
	return !slices.ContainsFunc(old, func(o Member) bool {
		return within(o.Name) == within(m.Name) && o.At < m.At+m.Bits && m.At < o.At+o.Bits
	})
}

// within is the array or pointer that a member's offset counts from; "" is the
// type itself.
func within(member string) string { return member[:strings.LastIndex(member, "[].")+1] }

// Encode writes the types for a cache.
func (t *Types) Encode() ([]byte, error) {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if err := errors.Join(json.NewEncoder(w).Encode(t), w.Close()); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// MaxEncoded limits what Decode reads, in bytes; unpacked it may be MaxEncoded
// times eight.
const MaxEncoded = 16 << 20

// Decode reads what Encode wrote.
func Decode(b []byte) (*Types, error) {
	r, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, bad("%w", err)
	}
	var t Types
	if err := json.NewDecoder(io.LimitReader(r, 8*MaxEncoded)).Decode(&t); err != nil {
		return nil, bad("%w", err)
	}
	return &t, nil
}
