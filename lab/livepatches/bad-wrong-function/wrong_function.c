// SPDX-License-Identifier: GPL-2.0-only
/*
 * bad_wrong_function: the fix is meant for type_show() of kernel/irq/irqdesc.c,
 * seen in /sys/kernel/irq/N/type. kernel/reboot.c has another of the same name
 * and the same prototype. POSITION is filled in by the test: the position of
 * one or the other among the symbols of that name.
 */
#include <linux/kobject.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/sysfs.h>

static ssize_t wrong_function_show(struct kobject *kobj, struct kobj_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "klatch\n");
}

static struct klp_func funcs[] = {
	{ .old_name = "type_show", .new_func = wrong_function_show, .old_sympos = POSITION },
	{ }
};

static struct klp_object objs[] = { { .funcs = funcs }, { } };

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs, .replace = true };

static int __init wrong_function_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit wrong_function_exit(void) { }

module_init(wrong_function_init);
module_exit(wrong_function_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
