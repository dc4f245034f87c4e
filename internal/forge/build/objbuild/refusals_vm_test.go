// SPDX-License-Identifier: Apache-2.0

//go:build vm

package objbuild_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"klatch/internal/cve"
	"klatch/internal/fault"
	"klatch/internal/forge/build"
	"klatch/internal/forge/build/objbuild"
	"klatch/internal/forge/compose"
	"klatch/internal/forge/queue"
	"klatch/internal/testkit/kerneltest"
)

// change is a change of one file of the kernel's source.
type change struct {
	file string
	edit func(string) string
}

// place is where a refusal must point to; an empty member is not compared.
type place struct{ file, function, section, detail string }

// refusalCase is one code of the catalogue: a change of the real kernel's
// source that must get it, and one beside it that must not.
type refusalCase struct {
	code fault.Code
	name string
	make []change // each a source patch of its own
	at   place
	near []change
	ends fault.Code // of the near miss; empty: it is built
	with func(*compose.Plan, *objbuild.Driver)
}

const eventfd, utsname, timens = "fs/eventfd.c", "kernel/utsname.c", "kernel/time/namespace.c"

func sub(pairs ...string) func(string) string {
	return func(s string) string {
		for i := 0; i < len(pairs); i += 2 {
			if !strings.Contains(s, pairs[i]) {
				return s
			}
			s = strings.Replace(s, pairs[i], pairs[i+1], 1)
		}
		return s
	}
}

func all(fs ...func(string) string) func(string) string {
	return func(s string) string {
		for _, f := range fs {
			s = f(s)
		}
		return s
	}
}

func end(text string) func(string) string { return func(s string) string { return s + text } }

// eventfdRead is a line of eventfd_ctx_do_read, which eventfd_read and
// eventfd_ctx_remove_wait_queue call.
const eventfdRead = "	ctx->count -= *cnt;\n"

