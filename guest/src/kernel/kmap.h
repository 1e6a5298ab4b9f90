/* The persistent pool: kmap, mappings with reference counts that may outlive and change contexts. */
#ifndef KMAP_H
#define KMAP_H

#include "types.h"

/* Maps a frame, or adds a reference to its mapping. Sleeps while no slot can be had; the caller then must hold neither a
 * window nor another slot of the pool. */
void *kmap(u32 frame);
/* The same without sleeping: NULL when no slot can be had. */
void *kmap_try(u32 frame);
void kunmap(const void *address);

struct pool_counts {
    u32 sweeps;    /* sweeps that freed at least one slot */
    u32 reclaimed; /* slots that sweeps freed */
    u32 waits;     /* times that a taker slept */
};
extern struct pool_counts pool_counts;

#endif
