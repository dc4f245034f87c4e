// SPDX-License-Identifier: GPL-2.0-only
/*
 * klatch_reaper: replaces the main function of a kernel thread, which never
 * returns: the thread sleeps in it for ever, and the transition never ends.
 * /proc/cmdline is replaced too, so that anybody can see which code runs.
 */
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>

/* Never called: the thread is in the old one and stays there. */
static int klatch_oom_reaper(void *unused)
{
	return 0;
}

static int klatch_reaper_cmdline(struct seq_file *m, void *v)
{
	seq_puts(m, "klatch_reaper: this has been live patched\n");
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "oom_reaper", .new_func = klatch_oom_reaper },
	{ .old_name = "cmdline_proc_show", .new_func = klatch_reaper_cmdline },
	{ }
};

static struct klp_object objs[] = { { .funcs = funcs }, { } };

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs, .replace = true };

static int __init klatch_reaper_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit klatch_reaper_exit(void) { }

module_init(klatch_reaper_init);
module_exit(klatch_reaper_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
