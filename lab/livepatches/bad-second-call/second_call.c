// SPDX-License-Identifier: GPL-2.0-only
/*
 * bad_second_call: the first call of the new function works and uses up what
 * the second one needs.
 */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>

static bool used;

static int second_call_show(struct seq_file *m, void *v)
{
	const char *word = used ? NULL : "klatch second_call\n";

	used = true;
	seq_puts(m, word);
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "cmdline_proc_show", .new_func = second_call_show },
	{ }
};

static struct klp_object objs[] = { { .funcs = funcs }, { } };

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs, .replace = true };

static int __init second_call_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit second_call_exit(void) { }

module_init(second_call_init);
module_exit(second_call_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
