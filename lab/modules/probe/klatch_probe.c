// SPDX-License-Identifier: GPL-2.0-only
/*
 * klatch_probe: a kprobe on a chosen place, as a monitoring module would have
 * one, with or without a post handler. How often it was hit is in
 * /sys/module/klatch_probe/parameters/hits.
 *
 *   insmod klatch_probe.ko symbol=cmdline_proc_show offset=0 post=1
 */
#include <linux/kprobes.h>
#include <linux/module.h>

static char *symbol = "";
module_param(symbol, charp, 0444);
static unsigned int offset;
module_param(offset, uint, 0444);
static bool post;
module_param(post, bool, 0444);
static ulong hits;
module_param(hits, ulong, 0444);

static int klatch_before(struct kprobe *p, struct pt_regs *regs)
{
	hits++;
	return 0;
}

static void klatch_after(struct kprobe *p, struct pt_regs *regs, unsigned long flags)
{
}

static struct kprobe probe;

static int __init klatch_probe_init(void)
{
	probe.symbol_name = symbol;
	probe.offset = offset;
	probe.pre_handler = klatch_before;
	if (post)
		probe.post_handler = klatch_after;
	return register_kprobe(&probe);
}

static void __exit klatch_probe_exit(void)
{
	unregister_kprobe(&probe);
}

module_init(klatch_probe_init);
module_exit(klatch_probe_exit);
MODULE_DESCRIPTION("a kprobe on a chosen place, for the lab");
MODULE_LICENSE("GPL");
