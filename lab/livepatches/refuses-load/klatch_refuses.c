// SPDX-License-Identifier: GPL-2.0-only
/*
 * klatch_refuses: a livepatch that the kernel refuses to load, because the
 * function that it wants to replace does not exist.
 */
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>

static int klatch_cmdline_proc_show(struct seq_file *m, void *v)
{
	seq_puts(m, "klatch_refuses: this has been live patched\n");
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "klatch_no_such_function", .new_func = klatch_cmdline_proc_show },
	{ }
};

static struct klp_object objs[] = { { .funcs = funcs }, { } };

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs, .replace = true };

static int __init klatch_refuses_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit klatch_refuses_exit(void) { }

module_init(klatch_refuses_init);
module_exit(klatch_refuses_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
