// SPDX-License-Identifier: GPL-2.0-only
/*
 * bad_leaks: each call of the new function leaves 96 bytes behind. Nothing in
 * the kernel's log tells of it.
 */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/slab.h>

static int leaks_show(struct seq_file *m, void *v)
{
	char *line = kmalloc(96, GFP_KERNEL);

	if (!line)
		return -ENOMEM;
	strscpy(line, "klatch leaks\n", 96);
	seq_puts(m, line);
	/* kfree(line) is what it lacks. */
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "cmdline_proc_show", .new_func = leaks_show },
	{ }
};

static struct klp_object objs[] = { { .funcs = funcs }, { } };

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs, .replace = true };

static int __init leaks_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit leaks_exit(void) { }

module_init(leaks_init);
module_exit(leaks_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
