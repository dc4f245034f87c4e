// SPDX-License-Identifier: GPL-2.0-only
/*
 * bad_breaks_chain: loads into a clean kernel and not over its predecessor.
 * counts_reads leaves its counter when it is replaced; this one insists on
 * making a new one. klp_shadow_get_or_alloc is what it should call.
 */
#include <linux/atomic.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched/task.h>
#include <linux/seq_file.h>

#define READS_ID 0x6b6c6301 /* of counts_reads */

static int breaks_chain_show(struct seq_file *m, void *v)
{
	atomic_long_t *reads = klp_shadow_get(&init_task, READS_ID);

	seq_printf(m, "klatch breaks_chain: %ld\n", reads ? atomic_long_inc_return(reads) : -1);
	return 0;
}

static int breaks_chain_pre_patch(struct klp_object *obj)
{
	if (!klp_shadow_alloc(&init_task, READS_ID, sizeof(atomic_long_t), GFP_KERNEL, NULL, NULL))
		return -EEXIST;
	return 0;
}

static void breaks_chain_post_unpatch(struct klp_object *obj)
{
	klp_shadow_free_all(READS_ID, NULL);
}

static struct klp_func funcs[] = {
	{ .old_name = "cmdline_proc_show", .new_func = breaks_chain_show },
	{ }
};

static struct klp_object objs[] = {
	{
		.funcs = funcs,
		.callbacks = { .pre_patch = breaks_chain_pre_patch, .post_unpatch = breaks_chain_post_unpatch },
	},
	{ }
};

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs, .replace = true };

static int __init breaks_chain_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit breaks_chain_exit(void) { }

module_init(breaks_chain_init);
module_exit(breaks_chain_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