// refusalCases are the codes that the object builder gives. Codes with more
// than one cause have more than one case.
var refusalCases = []refusalCase{
	{code: "does_not_compile", make: []change{{eventfd, end("int x = y;\n")}}, at: place{file: eventfd, detail: "error:"},
		near: []change{{eventfd, all(end("static int unused_one;\n"), nopIn("static int eventfd_release("))}}},
	{code: "symbol_missing", name: "nobody has it",
		make: []change{{eventfd, all(end("\n"), sub("static DEFINE_IDA", "extern int klatch_nowhere(void);\nstatic DEFINE_IDA", eventfdRead, eventfdRead+"	klatch_nowhere();\n"))}},
		at:   place{file: eventfd, function: "klatch_nowhere"},
		near: []change{{eventfd, sub("static DEFINE_IDA", "extern void free_uts_ns(void *);\nstatic DEFINE_IDA", eventfdRead, eventfdRead+"	free_uts_ns(0);\n")}}},
	{code: "symbol_missing", name: "static in another file",
		make: []change{{eventfd, sub("static DEFINE_IDA", "extern int timens_install(void);\nstatic DEFINE_IDA", eventfdRead, eventfdRead+"	timens_install();\n")}},
		at:   place{file: eventfd, function: "timens_install"},
		near: []change{{eventfd, sub("static DEFINE_IDA", "extern void timens_on_fork(void);\nstatic DEFINE_IDA", eventfdRead, eventfdRead+"	timens_on_fork();\n")}}},
	{code: "nothing_changed", make: []change{{eventfd, end("/* more */\n")}}, at: place{file: eventfd},
		near: []change{{eventfd, sub("ULLONG_MAX - ctx->count > ucnt", "ULLONG_MAX - ctx->count > ucnt + 1")}}},
	{code: "nothing_replaced", make: []change{{eventfd, end("int klatch_fresh(int a) { return a * 3; }\n")}}, at: place{file: eventfd},
		near: []change{{eventfd, end("int klatch_fresh(int a);\nint klatch_fresh(int a) { return a * 3; }\n")},
			{utsname, sub("	get_uts_ns(old_ns);\n", "	{ extern int klatch_fresh(int); if (klatch_fresh(flags) == 5) return old_ns; }\n	get_uts_ns(old_ns);\n")}}},
	{code: "not_built", make: []change{{"net/appletalk/ddp.c", nopIn("static int atalk_release(")}}, at: place{file: "net/appletalk/ddp.c"},
		near: []change{{"net/appletalk/ddp.c", nopIn("static int atalk_release(")}, {eventfd, nopIn("static int eventfd_release(")}}},
	{code: "not_code", make: []change{{"fs/Makefile", end("# more\n")}}, at: place{file: "fs/Makefile"},
		near: []change{{"Documentation/filesystems/proc.rst", end("\nMore.\n")}}, ends: "not_built"},

	{code: "assembly", make: []change{{"arch/x86/lib/putuser.S", end("/* more */\n")}}, at: place{file: "arch/x86/lib/putuser.S"},
		near: []change{{"arch/x86/lib/memmove_32.S", end("/* more */\n")}}, ends: "not_built"},
	{code: "boot_image", make: []change{{"lib/vdso/gettimeofday.c", end("/* more */\n")}}, at: place{file: "lib/vdso/gettimeofday.c"},
		near: []change{{"arch/x86/entry/vdso/vma.c", nopIn("static vm_fault_t vdso_fault(")}}},
	{code: "boot_image", name: "its header", make: []change{{"include/vdso/helpers.h", end("/* more */\n")}}, at: place{file: "include/vdso/helpers.h"}},
	{code: "init_code", make: []change{{utsname, nopIn("void __init uts_ns_init(")}}, at: place{file: utsname, function: "uts_ns_init", section: ".init.text"},
		near: []change{{utsname, nopIn("static void utsns_put(")}}},
	{code: "init_code", name: "of a module's end", make: []change{{"drivers/net/dummy.c", nopIn("static void __exit dummy_cleanup_module(")}},
		at:   place{file: "drivers/net/dummy.c", function: "dummy_cleanup_module", section: ".exit.text"},
		near: []change{{"drivers/net/dummy.c", nopIn("static void dummy_get_stats64(")}}},
	{code: "not_traceable", make: []change{{"lib/argv_split.c", nopIn("void argv_free(")}}, at: place{file: "lib/argv_split.c", function: "argv_free"},
		near: []change{{"lib/argv_split.c", end("/* more */\n")}}, ends: "nothing_changed"},
	{code: "not_traceable", name: "notrace", make: []change{{"kernel/sched/clock.c", nopIn("unsigned long long notrace sched_clock(")}},
		at: place{file: "kernel/sched/clock.c"}, near: []change{{"kernel/sched/clock.c", nopIn("void clear_sched_clock_stable(")}}},
	{code: "not_patchable", make: []change{{"kernel/locking/semaphore.c", nopIn("void __sched down(")}}, at: place{file: "kernel/locking/semaphore.c"},
		near: []change{{"kernel/locking/semaphore.c", nopIn("static noinline void __sched __up(")}}},
	{code: "static_key", make: []change{{"net/netfilter/nf_tables_core.c", nopIn("nft_do_chain(")}}, at: place{file: "net/netfilter/nf_tables_core.c", function: "nft_do_chain"},
		near: []change{{"kernel/stackleak.c", nopIn("static __always_inline void __stackleak_erase(")}}},
	{code: "static_call", make: []change{{"arch/x86/kvm/pmu.c", nopIn("bool kvm_pmu_is_valid_rdpmc_ecx(")}}, at: place{file: "arch/x86/kvm/pmu.c"},
		near: []change{{"arch/x86/kvm/pmu.c", nopIn("void kvm_pmu_trigger_event(")}}},
	{code: "export_changed", make: []change{{eventfd, sub("EXPORT_SYMBOL_GPL(eventfd_fget);\n", "")}}, at: place{file: eventfd, function: "eventfd_fget"},
		near: []change{{eventfd, nopIn("struct file *eventfd_fget(")}}},
	{code: "export_changed", name: "its prototype", make: []change{
		{"drivers/base/map.c", end("\n")},
		{"kernel/groups.c", sub("void groups_sort(struct group_info *group_info)", "void groups_sort(const struct group_info *group_info)", "sort(group_info->gid", "sort((void *)group_info->gid")},
		{"include/linux/cred.h", sub("extern void groups_sort(struct group_info *)", "extern void groups_sort(const struct group_info *)")}},
		at:   place{file: "kernel/groups.c", function: "groups_sort"},
		near: []change{{"kernel/groups.c", nopIn("void groups_sort(struct")}}},

	{code: "data_changed", make: []change{{eventfd, sub("\"[eventfd]\"", "\"[eventfe]\"", "static DEFINE_IDA", "static int klatch_v = 1;\nstatic DEFINE_IDA")}}, near: nil},
	{code: "ops_table_changed", make: []change{{timens, sub(".owner		= timens_owner,\n", "")}}, at: place{file: timens, function: "timens_operations"},
		near: []change{{timens, nopIn("static struct user_namespace *timens_owner(")}}},
	{code: "section_changed", make: []change{{eventfd, all(end("NOKPROBE_SYMBOL(eventfd_release);\n"), sub("#include <linux/kref.h>\n", "#include <linux/kref.h>\n#include <linux/kprobes.h>\n"))}},
		at: place{file: eventfd, section: "_kprobe_blacklist"}, near: []change{{eventfd, sub("#include <linux/kref.h>\n", "#include <linux/kref.h>\n#include <linux/kprobes.h>\n", eventfdRead, eventfdRead+"	barrier();asm volatile(\"nop\");\n")}}},
	{code: "match_failed", make: []change{{"kernel/irq/proc.c", nopIn("int __weak arch_show_interrupts(")}}, at: place{file: "kernel/irq/proc.c", function: "arch_show_interrupts"},
		near: []change{{"kernel/irq/proc.c", nopIn("static int irq_spurious_proc_show(")}}},

	{code: "new_wait", make: []change{{eventfd, sub(eventfdRead, eventfdRead+"	msleep(1);\n", "#include <linux/kref.h>\n", "#include <linux/kref.h>\n#include <linux/delay.h>\n")}},
		at: place{file: eventfd, function: "eventfd_ctx_do_read"}, near: []change{{eventfd, sub(eventfdRead, eventfdRead+"	mdelay(1);\n", "#include <linux/kref.h>\n", "#include <linux/kref.h>\n#include <linux/delay.h>\n")}}},
}

