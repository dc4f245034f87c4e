// SPDX-License-Identifier: Apache-2.0

// Package delta compares two builds of one object file, both in separate
// sections, and says what a change does besides replacing functions: to data,
// to tables of functions, to code that runs only once, to exports. The differ
// refuses some of this in words for its authors, and silently accepts some
// that would not work: a changed table of which it makes a second copy that
// only the replaced functions see.
package delta

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"
)

// Change is one thing that cannot be carried over, by its kind.
type Change struct {
	Kind    Kind
	Name    string
	Section string
	Why     string
}

// Kind of a change; the text is the refusal's code.
type Kind string

// The kinds.
const (
	Data    Kind = "data_changed"
	Ops     Kind = "ops_table_changed"
	Once    Kind = "init_code"
	Export  Kind = "export_changed"
	Section Kind = "section_changed"
)

// Delta is what differs between two builds of an object.
type Delta struct {
	Functions []string // changed, by name
	New       []string // functions
	Stopping  []Change
	Undefined []string // symbols that only the patched object needs
	Defined   []string // global symbols of the patched object
	Frames    []Frame  // that grew
}

// Frame is the stack that a function takes by itself, in bytes.
type Frame struct {
	Function string
	Old, New int
}

// Empty says whether the builds do the same.
func (d Delta) Empty() bool { return len(d.Functions)+len(d.New)+len(d.Stopping) == 0 }

// Compare compares two relocatable x86-64 objects.
func Compare(original, patched []byte) (Delta, error) {
	var d Delta
	before, err := read(original)
	if err != nil {
		return d, err
	}
	after, err := read(patched)
	if err != nil {
		return d, err
	}
	old := index(before.things)
	now := index(after.things)
	changed := map[string]bool{}
	for _, k := range keys(now) {
		n := now[k]
		if !n.function {
			continue
		}
		o, had := old[k]
		switch {
		case once(n.section):
			if !had || !same(o, n) {
				d.Stopping = append(d.Stopping, Change{Once, n.name, n.section, "it runs only at boot, or when a module comes or goes"})
			}
		case !had:
			d.New = append(d.New, n.name)
			changed[n.name] = true
		case !same(o, n):
			d.Functions = append(d.Functions, n.name)
			changed[n.name] = true
			if was, is := frame(o.content), frame(n.content); is > was {
				d.Frames = append(d.Frames, Frame{n.name, was, is})
			}
		}
	}
	d.data(old, now, after, changed)
	for name := range before.exported {
		if !after.exported[name] {
			d.Stopping = append(d.Stopping, Change{Export, name, "__ksymtab", "it is not exported any more"})
		}
	}
	for _, name := range keys(after.sections) {
		if was, had := before.sections[name]; !known(name) && (!had || !bytes.Equal(was, after.sections[name])) {
			d.Stopping = append(d.Stopping, Change{Section, "", name, "its content differs"})
		}
	}
	for name := range after.undefined {
		if !before.undefined[name] {
			d.Undefined = append(d.Undefined, name)
		}
	}
	for _, t := range after.things {
		if !t.local {
			d.Defined = append(d.Defined, t.name)
		}
	}
	slices.Sort(d.Undefined)
	slices.SortStableFunc(d.Stopping, func(a, b Change) int { return strings.Compare(string(a.Kind)+a.Name, string(b.Kind)+b.Name) })
	return d, nil
}

// data looks at variables and constants that both builds have.
func (d *Delta) data(old, now map[string]thing, after *object, changed map[string]bool) {
	for _, k := range keys(now) {
		n := now[k]
		o, had := old[k]
		if n.function || !had || same(o, n) || ownState(n.section) {
			continue
		}
		c := Change{Data, n.name, n.section, "its initial value differs"}
		switch {
		case once(n.section):
			c.Kind, c.Why = Once, "it is used only at boot, or when a module comes or goes"
		case o.size != n.size && !constant(n.section):
			c.Why = "its size differs"
		case constant(n.section) && refersToCode(o, n):
			c.Kind, c.Why = Ops, "it names functions, and one of them differs"
		case constant(n.section):
			users := unchangedUsers(n, after, changed)
			if n.local && len(users) == 0 {
				continue // a constant that only the new functions use: each has its own copy
			}
			c.Why = "it is constant, and functions that do not change would go on using the old one"
			if len(users) > 0 {
				c.Why += ", such as " + users[0]
			}
		}
		d.Stopping = append(d.Stopping, c)
	}
}

