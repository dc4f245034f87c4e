// SPDX-License-Identifier: Apache-2.0

package source

import (
	"debug/elf"
	"slices"
	"strings"
)

// What the functions that run at load and unload may refer to. They run
// outside of the livepatch's own rules: init before the kernel knows the
// livepatch, exit of a replaced module while the newer one works, perhaps on
// the same shadow variables.
var (
	compilerCalls = []string{"__fentry__", "__x86_return_thunk"}
	initCalls     = append([]string{"klp_enable_patch"}, compilerCalls...)
)

// offered are sections through which a module offers something, or by which
// code runs at load besides init.
var offered = []string{"__ksymtab", "__kcrctab", ".export_symbol", "__param", ".init_array", ".ctors", ".fini_array", ".dtors"}

// checkShape looks that nothing but the tables decides what the kernel is
// told: they are never changed, nothing else runs at load.
func (f *file) checkShape(t tables) error {
	for _, s := range f.Sections {
		if s.Flags&elf.SHF_ALLOC != 0 && s.Size > 0 && slices.ContainsFunc(offered, func(p string) bool { return strings.HasPrefix(s.Name, p) }) {
			return shapef("the module has a section %s: it exports something, has a parameter, or other code that runs at load", s.Name)
		}
	}
	in, err := f.whole("init_module", ".init.text")
	if err != nil {
		return err
	}
	out, err := f.whole("cleanup_module", ".exit.text")
	if err != nil {
		return err
	}
	started, references := false, 0
	for i, list := range f.relocs {
		code := f.Sections[i].Flags&elf.SHF_EXECINSTR != 0
		for _, r := range list {
			inInit, inExit := covers(in, i, r.off), covers(out, i, r.off)
			inTables := slices.ContainsFunc(t.ranges, func(s span) bool { return r.section == s.section && r.touches(s, code) })
			switch {
			case code && inInit && r.isStart(t.starts): // the argument of klp_enable_patch
			case code && inInit && r.symbol == "klp_enable_patch":
				started = true
			case code && inInit && !slices.Contains(initCalls, r.symbol):
				return shapef("init refers to %s", f.name(r))
			case code && inExit && !slices.Contains(compilerCalls, r.symbol):
				return shapef("exit refers to %s", f.name(r))
			case r.symbol == "klp_enable_patch":
				return shapef("a function besides init refers to klp_enable_patch")
			case inTables && code:
				return shapef("code refers to the tables of the livepatch")
			case inTables && !slices.ContainsFunc(t.ranges, func(s span) bool { return s.holds(i, r.off) }):
				return shapef("other data refers to the tables of the livepatch")
			case inTables:
				references++
			}
		}
	}
	if !started {
		return shapef("init does not call klp_enable_patch")
	}
	if want := len(t.ranges) - 1; references != want { // each table but the first is named once
		return shapef("the tables of the livepatch refer to each other %d times, want %d", references, want)
	}
	return nil
}

// whole is the code that runs with a function: itself, and its section if that
// is all of its kind.
func (f *file) whole(function, section string) ([]span, error) {
	var all []span
	for _, s := range f.symbols {
		if s.Name == function && elf.ST_TYPE(s.Info) == elf.STT_FUNC && s.Section != elf.SHN_UNDEF {
			all = append(all, span{int(s.Section), s.Value, s.Value + s.Size})
		}
	}
	if len(all) != 1 {
		return nil, shapef("the module has no %s: it needs module_init and module_exit", function)
	}
	for i, s := range f.Sections {
		if s.Name == section {
			all = append(all, span{i, 0, s.Size})
		}
	}
	return all, nil
}

func covers(all []span, section int, at uint64) bool {
	return slices.ContainsFunc(all, func(s span) bool { return s.holds(section, at) })
}

// slack is by how much a reference from code may look wrong: it counts from
// the end of its instruction, which may have an operand of up to four bytes
// after the field (Intel SDM 2.2.1.6).
const slack = 4

// touches says whether the reference may lead into a span.
func (r reloc) touches(s span, code bool) bool {
	from, to := int64(s.from), int64(s.to) //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
	if !code || r.kind == elf.R_X86_64_32S || r.kind == elf.R_X86_64_64 || r.kind == elf.R_X86_64_32 {
		return r.at >= from && r.at < to
	}
	at := r.at + 4
	return at+slack >= from && at < to
}

// isStart says whether the reference is exactly the start of a span.
func (r reloc) isStart(s span) bool {
	if r.section != s.section {
		return false
	}
	at := r.at
	if r.kind == elf.R_X86_64_PC32 {
		at += 4
	}
	return at == int64(s.from) //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
}

// name says what a reference leads to.
func (f *file) name(r reloc) string {
	if r.section == 0 {
		return r.symbol
	}
	for _, s := range f.symbols {
		if kind := elf.ST_TYPE(s.Info); int(s.Section) == r.section && (kind == elf.STT_OBJECT || kind == elf.STT_FUNC) &&
			r.at+4+slack >= int64(s.Value) && r.at < int64(s.Value+s.Size) { //nolint:gosec // sizes and offsets in a file of at most livepatch.MaxModule
			return s.Name
		}
	}
	return f.Sections[r.section].Name
}

// undefined lists what the module takes from the kernel.
func (f *file) undefined() []string {
	var out []string
	for _, s := range f.symbols {
		if s.Section == elf.SHN_UNDEF && s.Name != "" {
			out = append(out, s.Name)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
