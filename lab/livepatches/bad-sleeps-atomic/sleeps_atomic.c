// SPDX-License-Identifier: GPL-2.0-only
/*
 * bad_sleeps_atomic: the fix takes a lock that must not be held asleep, and
 * sleeps.
 */
#include <linux/delay.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/spinlock.h>

static DEFINE_SPINLOCK(lock);

static int sleeps_atomic_show(struct seq_file *m, void *v)
{
	void *p;

	p = kmalloc(64, GFP_KERNEL);
	spin_lock(&lock);
	msleep(2);
	seq_puts(m, "klatch sleeps_atomic\n");
	spin_unlock(&lock);
	kfree(p);
	return 0;
}

static struct klp_func funcs[] = {
	{ .old_name = "cmdline_proc_show", .new_func = sleeps_atomic_show },
	{ }
};

static struct klp_object objs[] = { { .funcs = funcs }, { } };

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs, .replace = true };

static int __init sleeps_atomic_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit sleeps_atomic_exit(void) { }

module_init(sleeps_atomic_init);
module_exit(sleeps_atomic_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
