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
	Shared  Kind = "not_patchable"
	NoTrace Kind = "not_traceable"
)

// Delta is what differs between two builds of an object.
type Delta struct {
	Functions []string // changed, by name
	New       []string // functions
	Stopping  []Change
	Undefined []string // symbols that only the patched object needs
	Defined   []string // global symbols of the patched object
	Frames    []Frame  // that grew
	Pointers  []Pointer
}

// Pointer is a place where the address of a new function is taken.
type Pointer struct{ User, Function string }

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
	old := index(before.things, nil)
	now := index(after.things, old)
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
		case had && same(o, n):
		case untraced(n.section):
			d.Stopping = append(d.Stopping, Change{NoTrace, n.name, n.section, "code of this section runs before the kernel can trace"})
		case shared(n.section):
			d.Stopping = append(d.Stopping, Change{Shared, n.name, n.section, "the kernel gathers such functions in one section, which cannot be taken apart"})
		case !had:
			d.New = append(d.New, n.name)
			changed[n.name] = true
		default:
			d.Functions = append(d.Functions, n.name)
			changed[n.name] = true
			if was, is := frame(o.content), frame(n.content); is > was {
				d.Frames = append(d.Frames, Frame{n.name, was, is})
			}
		}
	}
	d.data(old, now, after, changed)
	d.pointers(now, changed)
	for name := range before.exported {
		if !after.exported[name] {
			d.Stopping = append(d.Stopping, Change{Export, name, "__ksymtab", "it is not exported any more"})
		}
	}
	d.tables(old, now)
	d.unnamed(before.sections, after.sections)
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

// tables looks at what only one of the builds has: the kernel reads its tables
// at boot, or when a module comes, so that a new entry would not be seen and a
// removed one stays in force.
func (d *Delta) tables(old, now map[string]thing) {
	for _, k := range keys(now) {
		n := now[k]
		if _, had := old[k]; !had && !n.function && !ordinary(n.section) && !ownState(n.section) && !once(n.section) {
			d.Stopping = append(d.Stopping, Change{Section, n.name, n.section, "the kernel has read this table already and would not see a new entry"})
		}
	}
	for _, k := range keys(old) {
		o := old[k]
		if _, stays := now[k]; stays || ownState(o.section) {
			continue
		}
		switch {
		case once(o.section) && o.function:
			d.Stopping = append(d.Stopping, Change{Once, o.name, o.section, "it is removed, but has run already"})
		case !o.function && !ordinary(o.section) && !once(o.section):
			d.Stopping = append(d.Stopping, Change{Section, o.name, o.section, "the kernel has read this table already; the removed entry stays in force"})
		}
	}
}

// unnamed compares sections that nobody knows by the content of both builds.
func (d *Delta) unnamed(before, after map[string][]byte) {
	for _, name := range keys(after) {
		if was, had := before[name]; !known(name) && (!had || !bytes.Equal(was, after[name])) {
			d.Stopping = append(d.Stopping, Change{Section, "", name, "its content differs"})
		}
	}
	for _, name := range keys(before) {
		if _, stays := after[name]; !stays && !known(name) {
			d.Stopping = append(d.Stopping, Change{Section, "", name, "it is removed, but the kernel has used it already"})
		}
	}
}

// pointers finds where changed functions, and data that they bring, take the
// address of a new function. That of a changed one is no trouble: the differ
// makes it the address of the kernel's own.
func (d *Delta) pointers(now map[string]thing, changed map[string]bool) {
	for _, k := range keys(now) {
		n := now[k]
		if n.function && !changed[n.name] {
			continue
		}
		for _, r := range n.refs {
			p := Pointer{n.name, r.target}
			if r.address && r.addend == 0 && slices.Contains(d.New, r.target) && !slices.Contains(d.Pointers, p) {
				d.Pointers = append(d.Pointers, p)
			}
		}
	}
}

