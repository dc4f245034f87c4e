// SPDX-License-Identifier: GPL-2.0-only
/*
 * bad_never_finishes: replaces, beside what it fixes, the main function of a
 * kernel thread. The thread sleeps in the old one and never returns from it,
 * so the kernel can never take it over.
 */
#include <linux/kthread.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/seq_file.h>

static int never_finishes_show(struct seq_file *m, void *v)
{
	seq_puts(m, "klatch never_finishes\n");
	return 0;
}

static int never_finishes_kcompactd(void *p)
{
	while (!kthread_should_stop())
		schedule_timeout_interruptible(HZ);
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "cmdline_proc_show", .new_func = never_finishes_show },
	{ .old_name = "kcompactd", .new_func = never_finishes_kcompactd },
	{ }
};

static struct klp_object objs[] = { { .funcs = funcs }, { } };

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs, .replace = true };

static int __init never_finishes_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit never_finishes_exit(void) { }

module_init(never_finishes_init);
module_exit(never_finishes_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
