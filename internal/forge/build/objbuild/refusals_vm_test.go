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

// refusalCase is one code of the catalog: a change of the real kernel's
// source that must get it, and one beside it that must not.
type refusalCase struct {
	code           fault.Code
	name           string
	make           []change // each a source patch of its own
	at             place
	near           []change
	ends           fault.Code // of the near miss; empty: it is built
	with, nearWith func(*compose.Plan, *objbuild.Driver)
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
	{code: "patch_does_not_apply", make: []change{{eventfd, sub(eventfdRead, eventfdRead+"	*cnt += 0;\n")}, {eventfd, sub(eventfdRead, "	ctx->count -= *cnt + 1;\n")}},
		at:   place{file: eventfd, detail: "+	ctx->count -= *cnt + 1;"}, // the reject
		near: []change{{eventfd, sub(eventfdRead, eventfdRead+"	barrier();\n	asm volatile(\"nop\");\n")}, {eventfd, nopIn("static int eventfd_release(")}}},
	{code: "does_not_compile", make: []change{{eventfd, end("int x = y;\n")}}, at: place{file: eventfd, detail: "error:"},
		near: []change{{eventfd, all(end("static int unused_one;\n"), nopIn("static int eventfd_release("))}}},
	{code: "symbol_missing", name: "nobody has it",
		make: []change{{eventfd, sub(ida, "extern int klatch_nowhere(void);\n"+ida, eventfdRead, eventfdRead+"	klatch_nowhere();\n")}},
		at:   place{file: eventfd, function: "klatch_nowhere"},
		near: []change{{eventfd, sub(ida, "extern void free_uts_ns(void *);\n"+ida, eventfdRead, eventfdRead+"	free_uts_ns(0);\n")}}},
	{code: "symbol_missing", name: "static in another file",
		make: []change{{eventfd, sub(ida, "extern int timens_install(void);\n"+ida, eventfdRead, eventfdRead+"	timens_install();\n")}},
		at:   place{file: eventfd, function: "timens_install"},
		near: []change{{eventfd, sub(ida, "extern void timens_on_fork(void);\n"+ida, eventfdRead, eventfdRead+"	timens_on_fork();\n")}}},
	{code: "symbol_missing", name: "not exported to a module",
		make: []change{{filter, sub(filterInit, "extern void timens_on_fork(void);\n"+filterInit, filterFirst, "	timens_on_fork();\n"+filterFirst)}},
		at:   place{file: filter, function: "timens_on_fork"},
		near: []change{{filter, sub(filterInit, "struct eventfd_ctx; void eventfd_ctx_put(struct eventfd_ctx *ctx);\n"+filterInit, filterFirst, "	eventfd_ctx_put(NULL);\n"+filterFirst)}}},
	{code: "nothing_changed", make: []change{{eventfd, end("/* more */\n")}}, at: place{file: eventfd},
		near: []change{{eventfd, sub("ULLONG_MAX - ctx->count > ucnt", "ULLONG_MAX - ctx->count > ucnt + 1")}}},
	{code: "nothing_replaced", make: []change{{eventfd, end("int klatch_fresh(int a) { return a * 3; }\n")}}, at: place{file: eventfd},
		near: []change{{eventfd, end("int klatch_fresh(int a) { return a * 3; }\n")},
			{utsname, sub("	get_uts_ns(old_ns);\n", "	{ extern int klatch_fresh(int); if (klatch_fresh(flags) == 5) return old_ns; }\n	get_uts_ns(old_ns);\n")}}},
	{code: "not_built", make: []change{{"net/appletalk/ddp.c", nopIn("static int atalk_release(")}}, at: place{file: "net/appletalk/ddp.c"},
		near: []change{{"net/appletalk/ddp.c", nopIn("static int atalk_release(")}, {eventfd, nopIn("static int eventfd_release(")}}},
	{code: "not_code", make: []change{{"fs/Makefile", end("# more\n")}}, at: place{file: "fs/Makefile"},
		near: []change{{"Documentation/filesystems/proc.rst", end("\nMore.\n")}}, ends: "not_built"},

	{code: "assembly", make: []change{{"arch/x86/lib/putuser.S", end("/* more */\n")}}, at: place{file: "arch/x86/lib/putuser.S"},
		near: []change{{"arch/x86/lib/checksum_32.S", end("/* more */\n")}}, ends: "not_built"},
	{code: "boot_image", make: []change{{"lib/vdso/gettimeofday.c", end("/* more */\n")}}, at: place{file: "lib/vdso/gettimeofday.c"},
		near: []change{{"arch/x86/entry/vdso/vma.c", nopIn("static vm_fault_t vdso_fault(")}}},
	{code: "boot_image", name: "its header", make: []change{{"include/vdso/helpers.h", end("/* more */\n")}}, at: place{file: "include/vdso/helpers.h"},
		near: []change{{"arch/x86/include/asm/fb.h", end("/* more */\n")}}, ends: "nothing_changed"},
	{code: "init_code", make: []change{{utsname, nopIn("void __init uts_ns_init(")}}, at: place{file: utsname, function: "uts_ns_init", section: ".init.text"},
		near: []change{{utsname, nopIn("static void utsns_put(")}}},
	{code: "init_code", name: "of a module's end", make: []change{{"drivers/net/dummy.c", nopIn("static void __exit dummy_cleanup_module(")}},
		at:   place{file: "drivers/net/dummy.c", function: "dummy_cleanup_module", section: ".exit.text"},
		near: []change{{"drivers/net/dummy.c", nopIn("static void dummy_get_stats64(")}}},
	{code: "not_traceable", make: []change{{"lib/argv_split.c", nopIn("void argv_free(")}}, at: place{file: "lib/argv_split.c", function: "argv_free"},
		near: []change{{"lib/argv_split.c", end("/* more */\n")}}, ends: "nothing_changed"},
	{code: "not_traceable", name: "notrace", make: []change{{clock, nopIn("notrace void sched_clock_tick(void)")}}, at: place{file: "kernel/sched/build_utility.c", function: "sched_clock_tick"},
		near: []change{{"kernel/sched/loadavg.c", sub("	loads[0] = (avenrun[0] + offset) << shift;\n", "	loads[0] = (avenrun[0] + offset + 0 * shift) << shift;\n	asm volatile(\"nop\");\n")}}},
	{code: "not_patchable", make: []change{{semaphore, nopIn("void __sched down(")}}, at: place{file: semaphore, function: "down", section: ".sched.text"},
		near: []change{{semaphore, nopIn("void __sched up(")}}, ends: "not_patchable"},
	{code: "static_key", make: []change{{"net/netfilter/nf_tables_core.c", nopIn("nft_do_chain(")}}, at: place{file: "net/netfilter/nf_tables_core.c", function: "nft_do_chain"},
		near: []change{{"mm/usercopy.c", nopIn("void __check_object_size(")}}},
	{code: "static_call", make: []change{{"arch/x86/kvm/pmu.c", nopIn("bool kvm_pmu_is_valid_rdpmc_ecx(")}}, at: place{file: "arch/x86/kvm/pmu.c", function: "kvm_pmu_is_valid_rdpmc_ecx"},
		near: []change{{"arch/x86/kvm/pmu.c", nopIn("static int cmp_u64(")}, {"arch/x86/events/amd/core.c", nopIn("static void amd_pmu_cpu_reset(")}}},
	{code: "unreconcilable", make: []change{{fileTable, sub("		old_max = get_nr_files();\n", "", "get_nr_files() > old_max", "get_nr_files() > 7", "	static long old_max;\n", "")}},
		at:   place{file: fileTable, function: "old_max", detail: "was removed"},
		near: []change{{fileTable, sub("		old_max = get_nr_files();\n", "		old_max = get_nr_files() + 1;\n")}}},
	{code: "export_changed", make: []change{{eventfd, sub("EXPORT_SYMBOL_GPL(eventfd_fget);\n", "")}}, at: place{file: eventfd, function: "eventfd_fget"},
		near: []change{{eventfd, nopIn("struct file *eventfd_fget(")}}},
	{code: "export_changed", name: "its prototype", make: []change{{eventfd, sub("struct file *eventfd_fget(int fd)", "struct file *eventfd_fget(long fd)")},
		{"include/linux/eventfd.h", sub("struct file *eventfd_fget(int fd);", "struct file *eventfd_fget(long fd);")}},
		at:   place{file: eventfd, function: "eventfd_fget", detail: "long"},
		near: []change{{eventfd, all(sub("struct file *eventfd_fget(int fd)", "struct file *eventfd_fget(const int fd)"), nopIn("static int eventfd_release("))}}},

	{code: "data_changed", make: []change{{timens, sub("REFCOUNT_INIT(3)", "REFCOUNT_INIT(4)")}}, at: place{file: timens, function: "init_time_ns"},
		near: []change{{timens, sub("KTIME_SEC_MAX / 2", "KTIME_SEC_MAX / 4")}}},
	{code: "data_changed", name: "a static local in another section", make: []change{{fileTable, sub("static long old_max;", "static long old_max = 3;")}},
		at:   place{file: fileTable, function: "old_max"},
		near: []change{{fileTable, sub("static long old_max;", "static long old_max, older = 3;", "		old_max = get_nr_files();\n", "		old_max = get_nr_files() + older++;\n")}}},
	{code: "ops_table_changed", make: []change{{timens, sub("	.owner		= timens_owner,\n", "")}}, at: place{file: timens, function: "timens_operations"},
		near: []change{{timens, nopIn("static struct user_namespace *timens_owner(")}}},
	{code: "section_changed", make: []change{{eventfd, sub(kprobes...)}, {eventfd, end("NOKPROBE_SYMBOL(eventfd_release);\n")}},
		at: place{file: eventfd, section: "_kprobe_blacklist"}, near: []change{{eventfd, all(sub(kprobes...), nopIn("static int eventfd_release("))}}},

	{code: "match_failed", make: []change{{"kernel/irq/proc.c", nopIn("int __weak arch_show_interrupts(")}}, at: place{file: "kernel/irq/proc.c", function: "arch_show_interrupts"},
		near: []change{{"kernel/irq/proc.c", nopIn("static int irq_spurious_proc_show(")}}},
	{code: "wrong_environment", make: []change{{eventfd, nopIn("static ssize_t eventfd_write(")}}, at: place{file: eventfd, function: "eventfd_write"},
		with: func(p *compose.Plan, _ *objbuild.Driver) { p.Kernel.ExtraCFlags = "-fno-omit-frame-pointer" },
		near: []change{{eventfd, nopIn("static ssize_t eventfd_write(")}}, nearWith: func(p *compose.Plan, _ *objbuild.Driver) { p.Kernel.ExtraCFlags = "-DKLATCH_UNUSED" }},
	{code: "needs_module", name: "vmlinux calls a module", make: []change{{eventfd, sub(ida, "extern void *xt_find_table(void);\n"+ida, eventfdRead, eventfdRead+"	xt_find_table();\n")}},
		at:   place{file: eventfd, function: "xt_find_table", detail: "x_tables"},
		near: []change{{filter, sub(filterFirst, "	xt_find_table(net, NFPROTO_IPV4, \"klatch\");\n"+filterFirst)}}},

	{code: "header_fanout", make: []change{{"include/linux/fs.h", sub("return f->f_inode;", "return f->f_inode ? f->f_inode : (void *)f;")}}, at: place{file: "include/linux/fs.h"},
		with: func(_ *compose.Plan, d *objbuild.Driver) { d.Fanout = 100 },
		near: []change{{"include/linux/eventfd.h", sub("!current->in_eventfd", "current->in_eventfd == 0 && current->pid")}}},

	{code: "lock_changed", make: []change{{eventfd, sub(showLock, "	seq_printf", showUnlock, "	seq_printf(m, \"eventfd-id")}}, at: place{file: eventfd, function: "eventfd_show_fdinfo"},
		near: []change{{eventfd, nopIn("static void eventfd_show_fdinfo(")}}},
	{code: "new_wait", make: []change{{eventfd, sub("#include <linux/kref.h>\n", "#include <linux/kref.h>\n#include <linux/delay.h>\n", eventfdRead, eventfdRead+"	msleep(1);\n")}},
		at:   place{file: eventfd, function: "eventfd_ctx_do_read"},
		near: []change{{eventfd, sub("#include <linux/kref.h>\n", "#include <linux/kref.h>\n#include <linux/delay.h>\n", eventfdRead, eventfdRead+"	mdelay(1);\n")}}},
	{code: "return_changed", make: []change{{eventfd, sub("*cnt != 0 ? 0 : -EAGAIN;", "*cnt != 0 ? 0 : -EBUSY;")}}, at: place{file: eventfd, function: "eventfd_ctx_remove_wait_queue"},
		near: []change{{eventfd, nopIn("int eventfd_ctx_remove_wait_queue(")}}},
	{code: "sleeps", make: []change{{eventfd, nopIn("static ssize_t eventfd_read(")}}, at: place{file: eventfd, function: "eventfd_read", detail: "schedule"},
		near: []change{{eventfd, nopIn("static __poll_t eventfd_poll(")}}},
	{code: "stack_grown", make: []change{{eventfd, sub(eventfdRead, eventfdRead+"	{ char klatch[512]; memset(klatch, 0, 512); barrier_data(klatch); }\n")}}, at: place{file: eventfd},
		near: []change{{eventfd, sub(eventfdRead, eventfdRead+"	{ char klatch[64]; memset(klatch, 0, 64); barrier_data(klatch); }\n")}}},
	{code: "new_pointer", make: []change{{eventfd, sub(ida, "static void klatch_call(void *p) { *(int *)p = 1; }\n"+ida, eventfdRead, eventfdRead+"	smp_call_function(klatch_call, cnt, 1);\n")}},
		at:   place{file: eventfd, detail: "klatch_call"},
		near: []change{{eventfd, sub(ida, "static noinline void klatch_call(void *p) { *(int *)p = 1; }\n"+ida, eventfdRead, eventfdRead+"	klatch_call(cnt);\n")}}},
	{code: "merged", make: []change{{eventfd, sub("	if (count < sizeof(ucnt))\n", "	if (count < sizeof(ucnt) + 0 * ctx->id)\n")}, {eventfd, sub("		res = sizeof(ucnt);\n", "		res = sizeof(ucnt) + ctx->id;\n")}},
		at:   place{file: eventfd, function: "eventfd_write", detail: "a and b"},
		near: []change{{eventfd, nopIn("static ssize_t eventfd_write(")}, {eventfd, nopIn("static int eventfd_release(")}}},
}

