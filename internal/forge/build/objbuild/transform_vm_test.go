// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"debug/elf"
	"encoding/binary"
	"os"
	"slices"
	"strings"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/match"
	"klatch/internal/forge/queue"
	"klatch/internal/testkit/kerneltest"
)

// transformations are changes of functions that the compiler renames or
// splits, and of functions with special sections; all go into one livepatch.
var transformations = []struct {
	name string
	change
	replaced string   // as the kernel calls it
	refers   []string // what the new code must refer to; "!x": must not
	section  string   // that must tell of the new code
}{
	{"scalar replacement", change{"net/unix/af_unix.c", sub("		if (u->addr->len == len &&\n", "		if (u->addr->len == len && len != 4711 &&\n")}, "__unix_find_socket_byname.isra.0", nil, ""},
	{"a part", change{"fs/pnode.c", sub("		type = CL_SLAVE;\n", "		type = CL_SLAVE | CL_PRIVATE;\n")}, "propagate_one.part.0", nil, ""},
	{"a constant propagated", change{"fs/select.c", nopIn("static long do_pselect(")}, "do_pselect.constprop.0", nil, ""},
	{"a cold part", change{"kernel/capability.c", sub("		current->flags |= PF_SUPERPRIV;\n", "		current->flags |= PF_SUPERPRIV | PF_POSTCOREDUMP;\n")}, "ns_capable", []string{"ns_capable.cold"}, ""},
	{"a static local keeps its value", change{"fs/stat.c", sub("		warncount--;\n", "		warncount -= 2;\n")}, "cp_old_stat", []string{"warncount"}, ""},
	{"a new function that is exported", change{"kernel/groups.c", sub("bool may_setgroups(void)\n{",
		"int klatch_exported(int i);\nnoinline int klatch_exported(int i)\n{\n	barrier();\n	return i & 1;\n}\nEXPORT_SYMBOL_GPL(klatch_exported);\n\nbool may_setgroups(void)\n{\n	if (klatch_exported(4710))\n		return false;")},
		"may_setgroups", []string{"klatch_exported"}, ""},
	{"a name that exists twice", change{"fs/proc/fd.c", nopIn("static int seq_show(")}, "seq_show", nil, ""},
	{"an exception table and alternatives", change{"fs/readdir.c", nopIn("static bool filldir64(")}, "filldir64", nil, "__ex_table"},
	{"a jump label of vmlinux", change{"mm/usercopy.c", nopIn("void __check_object_size(")}, "__check_object_size", []string{"bypass_usercopy_checks"}, "__jump_table"},
	{"a static call of vmlinux", change{"arch/x86/events/amd/core.c", nopIn("static void amd_pmu_cpu_reset(")}, "amd_pmu_cpu_starting", []string{"__SCK__amd_pmu_branch_reset"}, ".static_call_sites"},
	{"a warning, a new function, new data and a string", change{utsname, sub("static void utsns_put(",
		"static int klatch_count = 41;\nstatic const char *const klatch_names[] = { \"klatch one\", \"klatch two\" };\n"+
			"static noinline int klatch_new(int i)\n{\n	static int klatch_local;\n	WARN_ON(i == 4711);\n	pr_info(\"klatch %s\\n\", klatch_names[i & 1]);\n	return klatch_count++ + klatch_local++;\n}\n\nstatic void utsns_put(",
		"	put_uts_ns(to_uts_ns(ns));\n", "	if (klatch_new(ns->inum))\n		put_uts_ns(to_uts_ns(ns));\n")}, "utsns_put", []string{"klatch_new"}, ""},
}

