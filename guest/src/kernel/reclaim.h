/* Reclaim: making frames free. */
#ifndef RECLAIM_H
#define RECLAIM_H

#include "types.h"

/* What reclaim may do for whoever needs memory. A caller says so with reclaim_scope, for all that is called below it. */
#define GFP_FS (1u << 0) /* give a file's page its place on the disk, which takes the file system's lock */

struct reclaim_counts {
    u32 scanned, referenced, stolen, stolen_clean;
    u32 direct;     /* batches that a task did for itself */
    u32 background; /* times that kswapd was woken */
    /* Pages left alone: on their way or lost, against the scope, without a slot to go to. */
    u32 busy, denied, no_slot;
    u32 out_of_memory; /* processes that were killed */
};
extern struct reclaim_counts reclaim_counts;

/* Sets the marks: before the first process. */
void reclaim_init(void);
/* Starts kswapd. Needs swap; without it room comes from the balloon alone. */
bool reclaim_start(void);
/* Sleeps until kswapd has nothing in hand. */
void reclaim_settle(void);
/* Frames that are kept for reclaim itself. */
u32 reclaim_min(void);
/* Free frames that reclaim does not want, which is none while it works. */
u32 reclaim_to_spare(void);

/* Sees to it that `frames` frames can be had without sleep; reclaims if need be, and sleeps then: the caller holds nothing that
 * reclaim may want, or has said so by a scope. Where there is no other way the largest process is killed; false when that is the
 * current one, or there is none. */
bool make_room(u32 frames);
/* The same, and false rather than a kill. */
bool try_room(u32 frames);
/* There is room already: neither would reclaim. */
bool room_is_there(u32 frames);
/* Waits until others have made so many frames free, and does nothing for it but wake kswapd: for the scenes that show why nobody with
 * anything in hand may. */
void reclaim_await(u32 frames);
/* How a batch's anonymous pages are written: in order of their slots, neighbours together; or, for the scene that compares, in the
 * order of their frames, as a scan of physical memory comes to them, or each by itself as soon as it is picked. */
enum write_order { WRITE_BY_SLOTS, WRITE_BY_FRAMES, WRITE_AT_SCAN, WRITE_ORDERS };
void reclaim_choose_order(enum write_order order);
/* kswapd, or NULL. */
const struct task *reclaim_thread(void);

/* Takes rights away until reclaim_restore of what it returns; scopes nest. */
u32 reclaim_scope(u32 without);
void reclaim_restore(u32 before);

#endif
