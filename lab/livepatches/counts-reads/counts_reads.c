// SPDX-License-Identifier: GPL-2.0-only
/*
 * counts_reads: a hand-written livepatch with a pair of callbacks and a shadow
 * variable. /proc/cmdline says how often it was read since the livepatch was
 * loaded into a kernel that had none. The first callback makes the counter,
 * the second frees it. When a newer livepatch replaces this one, the kernel
 * does not run the second (Documentation/livepatch/cumulative-patches.rst):
 * the counter stays, and whoever comes next finds it.
 */
#include <linux/atomic.h>
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched/task.h>
#include <linux/seq_file.h>

/* As in livepatch.toml. An id is never given another meaning. */
#define READS_ID 0x6b6c6301

static int counts_reads_show(struct seq_file *m, void *v)
{
	atomic_long_t *reads = klp_shadow_get(&init_task, READS_ID);

	seq_printf(m, "klatch counts_reads: %ld\n", reads ? atomic_long_inc_return(reads) : -1);
	return 0;
}

/* Zeroed by klp_shadow_get_or_alloc; what an earlier livepatch left is kept. */
static int counts_reads_pre_patch(struct klp_object *obj)
{
	if (!klp_shadow_get_or_alloc(&init_task, READS_ID, sizeof(atomic_long_t), GFP_KERNEL, NULL, NULL))
		return -ENOMEM;
	pr_info("pre_patch ran\n");
	return 0;
}

/* No task runs the new code any more. */
static void counts_reads_post_unpatch(struct klp_object *obj)
{
	klp_shadow_free_all(READS_ID, NULL);
	pr_info("post_unpatch ran\n");
}

static struct klp_func funcs[] = {
	{ .old_name = "cmdline_proc_show", .new_func = counts_reads_show },
	{ }
};

static struct klp_object objs[] = {
	{
		.funcs = funcs,
		.callbacks = { .pre_patch = counts_reads_pre_patch, .post_unpatch = counts_reads_post_unpatch },
	},
	{ }
};

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs, .replace = true };

static int __init counts_reads_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit counts_reads_exit(void) { }

module_init(counts_reads_init);
module_exit(counts_reads_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
