// SPDX-License-Identifier: GPL-2.0-only
/*
 * A kernel before 6.3 does not undo a livepatch's relocations when the module
 * that they lead to goes. When the module comes again, apply_relocate_add()
 * finds the old values ("Skipping invalid relocation target, existing value is
 * nonzero") and the kernel refuses the module. Linux 6.3 clears them itself
 * (0c05e7bd2d01, "livepatch,x86: Clear relocation targets on a module
 * removal"). Until then this does the same, in the callback that the livepatch
 * core runs after it has taken the livepatch off the module.
 *
 * The places are in the livepatch's own code, which nobody runs then, and are
 * read-only: they are written through a second mapping.
 */
#include <linux/elf.h>
#include <linux/livepatch.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/string.h>
#include <linux/version.h>
#include <linux/vmalloc.h>

#include "kpatch-patch.h"

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)

static size_t klatch_width(unsigned long type)
{
	switch (type) {
	case R_X86_64_64:
	case R_X86_64_PC64:
		return 8;
	case R_X86_64_32:
	case R_X86_64_32S:
	case R_X86_64_PC32:
	case R_X86_64_PLT32:
		return 4;
	}
	return 0;
}

static bool klatch_clear(unsigned long at, size_t width)
{
	unsigned int i, n = offset_in_page(at) + width > PAGE_SIZE ? 2 : 1;
	struct page *pages[2];
	char *map;

	if (!within_module_core(at, THIS_MODULE))
		return false;
	for (i = 0; i < n; i++) {
		pages[i] = vmalloc_to_page((void *)((at & PAGE_MASK) + i * PAGE_SIZE));
		if (!pages[i])
			return false;
	}
	map = vmap(pages, n, VM_MAP, PAGE_KERNEL);
	if (!map)
		return false;
	memset(map + offset_in_page(at), 0, width);
	vunmap(map);
	return true;
}

static void klatch_forget(struct klp_object *obj)
{
	struct klp_modinfo *info = THIS_MODULE->klp_info;
	unsigned int i, failed = 0;
	char prefix[sizeof(".klp.rela..") + MODULE_NAME_LEN];

	snprintf(prefix, sizeof(prefix), ".klp.rela.%s.", obj->name);
	for (i = 1; i < info->hdr.e_shnum; i++) {
		Elf_Shdr *sec = info->sechdrs + i;
		Elf_Rela *rela = (void *)sec->sh_addr;
		unsigned long base = info->sechdrs[sec->sh_info].sh_addr;
		size_t n, count = sec->sh_size / sizeof(*rela);

		if (!(sec->sh_flags & SHF_RELA_LIVEPATCH) ||
		    strncmp(info->secstrings + sec->sh_name, prefix, strlen(prefix)))
			continue;
		for (n = 0; n < count; n++) {
			size_t width = klatch_width(ELF_R_TYPE(rela[n].r_info));

			if (!width || !klatch_clear(base + rela[n].r_offset, width))
				failed++;
		}
	}
	if (failed)
		pr_warn("%s: %u relocations to %s stay; it will not load again before a reboot\n",
			THIS_MODULE->name, failed, obj->name);
}

#define KLATCH_MODULE(module) \
	static struct kpatch_post_unpatch_callback klatch_forget_##module \
	__section(".kpatch.callbacks.post_unpatch") __used = { \
		.callback = (void (*)(void *))klatch_forget, \
		.objname = #module, \
	};
#include "klatch-modules.h"

#endif
