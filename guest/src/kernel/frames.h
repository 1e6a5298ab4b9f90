/* Physical frames: two zones, and a table of frames that exists only as far as frames were handed out. */
#ifndef FRAMES_H
#define FRAMES_H

#include "check.h"
#include "layout.h"
#include "types.h"

/* Low frames are mapped at KERNEL_BASE; high ones can be reached through the window or the pool alone. */
enum zone { ZONE_LOW, ZONE_HIGH, ZONES };

/* One for every frame that was ever handed out. */
struct frame {
    u32 refs;  /* who holds it: mappings, tables, the swap cache, I/O, the witness; 0 on the free list */
    u32 link;  /* free: the next free frame. A user page table: how many of its entries are in use. On a list: the next */
    u32 prev;  /* on a list: the one before */
    u32 flags; /* FRAME_* of pages that can be reclaimed (lru.h); 0 for all others */
    u32 index; /* of such a page: its number among the pages of the address spaces, or of the file */
    u32 slot;  /* its slot in swap and one more, or 0 (swap.h) */
    u32 space; /* of an anonymous page: whose table was the last to get it, as a place to look first (rmap.c) */
} __attribute__((aligned(32)));

_Static_assert(sizeof(struct frame) == 32, "the frame table has room for FRAMES_MAX of them");

/* No frame: also what an allocation that failed returns. Frame 0 is never handed out. */
#define FRAME_NONE 0

void frames_init(void);

/* One frame with one reference, its contents whatever they were. ZONE_HIGH falls back to ZONE_LOW. Never sleeps: whoever can
 * makes room before (reclaim.h). */
u32 frame_alloc(enum zone zone);
/* The same, and never a low one. */
u32 frame_alloc_high(void);
void frame_get(u32 frame);
/* Drops a reference; with the last one the frame is free, and off its list. */
void frame_put(u32 frame);
/* The same for who has LOCK_PAGES, as all whose names end so. */
u32 frame_alloc_held(enum zone zone);
static inline void frame_get_held(u32 frame);
void frame_put_held(u32 frame);
static inline struct frame *frame_of(u32 frame) { return (struct frame *)FRAME_TABLE_BASE + frame; }
static inline void frame_get_held(u32 frame)
{
    ASSERT(frame_of(frame)->refs);
    frame_of(frame)->refs++;
}
/* Frames off the free list that the host has not been told of since they came there, with a reference each; and back. */
u32 frames_take_unreported(u32 *frames, u32 most);
void frames_put_reported(const u32 *frames, u32 count);
/* Takes contiguous high frames that were never handed out off the end of memory, for good: as many bytes as there are, a multiple of
 * `align` and at most `most`, which is one too; the first frame. */
u32 frames_take_top(u32 most, u32 align, u32 *bytes);
/* Frames held now, over both zones: the same before and after a workload that leaks nothing. */
u32 frames_in_use(void);
/* Frames for pages and their tables: those that can be had, and all. High ones, unless there are next to none. */
u32 frames_free(void);
u32 frames_total(void);

extern u32 frames_low_end;
static inline bool frame_is_low(u32 frame) { return frame < frames_low_end; }
static inline void *low_address(u32 frame) { return (void *)(KERNEL_BASE + (frame << PAGE_SHIFT)); }
static inline u32 low_physical(const void *address) { return (u32)address - KERNEL_BASE; }

#endif