const (
	filter      = "net/ipv4/netfilter/iptable_filter.c"
	filterInit  = "static int iptable_filter_table_init("
	filterFirst = "	repl = ipt_alloc_initial_table("
	fileTable   = "fs/file_table.c"
	clock       = "kernel/sched/clock.c"
	semaphore   = "kernel/locking/semaphore.c"
	ida         = "static DEFINE_IDA"
	showLock    = "	spin_lock_irq(&ctx->wqh.lock);\n	seq_printf"
	showUnlock  = "	spin_unlock_irq(&ctx->wqh.lock);\n	seq_printf(m, \"eventfd-id"
)

var kprobes = []string{"#include <linux/kref.h>\n", "#include <linux/kref.h>\n#include <linux/kprobes.h>\n"}

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
			if !slices.ContainsFunc(found, func(r build.Refusal) bool {
				return r.Code == c.code && r.Rule != "" && r.Hint != "" && (c.at.file == "" || r.File == c.at.file) && (c.at.function == "" || strings.TrimRight(r.Function, ".0123456789") == c.at.function) &&
					(c.at.section == "" || strings.HasPrefix(r.Section, c.at.section)) && strings.Contains(r.Detail, c.at.detail)
			}) {
				t.Fatalf("result %s, want %s at %+v; refusals %+v, warnings %+v, functions %v", res.Result, c.code, c.at, res.Refusals, res.Warnings, res.Functions)
			}
			warning := slices.ContainsFunc(build.Catalog, func(r build.Rule) bool { return r.Code == c.code && r.Class == build.Warning })
			if want := build.Refused; res.Result != want && !warning && c.code != "not_built" {
				t.Errorf("result %s with %+v", res.Result, found)
			}
			if len(c.near) == 0 {
				t.Fatal("no near miss")
			}
			res = check(t, k, d, c.nearWith, c.near)
			if c.ends != c.code && c.code != "not_built" && slices.ContainsFunc(slices.Concat(res.Refusals, res.Warnings), func(r build.Refusal) bool { return r.Code == c.code }) {
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