func refersToCode(a, b thing) bool {
	is := func(r reference) bool { return r.code }
	if !slices.ContainsFunc(a.refs, is) && !slices.ContainsFunc(b.refs, is) {
		return false
	}
	return !slices.Equal(onlyCode(a.refs), onlyCode(b.refs))
}

func onlyCode(refs []reference) []reference {
	return slices.DeleteFunc(slices.Clone(refs), func(r reference) bool { return !r.code })
}

func unchangedUsers(n thing, after *object, changed map[string]bool) []string {
	var users []string
	for _, t := range after.things {
		if t.name == n.name || t.function && changed[t.name] {
			continue
		}
		if slices.ContainsFunc(t.refs, func(r reference) bool { return r.target == n.name }) {
			users = append(users, t.name)
		}
	}
	return users
}

// index names each thing, with a count where a name occurs several times.
func index(ts []thing) map[string]thing {
	out := map[string]thing{}
	for _, t := range ts {
		k := t.name
		for {
			if _, taken := out[k]; !taken {
				break
			}
			k += "'"
		}
		out[k] = t
	}
	return out
}

func keys[V any](m map[string]V) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func same(a, b thing) bool {
	return a.size == b.size && bytes.Equal(a.content, b.content) && slices.Equal(a.refs, b.refs)
}

func once(section string) bool {
	for _, p := range []string{".init.", ".exit.", ".head.text", ".meminit.", ".initcall", ".ref."} {
		if strings.HasPrefix(section, p) {
			return true
		}
	}
	return false
}

func constant(section string) bool {
	return strings.HasPrefix(section, ".rodata") || strings.HasPrefix(section, ".data.rel.ro") || strings.HasPrefix(section, ".rel.ro")
}

// ownState holds flags of one place in the code, and descriptions of it with
// line numbers: the new code brings its own.
func ownState(section string) bool {
	for _, p := range []string{".data.once", ".data..once", "__dyndbg", "__verbose", ".printk_index", "__bug_table", ".discard", "__patchable"} {
		if strings.HasPrefix(section, p) {
			return true
		}
	}
	return false
}

// known are the sections without symbols that the differ carries over with
// each function, or that say nothing of what runs (include/asm-generic/vmlinux.lds.h,
// create-diff-object.c, special_sections).
func known(name string) bool {
	for _, p := range []string{".altinstr", "__bug_table", "__ex_table", ".fixup", "__jump_table", ".parainstructions", ".smp_locks",
		".static_call", ".orc_", "__mcount_loc", ".return_sites", ".retpoline_sites", ".call_sites", ".ibt_endbr_seal", ".comment", ".note",
		".discard", ".printk_index", "__dyndbg", "__verbose", ".text", ".rodata.cst", ".rodata", ".data.once", ".cfi_sites", ".export_symbol",
		"__ksymtab", "___ksymtab", "__kcrctab", "___kcrctab", ".modinfo", ".BTF_ids", ".gnu.linkonce"} {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

// frame finds the first "sub $n,%rsp" of a function (Intel SDM, SUB: REX.W 83
// /5 ib and 81 /5 id) among its first bytes.
func frame(code []byte) int {
	head := code[:min(len(code), 64)]
	if i := bytes.Index(head, []byte{0x48, 0x83, 0xec}); i >= 0 && i+3 < len(head) {
		return int(head[i+3])
	}
	if i := bytes.Index(head, []byte{0x48, 0x81, 0xec}); i >= 0 && i+7 <= len(head) {
		return int(binary.LittleEndian.Uint32(head[i+3:]))
	}
	return 0
}
