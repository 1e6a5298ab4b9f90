/* Who maps a page: all user page-table entries for a frame. Of a file's page only whoever has the kernel may ask. */
#ifndef RMAP_H
#define RMAP_H

#include "paging.h"

/* PTE_A for each page that a CPU has used since this was last asked, which is forgotten; PTE_D if it has been written to. Soonest done
 * where those of one process follow each other. */
void rmap_take_used(const u32 *frames, u32 count, pte_t *used);
/* Takes all mappings of an anonymous page away, an entry for its slot in the place of each, or of a file's page; and every
 * TLB's memory of them. True if one was written through. Each mapping's reference is dropped. */
bool rmap_unmap(u32 frame);
/* The same of several, but other CPUs' memory of them lasts until tlb_finish. What the entries of each were, together: PTE_D where it
 * was written through. */
void rmap_begin_unmap(const u32 *frames, u32 count, pte_t *bits);

#endif
