// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a livepatch says of itself: the vulnerabilities that it fixes, the
 * kernel build that it is for, and its place in the order. The loader compares
 * these with the signed manifest; scanners can read them with modinfo.
 */
#include <linux/module.h>

MODULE_INFO(klatch_fixes, KLATCH_FIXES);
MODULE_INFO(klatch_build_id, KLATCH_BUILD_ID);
MODULE_INFO(klatch_sequence, KLATCH_SEQUENCE);