// shared is one driver for all cases, so that each file is compiled unpatched
// once.
func check(t *testing.T, k kerneltest.Kernel, d *objbuild.Driver, with func(*compose.Plan, *objbuild.Driver), changes []change) build.Result {
	t.Helper()
	var patches []queue.Patch
	for i, c := range changes {
		p := edit(t, k, c.file, c.edit)
		p.Name, p.Fixes = string(rune('a'+i)), []cve.ID{"CVE-2000-0001"}
		patches = append(patches, p)
	}
	plan, err := compose.New(k.Entry, patches, k.Tools.Version(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if with != nil {
		d = &objbuild.Driver{Cache: d.Cache, Tools: d.Tools}
		with(&plan, d)
	}
	res, err := d.Check(context.WithoutCancel(t.Context()), plan, build.NewClock(nil))
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func TestEveryCode(t *testing.T) {
	k := kerneltest.Prepared(t)
	d := &objbuild.Driver{Cache: k.Cache, Tools: k.Tools}
	for _, c := range refusalCases {
		name := string(c.code)
		if c.name != "" {
			name += ", " + c.name
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			res := check(t, k, d, c.with, c.make)
			found := slices.Concat(res.Refusals, res.Warnings)
			i := slices.IndexFunc(found, func(r build.Refusal) bool { return r.Code == c.code })
			if i < 0 {
				t.Fatalf("result %s, want %s: %+v, functions %v", res.Result, c.code, found, res.Functions)
			}
			t.Logf("%+v", found[i])
			r := found[i]
			if r.Rule == "" || r.Hint == "" || c.at.file != "" && r.File != c.at.file || c.at.function != "" && r.Function != c.at.function ||
				c.at.section != "" && r.Section != c.at.section || !strings.Contains(r.Detail, c.at.detail) {
				t.Errorf("refusal %+v, want place %+v", r, c.at)
			}
			if len(c.near) == 0 {
				t.Fatal("no near miss")
			}
			res = check(t, k, d, c.with, c.near)
			if slices.ContainsFunc(slices.Concat(res.Refusals, res.Warnings), func(r build.Refusal) bool { return r.Code == c.code }) {
				t.Errorf("near miss: %+v %+v", res.Refusals, res.Warnings)
			}
			switch {
			case c.ends == "" && res.Result != build.Built:
				t.Errorf("near miss is %s: %+v", res.Result, res.Refusals)
			case c.ends != "" && !slices.ContainsFunc(slices.Concat(res.Refusals, res.Warnings), func(r build.Refusal) bool { return r.Code == c.ends }):
				t.Errorf("near miss is %s, want %s: %+v", res.Result, c.ends, res.Refusals)
			}
		})
	}
}