// Copies looks at a differ's output for variables that the kernel has already:
// the new functions would use a second one, and the running value be lost.
func Copies(original, patched, diff []byte) ([]Change, error) {
	var counts [3]map[string]int
	var out []Change
	for i, b := range [][]byte{original, patched, diff} {
		o, err := read(b)
		if err != nil {
			return nil, err
		}
		counts[i] = map[string]int{}
		for _, t := range o.things {
			if t.function || ownState(t.section) || !strings.HasPrefix(t.section, ".data") && !strings.HasPrefix(t.section, ".bss") {
				continue
			}
			counts[i][t.name]++
			if i == 2 && counts[0][t.name] > 0 && counts[2][t.name] > counts[1][t.name]-counts[0][t.name] && !harmless(t.name) {
				out = append(out, Change{Data, t.name, t.section, "the livepatch would bring a second copy of this variable and lose the running value"})
			}
		}
	}
	return out, nil
}

// harmless variables limit what is printed (include/linux/ratelimit.h).
func harmless(name string) bool {
	return slices.Contains([]string{"_rs", "__warned", "__print_once"}, name)
}

// Exports lists what an object exports to modules, by name.
func Exports(content []byte) (map[string]bool, error) {
	o, err := read(content)
	if err != nil {
		return nil, err
	}
	return o.exported, nil
}

func refersToCode(a, b thing) bool {
	is := func(r reference) bool { return r.code }
	if !slices.ContainsFunc(a.refs, is) && !slices.ContainsFunc(b.refs, is) {
		return false
	}
	return !slices.EqualFunc(onlyCode(a.refs), onlyCode(b.refs), reference.means)
}

func onlyCode(refs []reference) []reference {
	return slices.DeleteFunc(slices.Clone(refs), func(r reference) bool { return !r.code })
}

// unchangedUsers lists what stays as it is and refers to a variable. Several
// may have one name: each function with a __func__ has its own.
func unchangedUsers(n thing, after *object, changed map[string]bool) []string {
	var users []string
	for _, t := range after.things {
		if t.symbol == n.symbol || t.function && changed[t.name] {
			continue
		}
		if slices.ContainsFunc(t.refs, func(r reference) bool { return r.symbol == n.symbol }) {
			users = append(users, t.name)
		}
	}
	return users
}

// index names each thing, with a count where a name occurs several times, as
// static variables of different functions do. Of these the ones that are the
// same in the other build get the same name, the rest one in their order.
func index(ts []thing, other map[string]thing) map[string]thing {
	out := map[string]thing{}
	var rest []thing
	for _, t := range ts {
		found := false
		for k := t.name; !found; k += "'" {
			o, had := other[k]
			if !had {
				break
			}
			if _, taken := out[k]; !taken && baseName(o.section) == baseName(t.section) && same(o, t) {
				out[k], found = t, true
			}
		}
		if !found {
			rest = append(rest, t)
		}
	}
	for _, t := range rest {
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
	return a.size == b.size && bytes.Equal(a.content, b.content) && slices.EqualFunc(a.refs, b.refs, reference.means)
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

// ordinary sections hold variables and constants that only code refers to.
func ordinary(section string) bool {
	for _, p := range []string{".data", ".bss", ".sdata"} {
		if strings.HasPrefix(section, p) {
			return true
		}
	}
	return constant(section)
}

// shared says whether a section holds more than one function even where each
// has one of its own (include/asm-generic/vmlinux.lds.h: SCHED_TEXT and such).
func shared(section string) bool { return !strings.HasPrefix(section, ".text") }

// untraced sections are those of noinstr (include/linux/compiler_types.h).
func untraced(section string) bool {
	return strings.HasPrefix(section, ".noinstr.text") || strings.HasPrefix(section, ".entry.text")
}

// ownState holds flags of one place in the code, and descriptions of it with
// line numbers: the new code brings its own.
func ownState(section string) bool {
	for _, p := range []string{".data.once", ".data..once", "__dyndbg", "__verbose", ".printk_index", "__bug_table", ".discard", "__patchable", ".modinfo"} {
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
		".discard", ".printk_index", "__dyndbg", "__verbose", ".text", ".rodata.cst", ".rodata", ".data.once", ".data..once", ".cfi_sites", ".export_symbol",
		"__ksymtab", "___ksymtab", "__kcrctab", "___kcrctab", ".modinfo", ".gnu.linkonce", "__patchable_function_entries"} {
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
