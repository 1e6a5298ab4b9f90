/* Page tables of the kernel itself: low memory, the frame table, stacks, devices, the window and the pool. */
#ifndef KPT_H
#define KPT_H

#include "layout.h"
#include "paging.h"

/* Drops the identity mapping, gives the kernel image its real permissions and low memory its global bit, and makes the
 * tables of the top 4 MiB. Needs paging_init. */
void kpt_init(void);

/* Makes the tables that cover [start, end). Only before the first process: directories are copied into processes. */
void kpt_cover(u32 start, u32 end);

/* The page-table entry for a kernel address that a table covers, and the table that holds it. Nothing is flushed: an
 * absent entry needs no flush to become present, and whoever changes a present one knows when the flush is due. */
pte_t kpt_get(u32 va);
void kpt_set(u32 va, pte_t entry);
void *kpt_table(u32 va);

/* The tables of the top 4 MiB, one behind the other: no walk there. kpt_enter is for an entry that is absent. */
extern u32 top_tables[2048];

static inline u32 top_index(u32 va) { return (va - TOP_BASE) >> PAGE_SHIFT; }
static inline void kpt_enter(u32 va, pte_t entry) { table_enter(paging.pae, top_tables, top_index(va), entry); }
static inline void kpt_clear(u32 va) { table_clear(paging.pae, top_tables, top_index(va)); }

/* Maps up to `most` bytes of contiguous high memory from ARENA_BASE on, in large pages, for good: how many. */
u32 arena_map(u32 most);

void kpt_map_device(u32 va, u32 physical);

/* Bits of a writable, never executable, global kernel page. A and D are set: the kernel does not ask for them, and a
 * CPU or monitor need not come back to set them. */
static inline pte_t kpt_data_bits(void) { return paging.data; }

/* What CR3 is to hold for a task without user memory. */
u32 kpt_root(void);

/* The same with the first large page of memory at 0 as well, for a CPU that turns paging on down there. */
u32 kpt_root_from_below(void);

/* One cleared low frame that the frame table knows nothing of (frames.c). */
u32 frame_alloc_untracked(void);

#endif
