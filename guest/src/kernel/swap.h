/* Swap: slots of a disk, the map of who has which, and the cache of pages that are in both. */
#ifndef SWAP_H
#define SWAP_H

#include "blk.h"
#include "frames.h"
#include "paging.h"

#define SLOT_NONE 0xffffffff

/* An entry of a user page table for a page in swap: not present, and not 0. */
static inline pte_t swap_entry(u32 slot) { return (pte_t)(slot + 1) << PAGE_SHIFT; }
/* Slots that an entry can name, which has 20 bits for that in the legacy format. */
#define SLOTS_LEGACY_MAX ((1u << 20) - 1)
static inline bool is_swap_entry(pte_t entry) { return entry && !(entry & PTE_P); }
static inline u32 swap_entry_slot(pte_t entry) { return pte_frame(entry) - 1; }

struct swap_counts {
    u32 ins;         /* faults on pages in swap */
    u32 hits;        /* of those: the page was still in memory, or had been read ahead */
    u32 reads, pages_read, read_ahead;
    u32 writes, pages_written;
    u32 checked;     /* pages whose contents were compared with what was written */
    u32 lost;        /* ... and differed, or could not be read */
};
extern struct swap_counts swap_counts;

/* Swaps to `disk` from now on; false if that cannot be. Before the first process. */
bool swap_on(struct blk *disk);
/* Slots in use. */
u32 swap_slots_used(void);

/* One more entry of a page table for the slot, and one less. */
void swap_entry_copied(u32 slot);
void swap_entry_dropped(u32 slot);

/* The slot of a page: the one it has, or a new one, near those given out last; SLOT_NONE when swap is full. A new one makes
 * the page dirty. LOCK_PAGES is held. */
u32 swap_slot_for_held(u32 frame);
/* There is none for a page that has none. */
bool swap_is_full(void);
static inline bool in_swap_cache(u32 frame) { return frame_of(frame)->slot != 0; }
static inline u32 swap_slot_of(u32 frame) { return frame_of(frame)->slot - 1; }
/* True if one reference and the cache's are all, and no entry names the slot: nobody else can come to see a store to the page, and
 * the cache has let go of it. */
bool swap_claim(u32 frame);
/* A mapping of the page takes the place of one of its slot's entries. While more than half of the slots are in use it lets go of its own
 * where that was its only entry, which others may need more: what is in memory and what is in swap then are as much together as both
 * have room for. */
void swap_came_in(u32 frame, u32 slot);
/* An entry of the page's slot takes the place of a mapping, whose reference goes. */
void swap_unmapped(u32 frame);
/* Takes a page out of the cache; its slot is free if no entry names it. LOCK_PAGES is held, as where else a name ends so. */
void swap_forget_held(u32 frame);
/* Drops a mapping's reference to a page; one that only the cache still has, and no entry names, is forgotten. */
void swap_put(u32 frame);
void swap_put_held(u32 frame);

enum swap_result {
    SWAP_DONE,
    SWAP_NO_MEMORY,
    SWAP_LOST,  /* it cannot be read */
    SWAP_STALE, /* no entry names the slot any more: the space was reaped meanwhile */
};

/* The page of a slot, with a reference, read if need be with its neighbours. May sleep, after which nothing need be as it
 * was. */
enum swap_result swap_in(u32 slot, u32 *frame);

/* Pages of one swap_out. */
#define SWAP_OUT_MAX 32

/* Writes pages of the cache, in order of their slots, neighbours in one request; sleeps. They are marked FRAME_WRITING by the
 * caller and not any more then; one that could not be written is dirty. */
void swap_out(const u32 *frames, u32 count);

/* A page that was not found as it was written. */
void swap_lost(const char *what, u32 number);

#endif
