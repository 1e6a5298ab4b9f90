/* Who maps a page: all user page-table entries for a frame. Of a file's page only whoever has the kernel may ask. */
#ifndef RMAP_H
#define RMAP_H

#include "paging.h"

/* PTE_A if the CPU has used the page since this was last asked, which is forgotten; PTE_D if it has written to it. */
pte_t rmap_take_used(u32 frame);
/* Takes all mappings of an anonymous page away, an entry for its slot in the place of each, or of a file's page; and every
 * TLB's memory of them. True if one was written through. Each mapping's reference is dropped. */
bool rmap_unmap(u32 frame);
/* The same, but other CPUs' memory of them lasts until tlb_finish. */
bool rmap_begin_unmap(u32 frame);

#endif
