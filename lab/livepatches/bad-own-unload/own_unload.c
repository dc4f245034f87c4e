// SPDX-License-Identifier: GPL-2.0-only
/*
 * bad_own_unload: starts a timer when it has gone in and does not stop it when
 * it goes out. Until its own module is unloaded all is well; then the timer
 * leads into memory that is gone.
 */
#include <linux/jiffies.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/timer.h>

static unsigned long ticks;
static void own_unload_tick(struct timer_list *t);
static DEFINE_TIMER(timer, own_unload_tick);

static void own_unload_tick(struct timer_list *t)
{
	ticks++;
	mod_timer(&timer, jiffies + HZ);
}

static int own_unload_show(struct seq_file *m, void *v)
{
	seq_printf(m, "klatch own_unload: %lu\n", ticks);
	return 0;
}

static void own_unload_post_patch(struct klp_object *obj)
{
	mod_timer(&timer, jiffies + HZ);
}

static void own_unload_post_unpatch(struct klp_object *obj)
{
	/* del_timer_sync(&timer) is what it lacks. */
}

static struct klp_func funcs[] = {
	{ .old_name = "cmdline_proc_show", .new_func = own_unload_show },
	{ }
};

static struct klp_object objs[] = {
	{
		.funcs = funcs,
		.callbacks = { .post_patch = own_unload_post_patch, .post_unpatch = own_unload_post_unpatch },
	},
	{ }
};

static struct klp_patch patch = { .mod = THIS_MODULE, .objs = objs, .replace = true };

static int __init own_unload_init(void)
{
	return klp_enable_patch(&patch);
}

static void __exit own_unload_exit(void) { }

module_init(own_unload_init);
module_exit(own_unload_exit);
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
