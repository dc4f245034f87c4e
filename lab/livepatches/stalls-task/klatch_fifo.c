// SPDX-License-Identifier: GPL-2.0-only
/*
 * klatch_fifo: replaces a function in which a task may sleep for as long as it
 * likes: opening a named pipe waits for the other side. The new code refuses
 * with ENODATA, so that anybody can see which code ran.
 */
#include <linux/errno.h>
#include <linux/fs.h>
#include <linux/livepatch.h>
#include <linux/module.h>

static int klatch_fifo_open(struct inode *inode, struct file *filp)
{
	return -ENODATA;
}

static struct klp_func funcs[] = {
	{ .old_name = "fifo_open", .new_func = klatch_fifo_open },
	{ }
};

static struct klp_object objs[] = { { .funcs = funcs }, { } };

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs, .replace = true };

static int __init klatch_fifo_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit klatch_fifo_exit(void) { }

module_init(klatch_fifo_init);
module_exit(klatch_fifo_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
