/* The lists of pages that can be reclaimed: used lately, not used, and those that have nowhere to go. */
#ifndef LRU_H
#define LRU_H

#include "frames.h"

/* Flags of a page that can be reclaimed. */
#define FRAME_LISTED (1u << 0)     /* on a list */
#define FRAME_ACTIVE (1u << 1)     /* on the active one */
#define FRAME_ANON (1u << 2)       /* of a process: what is lost goes to swap */
#define FRAME_FILE (1u << 3)       /* of the shared file */
#define FRAME_DIRTY (1u << 4)      /* its copy on disk is old, or there is none */
#define FRAME_READING (1u << 5)    /* on its way in: its contents mean nothing yet */
#define FRAME_WRITING (1u << 6)    /* on its way out */
#define FRAME_FAILED (1u << 7)     /* it could not be read, or not what was written was */
#define FRAME_STUCK (1u << 8)      /* on the list of those that have no slot in swap, since there was none */

#define FRAME_AWAITED (1u << 9)    /* somebody waits for the end of its way */

enum lru { LRU_INACTIVE, LRU_ACTIVE, LRU_STUCK, LRU_LISTS };

extern u32 lru_count[LRU_LISTS];

/* Puts a page that is on no list at the young end of one. */
void lru_add(u32 frame, enum lru list);
void lru_add_held(u32 frame, enum lru list);
/* By whoever drops the last reference. */
void lru_remove_held(u32 frame);

/* It has one of these flags. */
static inline bool frame_is(u32 frame, u32 flags) { return *(volatile u32 *)&frame_of(frame)->flags & flags; }
/* Sets some flags and clears others. */
void frame_mark(u32 frame, u32 set, u32 clear);
static inline void frame_mark_held(u32 frame, u32 set, u32 clear)
{
    frame_of(frame)->flags = (frame_of(frame)->flags & ~clear) | set;
}
/* The same of a page that was on its way, and is not any more: whoever waits for that goes on. */
void frame_arrived(u32 frame, u32 set, u32 clear);
void frame_arrived_held(u32 frame, u32 set, u32 clear);
/* Sleeps while the page has one of these flags: of those that are on their way, whose end wakes the frame. */
void frame_wait_while(u32 frame, u32 flags);
/* The oldest page of a list, taken off it with a reference; FRAME_NONE when it is empty. */
u32 lru_isolate_held(enum lru list);

#endif
