// SPDX-License-Identifier: Apache-2.0

package build

import (
	"fmt"
	"slices"
	"strings"

	"klatch/internal/fault"
)

// Class sorts the catalog.
type Class string

// The classes. Warnings do not stop a build.
const (
	Patch       Class = "the source patch"
	Code        Class = "code that cannot be replaced"
	Data        Class = "data"
	Environment Class = "the build environment"
	Limits      Class = "limits"
	Warning     Class = "warnings for the reviewer"
)

// Rule is one entry of the catalog of refusals and warnings.
type Rule struct {
	Code   fault.Code
	Class  Class
	Rule   string // what must hold
	Source string // where that comes from
	Hint   string // what to try
	WayOut string // a known way to write the fix anew, if there is one; never applied by itself
}

// Refuse makes the refusal, or the warning, of a code in the catalog.
func Refuse(code fault.Code, file string) Refusal {
	i := slices.IndexFunc(Catalog, func(r Rule) bool { return r.Code == code })
	if i < 0 {
		panic(fmt.Sprintf("refusal %s is not in the catalog", code)) // a test looks for all of them
	}
	r := Catalog[i]
	hint := r.Hint
	if r.WayOut != "" {
		if hint != "" {
			hint += "; "
		}
		hint += "known way out: " + r.WayOut
	}
	return Refusal{Code: code, File: file, Rule: r.Rule, Hint: hint}
}

const (
	reboot  = "update the kernel package and reboot"
	guide   = "kpatch Patch Author Guide, "
	kernelD = "Documentation/livepatch/livepatch.rst, "
)