// TestWhatTheCompilerMakesOfFunctions builds one livepatch of all of these and
// looks at what is in it.
func TestWhatTheCompilerMakesOfFunctions(t *testing.T) {
	k := kerneltest.Prepared(t)
	var patches []queue.Patch
	for i, c := range transformations {
		p := edit(t, k, c.file, c.edit)
		p.Name, p.Fixes = string(rune('a'+i)), []cve.ID{"CVE-2000-0001"}
		patches = append(patches, p)
	}
	res, _ := run(t, k, k.Cache, patches...)
	if res.Result != build.Built {
		t.Fatalf("result %s: %+v", res.Result, res.Refusals)
	}
	m := readModule(t, res.Module.Path)
	for _, c := range transformations {
		t.Run(c.name, func(t *testing.T) {
			is := func(name string) bool { return name == c.replaced }
			if !slices.ContainsFunc(m.replaced, is) {
				t.Fatalf("%s is not replaced, but %q", c.replaced, m.replaced)
			}
			refs := m.refs[c.replaced]
			if len(refs) == 0 {
				t.Errorf("%s refers to nothing", c.replaced)
			}
			for _, r := range c.refers {
				if !slices.ContainsFunc(slices.Concat(refs, m.refs[c.section+" of all"]), func(s string) bool { return s == r || strings.HasPrefix(s, r+".") }) {
					t.Errorf("%s does not refer to %s, but to %q", c.replaced, r, refs)
				}
			}
			if c.section != "" && !slices.ContainsFunc(m.refs[c.section], func(s string) bool { return strings.HasPrefix(s, c.replaced) }) {
				t.Errorf("%s tells of %q, not of %s", c.section, m.refs[c.section], c.replaced)
			}
			p := slices.IndexFunc(res.Match.Replaced, func(p match.Proved) bool { return p.Function == c.replaced })
			if p < 0 || res.Match.Replaced[p].Bytes == 0 {
				t.Errorf("no proof of %s", c.replaced)
			}
		})
	}
	for _, own := range []string{"klatch_count", "klatch_names", "klatch_new", "klatch_local"} {
		if !slices.ContainsFunc(m.defined, func(s string) bool { return s == own || strings.HasPrefix(s, own+".") }) {
			t.Errorf("the livepatch lacks its own %s: %q", own, m.defined)
		}
	}
	for _, theirs := range []string{"warncount", "bypass_usercopy_checks", "__SCK__amd_pmu_branch_reset"} {
		if slices.ContainsFunc(m.defined, func(s string) bool { return s == theirs || strings.HasPrefix(s, theirs+".") }) {
			t.Errorf("the livepatch has a %s of its own, beside the kernel's", theirs)
		}
	}
	if !strings.Contains(m.text, "klatch two\x00") || !strings.Contains(m.text, "\x016klatch %s\n") {
		t.Error("the new strings are not in the livepatch")
	}
}

// module is what the tests look at of a livepatch.
type module struct {
	replaced []string
	defined  []string
	refs     map[string][]string // of a function or section, by name
	text     string
}

func readModule(t *testing.T, file string) module {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	symbols, err := f.Symbols()
	if err != nil {
		t.Fatal(err)
	}
	m := module{refs: map[string][]string{}, text: string(b)}
	at := func(section int, off uint64) string { // the function at a place
		for _, s := range symbols {
			if int(s.Section) == section && elf.ST_TYPE(s.Info) == elf.STT_FUNC && off >= s.Value && off < s.Value+s.Size {
				return s.Name
			}
		}
		return f.Sections[section].Name
	}
	for _, s := range symbols {
		if s.Section != elf.SHN_UNDEF && int(s.Section) < len(f.Sections) && s.Name != "" {
			m.defined = append(m.defined, s.Name)
		}
	}
	for _, s := range f.Sections {
		if s.Type != elf.SHT_RELA {
			continue
		}
		data, err := s.Data()
		if err != nil {
			t.Fatal(err)
		}
		for ; len(data) >= 24; data = data[24:] {
			n := binary.LittleEndian.Uint64(data[8:]) >> 32
			if n == 0 || n > uint64(len(symbols)) || int(s.Info) >= len(f.Sections) {
				continue
			}
			sym := symbols[n-1]
			name := sym.Name
			if elf.ST_TYPE(sym.Info) == elf.STT_SECTION {
				name = at(int(sym.Section), binary.LittleEndian.Uint64(data[16:]))
			}
			if rest, ok := strings.CutPrefix(name, ".klp.sym."); ok { // object.name,position
				_, rest, _ = strings.Cut(rest, ".")
				name, _, _ = strings.Cut(rest, ",")
			}
			target := f.Sections[s.Info].Name
			if target == ".kpatch.funcs" && sym.Name != "" && elf.ST_TYPE(sym.Info) == elf.STT_FUNC {
				m.replaced = append(m.replaced, name)
			}
			m.refs[target] = append(m.refs[target], strings.TrimPrefix(name, ".text."))
			if f.Sections[s.Info].Flags&elf.SHF_EXECINSTR != 0 {
				fn := at(int(s.Info), binary.LittleEndian.Uint64(data))
				m.refs[fn] = append(m.refs[fn], name)
			} else {
				m.refs[target+" of all"] = append(m.refs[target+" of all"], name)
			}
		}
	}
	return m
}
