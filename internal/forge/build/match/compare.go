// SPDX-License-Identifier: Apache-2.0

package match

import (
	"bytes"
	"debug/elf"
	"fmt"
	"path/filepath"
	"slices"
)

// Object compares all functions of an object file, compiled from source
// unpatched, with the image, and adds to the report. replaced lists those that
// a livepatch would replace: the caller must refuse if one of them is in
// Different.
func (k *Image) Object(path, source string, replaced []string, r *Report) error {
	functions, err := readObject(path)
	if err != nil {
		return err
	}
	left := slices.Clone(replaced)
	for _, f := range functions {
		must := slices.Contains(replaced, f.name)
		left = slices.DeleteFunc(left, func(n string) bool { return n == f.name })
		p, addr, why := k.compare(f, filepath.Base(source))
		r.Checked++
		if why != "" {
			r.Different = append(r.Different, Difference{k.name, source, f.name, must, why})
			continue
		}
		r.Identical++
		if must {
			p.Object, p.File, p.Function, p.Bytes, p.Addr = k.name, source, f.name, len(f.code), addr
			r.Replaced = append(r.Replaced, p)
		}
	}
	for _, n := range left {
		r.Different = append(r.Different, Difference{k.name, source, n, true, "the unpatched object has no such function"})
	}
	return nil
}

// Find returns the address of an object file's function in the image, where
// exactly one matches.
func (k *Image) Find(path, source, name string) (uint64, bool, error) {
	functions, err := readObject(path)
	if err != nil {
		return 0, false, err
	}
	for _, f := range functions {
		if f.name == name {
			_, addr, why := k.compare(f, filepath.Base(source))
			return addr, why == "", nil
		}
	}
	return 0, false, nil
}

// compare says what of a function was compared, where it is, and why it is
// not the image's, or "".
func (k *Image) compare(f function, file string) (Proved, uint64, string) {
	var candidates []symbol
	for _, s := range k.byName[f.name] {
		if s.code && (!f.local || s.local && (len(k.files) == 0 || s.file == file)) {
			candidates = append(candidates, s)
		}
	}
	if len(candidates) == 0 {
		return Proved{}, 0, "the kernel has no function of this name from this file"
	}
	var proved Proved
	var addr uint64
	matches, why := 0, ""
	for _, c := range candidates {
		p, w := k.compareAt(f, c)
		if w == "" {
			matches++
			proved, addr = p, c.addr
		} else if why == "" {
			why = w
		}
	}
	switch {
	case matches == 1:
		return proved, addr, ""
	case matches > 1:
		return Proved{}, 0, fmt.Sprintf("the kernel has %d identical functions of this name from files of this name", matches)
	}
	return Proved{}, 0, why
}

func (k *Image) compareAt(f function, c symbol) (Proved, string) {
	var p Proved
	if c.size != uint64(len(f.code)) {
		return p, fmt.Sprintf("%d bytes, the kernel's has %d", len(f.code), c.size)
	}
	theirs := k.bytes(c.addr, c.size)
	if theirs == nil {
		return p, fmt.Sprintf("address %#x is in no section of the kernel", c.addr)
	}
	ours := bytes.Clone(f.code)
	for _, r := range f.relocs {
		width := relocWidth(r.kind)
		if width == 0 || r.off+uint64(width) > uint64(len(ours)) {
			return p, fmt.Sprintf("relocation %s at +%#x cannot be compared", r.kind, r.off)
		}
		field := theirs[r.off:][:width]
		copy(ours[r.off:], field)
		if why := k.sameReference(c.addr+r.off, field, r, &p); why != "" {
			return p, fmt.Sprintf("at +%#x %s", r.off, why)
		}
	}
	for i := range ours {
		if ours[i] != theirs[i] {
			return p, fmt.Sprintf("differs at +%#x of %d bytes", i, len(ours))
		}
	}
	// What the linker fills in of theirs must be filled in of ours too.
	for off := range c.size {
		if _, ok := k.relocs[c.addr+off]; ok && !slices.ContainsFunc(f.relocs, func(r reloc) bool { return r.off == off }) {
			return p, fmt.Sprintf("at +%#x the kernel has a relocation", off)
		}
	}
	return p, ""
}

// sameReference says why a place in the image does not refer to what a
// relocation means, or "".
func (k *Image) sameReference(place uint64, field []byte, r reloc, p *Proved) string {
	to, outside, addend := k.refersTo(place, field, r.pc())
	if r.isText {
		at := to
		if r.pc() {
			at += 4
		}
		text, ok := k.text(at)
		if outside != "" || !ok || string(text) != r.text {
			return fmt.Sprintf("the kernel does not refer to the string %.60q", r.text)
		}
		p.Strings++
		return ""
	}
	if r.symbol == "" {
		p.Unnamed++
		return ""
	}
	if outside != "" {
		if outside != r.symbol || addend != r.addend {
			return fmt.Sprintf("the kernel does not refer to %s, but to %s", r.symbol, outside)
		}
		p.Relocations++
		return ""
	}
	targets := k.byName[r.symbol]
	if len(targets) == 0 { // the kernel cannot refer to what it does not have
		return fmt.Sprintf("it refers to %s, which the kernel does not have", r.symbol)
	}
	mask := ^uint64(0)
	if r.kind == elf.R_X86_64_32 {
		mask = 0xffffffff
	}
	want := to - uint64(r.addend)
	if !slices.ContainsFunc(targets, func(s symbol) bool { return s.addr&mask == want&mask }) {
		return fmt.Sprintf("the kernel does not refer to %s", r.symbol)
	}
	p.Relocations++
	return ""
}

// relocWidth is the number of bytes that a relocation fills in, 0 for a type
// that does not occur in x86-64 kernel text (psABI, table 4.9).
func relocWidth(t elf.R_X86_64) int {
	switch t {
	case elf.R_X86_64_PC32, elf.R_X86_64_PLT32, elf.R_X86_64_32, elf.R_X86_64_32S:
		return 4
	case elf.R_X86_64_64, elf.R_X86_64_PC64:
		return 8
	default:
		return 0
	}
}
