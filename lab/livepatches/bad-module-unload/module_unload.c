// SPDX-License-Identifier: GPL-2.0-only
/*
 * bad_module_unload: the livepatch reaches the module loop, and its callback
 * for loop frees what the replaced function of vmlinux still uses. Disabling
 * the livepatch does no harm: by then nobody uses it. Taking loop out does.
 */
#include <linux/atomic.h>
#include <linux/device.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sched/task.h>
#include <linux/seq_file.h>
#include <linux/sysfs.h>

#define READS_ID 0x6b6c6302

static int module_unload_show(struct seq_file *m, void *v)
{
	atomic_long_t *reads = klp_shadow_get(&init_task, READS_ID);

	seq_printf(m, "klatch module_unload: %ld\n", atomic_long_inc_return(reads));
	return 0;
}

static ssize_t module_unload_offset(struct device *d, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "klatch\n");
}

static int module_unload_pre_patch(struct klp_object *obj)
{
	if (!klp_shadow_get_or_alloc(&init_task, READS_ID, sizeof(atomic_long_t), GFP_KERNEL, NULL, NULL))
		return -ENOMEM;
	return 0;
}

static void module_unload_post_unpatch(struct klp_object *obj)
{
	klp_shadow_free_all(READS_ID, NULL);
}

static struct klp_func core_funcs[] = {
	{ .old_name = "cmdline_proc_show", .new_func = module_unload_show },
	{ }
};

static struct klp_func loop_funcs[] = {
	{ .old_name = "loop_attr_do_show_offset", .new_func = module_unload_offset },
	{ }
};

static struct klp_object objs[] = {
	{ .funcs = core_funcs, .callbacks = { .pre_patch = module_unload_pre_patch } },
	{ .name = "loop", .funcs = loop_funcs, .callbacks = { .post_unpatch = module_unload_post_unpatch } },
	{ }
};

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs, .replace = true };

static int __init module_unload_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit module_unload_exit(void) { }

module_init(module_unload_init);
module_exit(module_unload_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
