// SPDX-License-Identifier: GPL-2.0-only
/*
 * trouble: makes the kernel complain in a chosen way, so that the console
 * corpus of the oops detector is real. For lab guests only.
 *
 *   insmod trouble.ko what=warn
 */
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/refcount.h>
#include <linux/slab.h>
#include <linux/spinlock.h>

static char *what = "";
module_param(what, charp, 0);

static DEFINE_SPINLOCK(lock);

static int sleep_forever(void *unused)
{
	set_current_state(TASK_UNINTERRUPTIBLE);
	schedule_timeout(60 * HZ);
	return 0;
}

static noinline void list_trouble(void)
{
	struct list_head head, a;

	INIT_LIST_HEAD(&head);
	list_add(&a, &head);
	list_del(&a);
	list_del(&a);
}

static int __init trouble_init(void)
{
	if (!strcmp(what, "warn")) {
		WARN(1, "trouble: asked for a warning\n");
	} else if (!strcmp(what, "bug")) {
		BUG();
	} else if (!strcmp(what, "null")) {
		*(volatile int *)8 = 1;
	} else if (!strcmp(what, "gpf")) {
		*(volatile int *)0xdead000000000000 = 1;
	} else if (!strcmp(what, "divide")) {
		volatile int one = 1, zero = 0;

		zero = one / zero;
	} else if (!strcmp(what, "atomic")) {
		spin_lock(&lock);
		msleep(20);
		spin_unlock(&lock);
	} else if (!strcmp(what, "refcount")) {
		refcount_t r = REFCOUNT_INIT(1);

		refcount_set(&r, 0);
		refcount_inc(&r);
	} else if (!strcmp(what, "list")) {
		list_trouble();
	} else if (!strcmp(what, "hung")) {
		kthread_run(sleep_forever, NULL, "trouble_hung");
	} else if (!strcmp(what, "stall")) {
		preempt_disable();
		mdelay(34 * 1000);
		preempt_enable();
	} else if (!strcmp(what, "alloc")) {
		/* More than the guest has. */
		kfree(kmalloc(4 << 20, GFP_ATOMIC | __GFP_NORETRY));
		{
			void **chain = NULL, **next;

			while ((next = kmalloc(4 << 20, GFP_ATOMIC))) {
				*next = chain;
				chain = (void **)next;
			}
			while (chain) {
				next = *chain;
				kfree(chain);
				chain = next;
			}
		}
	} else {
		return -EINVAL;
	}
	return 0;
}

static void __exit trouble_exit(void) { }

module_init(trouble_init);
module_exit(trouble_exit);
MODULE_DESCRIPTION("makes the kernel complain, for the lab's corpus");
MODULE_LICENSE("GPL");
