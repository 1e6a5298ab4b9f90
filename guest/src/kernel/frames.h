/* Physical frames: two zones, and a table of frames that exists only as far as frames were handed out. */
#ifndef FRAMES_H
#define FRAMES_H

#include "layout.h"
#include "types.h"

/* Low frames are mapped at KERNEL_BASE; high ones can be reached through the window or the pool alone. */
enum zone { ZONE_LOW, ZONE_HIGH, ZONES };

/* One for every frame that was ever handed out. */
struct frame {
    u32 refs; /* who holds it: mappings, tables, the witness; 0 on the free list */
    u32 link; /* free: the next free frame. A user page table: how many of its entries are in use. */
};

/* No frame: also what an allocation that failed returns. Frame 0 is never handed out. */
#define FRAME_NONE 0

void frames_init(void);

/* One frame with one reference, its contents whatever they were. ZONE_HIGH falls back to ZONE_LOW. */
u32 frame_alloc(enum zone zone);
void frame_get(u32 frame);
/* Drops a reference; with the last one the frame is free. */
void frame_put(u32 frame);
static inline struct frame *frame_of(u32 frame) { return (struct frame *)FRAME_TABLE_BASE + frame; }
/* Frames held now, over both zones: the same before and after a workload that leaks nothing. */
u32 frames_in_use(void);

extern u32 frames_low_end;
static inline bool frame_is_low(u32 frame) { return frame < frames_low_end; }
static inline void *low_address(u32 frame) { return (void *)(KERNEL_BASE + (frame << PAGE_SHIFT)); }
static inline u32 low_physical(const void *address) { return (u32)address - KERNEL_BASE; }

#endif
