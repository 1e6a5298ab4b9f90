/* Reclaim: making frames free. */
#ifndef RECLAIM_H
#define RECLAIM_H

#include "types.h"

/* What reclaim may do for whoever needs memory. A caller says so with reclaim_scope, for all that is called below it. */
#define GFP_IO (1u << 0) /* start I/O, and wait for it */
#define GFP_FS (1u << 1) /* give a file's page its place on the disk, which takes the file system's lock */

struct reclaim_counts {
    u32 scanned, referenced, stolen, stolen_clean;
    u32 direct;       /* times that a task reclaimed for itself */
    u32 background;   /* times that kswapd was woken */
    u32 out_of_memory;
    u32 scope_skipped; /* pages left alone because a scope did not allow what they want */
};
extern struct reclaim_counts reclaim_counts;

/* Starts kswapd. Needs swap. */
bool reclaim_start(void);
/* Sleeps until kswapd has nothing in hand. */
void reclaim_settle(void);
/* Frames that are kept for reclaim itself. */
u32 reclaim_min(void);

/* Sees to it that `frames` frames can be had without sleep; reclaims if need be, and sleeps then: the caller holds nothing that
 * reclaim may want, or has said so by a scope. False when there is no way left. */
bool make_room(u32 frames);

/* Takes rights away until reclaim_restore of what it returns; scopes nest. */
u32 reclaim_scope(u32 without);
void reclaim_restore(u32 before);

#endif