// Catalog holds every code that a driver may use. It is what
// docs/reference/refusals.md is made of.
var Catalog = []Rule{
	{"patch_does_not_apply", Patch, "the source patch must fit this kernel's source without fuzz", "patch(1), --fuzz=0",
		"adapt the source patch to this kernel's source, or look whether an earlier one in the queue touches the same lines", ""},
	{"does_not_compile", Patch, "the patched source must compile on this kernel", "",
		"the fix may need another change first: look at what the named symbol needs", ""},
	{"symbol_missing", Patch, "every function and variable that the new code uses must be in this kernel, or in the livepatch", kernelD + "section 4.1",
		"add the change that defines the symbol to the source patch", "a private copy of the missing function"},
	{"nothing_changed", Patch, "a fix must change object code", "create-diff-object, exit status 3; klp-build, \"no changes detected\"",
		"the change may be compiled out in this configuration; leave the file out, or look at the fix again", ""},
	{"nothing_replaced", Patch, "a changed object must have a function to replace", "", "look at the detail", ""},
	{"not_built", Patch, "the kernel was not built from this file: this kernel is not affected", "compilation units of the distribution's debug information",
		"leave the file out; a fix only in files that are not built needs no livepatch", ""},
	{"not_code", Patch, "only C source can be livepatched; this file changes how the kernel is built or generated", "",
		"leave the file out of the source patch if the fix does not need it", ""},
	{"mixed_queue", Patch, "a queue holds either source patches or a hand-written livepatch", "docs/howto/hand-written-livepatch.md",
		"keep two queues, or write the source patches as part of the module", ""},
	{"not_declared", Patch, "livepatch.toml must name exactly what the hand-written module does", "docs/howto/hand-written-livepatch.md",
		"correct livepatch.toml, which the reviewer reads, or the module", ""},
	{"module_shape", Patch, "a hand-written module has one static struct klp_patch, an init function that only enables it, an exit function that does nothing, and offers nothing to others",
		"docs/howto/hand-written-livepatch.md", "do the work in callbacks", ""},
	{"no_replace", Patch, "a livepatch is cumulative: struct klp_patch has replace set", "Documentation/livepatch/cumulative-patches.rst",
		"set .replace = true, and hold all fixes of the queue in the module", ""},

	{"assembly", Code, "assembly has no function borders that the kernel could redirect", kernelD + "section 7, Limitations", reboot, ""},
	{"boot_image", Code, "code of the vDSO, of real mode and of early boot is copied or gone once the kernel runs", "kpatch-build and klp-build refuse these folders too", reboot, ""},
	{"lib_code", Code, "klp-build takes no changes below lib/: parts of it are linked into other programs of the kernel's build", "scripts/livepatch/klp-build, check_unsupported_patches",
		reboot, "make the change in the callers, in a private copy of the function"},
	{"init_code", Code, "code that runs only at boot or at a module's load or unload cannot be livepatched", guide + "Init code changes",
		reboot, "do the same work for what is already initialized in a post-patch callback"},
	{"not_traceable", Code, "the function cannot be traced, so the kernel cannot redirect it", kernelD + "section 7: functions must be traceable by ftrace",
		"patch its callers instead", "a private copy of the function that the patched callers call"},
	{"not_patchable", Code, "a changed function must have a section of its own; those of .sched.text and such have not", "include/asm-generic/vmlinux.lds.h; create-diff-object",
		"change what it calls, or what calls it, instead", ""},
	{"ambiguous_symbol", Code, "the kernel finds functions and variables by name and position; among several of one name the position must be known", "kernel/livepatch/core.c, klp_find_object_symbol",
		reboot, ""},
	{"static_key", Code, "the function uses a static key that belongs to a module, which a livepatch cannot follow", guide + "Jump labels and static calls",
		"", "use static_key_enabled() in the patched function"},
	{"static_call", Code, "the function uses a static call that belongs to a module, which a livepatch cannot follow", guide + "Jump labels and static calls",
		"", "call through static_call_query() in the patched function"},
	{"landing_pad_gone", Code, "on a kernel with indirect branch tracking a function is called by address only if the kernel itself does so somewhere: it takes the landing pad away from all others at boot",
		"arch/x86/kernel/alternative.c, apply_seal_endbr; tools/objtool, .ibt_endbr_seal", "", "call the function from a new one in the source patch, and use the address of that"},
	{"no_such_function", Code, "a replaced function must be in the kernel, at the position that is said", kernelD + "section 4.1; old_sympos in include/linux/livepatch.h",
		"look into the kernel's symbol table, where clones of the compiler's have other names", ""},
	{"prototype_changed", Code, "a hand-written function must have the prototype of the one that it replaces", kernelD + "section 4.1",
		"take the prototype from the kernel's source, types and all", ""},
	{"unreconcilable", Code, "the differ met a change that it cannot carry over", "create-diff-object",
		"look at the detail; make the change smaller, move it into functions, leave static variables where they are", ""},
	{"differ_refused", Code, "the differ refused the change", "create-diff-object, objtool klp", "look at the detail; a smaller source patch often helps", ""},
	{"export_changed", Code, "what is exported must stay so, with its prototype: loaded modules call it by the old one", guide + "Exported symbol versioning",
		reboot, "add a new function with the new prototype and leave the exported one"},

	{"data_changed", Data, "initialized data must keep its value: the present value lives in the running kernel", guide + "Data semantic changes",
		"set the new value in a function that runs afterwards", "set it in a pre-patch callback, only where it still has its old value"},
	{"layout_changed", Data, "a data type must keep its layout: objects of the old layout are alive", guide + "Data structure changes",
		"fix it without the member, or " + reboot, "keep the new value in a shadow variable (klp_shadow_alloc)"},
	{"ops_table_changed", Data, "a table of functions must stay as it is: the kernel holds pointers to the old one", guide + "Data structure changes",
		"change the functions that the table names instead of the table", "set the pointer in a callback, and undo it in another"},
	{"section_changed", Data, "only sections that the builder knows may change", "ELF sections of the kernel, include/asm-generic/vmlinux.lds.h",
		"leave this part of the change out", ""},

	{"match_failed", Environment, "compiled unpatched, the function must be byte for byte what the kernel runs", "docs/reference/build.md, The match proof",
		"the function may be built differently in the kernel (weak, or by another rule)", ""},
	{"wrong_environment", Environment, "compiler, configuration, source and flags must be the distribution's own", "docs/reference/build.md, The match proof",
		"add the kernel again with klatch-forge kernel add", ""},
	{"needs_module", Environment, "a livepatch must load without another module being there", kernelD + "section 4.3",
		"patch the module's own function instead of calling it", ""},

	{"header_fanout", Limits, "a header may reach a limited number of object files", "our own limit: compile time, and risk",
		"", "give the new text to the .c files that need it"},
	{"module_name_too_long", Limits, "a module's name has at most 55 bytes", "include/linux/moduleparam.h, MODULE_NAME_LEN", "use a shorter name", ""},

	{"lock_changed", Warning, "a lock was added or removed: tasks that run old and new code at once must still exclude each other", kernelD + "section 3, Consistency model",
		"look whether old and new code may meet on the same data", ""},
	{"new_wait", Warning, "the new code may wait where the old did not", kernelD + "section 3, Consistency model", "look who calls it, and with which locks", ""},
	{"return_changed", Warning, "the meaning of a return value may have changed: callers that are not patched see it too", guide + "Data semantic changes",
		"look at all callers", ""},
	{"sleeps", Warning, "tasks sleep in this function: the transition waits for each of them", kernelD + "section 3, Consistency model",
		"expect a long transition; patch what it calls instead if that is enough", ""},
	{"stack_grown", Warning, "the new code takes much more of the stack", "kernel stacks have 16 KiB, Documentation/x86/kernel-stacks.rst",
		"look how deep the function is called", ""},
	{"not_proved", Warning, "a hand-written function does what its author wrote: only what it replaces was compared with the kernel, not what it does", "docs/reference/build.md, Hand-written livepatches",
		"compare it line by line with the kernel's function", ""},
	{"inlined", Warning, "callers into which the compiler inlined the function keep the old code", "debug information of the unpatched file",
		"replace these callers too", ""},
	{"callbacks", Warning, "callbacks run only of the newer livepatch when one replaces another", "Documentation/livepatch/cumulative-patches.rst, Limitations",
		"look that the callbacks find what an earlier livepatch left, and that a later one can do without theirs", ""},
	{"new_pointer", Warning, "nobody may keep a pointer into the livepatch: its code goes when a newer livepatch replaces it", kernelD + "section 4.4, Replacing",
		"look whether the address is stored (a timer, a work item, a callback) or only used during the call", "point to a function that the kernel has, and change that one"},
	{"callers_replaced", Warning, "the function cannot be traced: the livepatch replaces those that call it, and they call a copy of its own", kernelD + "section 7: functions must be traceable by ftrace",
		"look at the callers in the detail as well", ""},
	{"layout_local", Warning, "the layout of a data type changed whose objects live only within calls of functions that are replaced", "docs/reference/build.md, Data layout",
		"look whether an object of this type can outlive the call, or be seen by another task", ""},
	{"layout_meaning", Warning, "a member was renamed, or its bits are read otherwise: objects that are alive hold the old meaning", guide + "Data semantic changes",
		"look what old objects hold in it", ""},
	{"merged", Warning, "two source patches change one function; they were merged in the queue's order", "",
		"look at the merged function as a whole", ""},
}

// Document writes the catalog as Markdown.
func Document() string {
	var b strings.Builder
	b.WriteString("# Refusals and warnings of the builders\n\n" +
		"<!-- Made by `go test ./internal/forge/build -run TestCatalogIsDocumented -args -update`. -->\n\n" +
		"A refusal is about the fix: code, place (file, function, type or section), rule and what to try. `not_built` and\n" +
		"`nothing_changed` say that this kernel does not need the change. A known way out is text for the author of the fix; it is\n" +
		"never applied by itself. Codes are a promise; texts are not.\n")
	var class Class
	for _, r := range Catalog {
		if r.Class != class {
			class = r.Class
			fmt.Fprintf(&b, "\n## %s%s\n\n| code | rule | source | what to try |\n| --- | --- | --- | --- |\n", strings.ToUpper(string(class[:1])), class[1:])
		}
		try := r.Hint
		if r.WayOut != "" {
			if try != "" {
				try += "; "
			}
			try += "known way out: " + r.WayOut
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", r.Code, r.Rule, r.Source, try)
	}
	return b.String()
}
