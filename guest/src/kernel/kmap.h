/* The persistent pool: kmap, mappings with reference counts that may outlive and change contexts. */
#ifndef KMAP_H
#define KMAP_H

#include "types.h"

struct task;

/* Maps a frame, or adds a reference to its mapping. Sleeps while no slot can be had; the caller then must hold neither a
 * window nor another slot of the pool. */
void *kmap(u32 frame);
/* The same without sleeping: NULL when no slot can be had. */
void *kmap_try(u32 frame);
void kunmap(const void *address);

/* The pool as it was in 2002, divided among series of takers, for the scenes that replay it. Undivided all series are one. */
enum series { SERIES_DEFAULT, SERIES_PAGETABLE, SERIES_PAGETABLE2, SERIES_COUNT };

/* So many slots for each; only while none is held. */
void pool_divide(u32 plain, u32 tables, u32 second_tables);
/* As kmap and kmap_try. A mapping that is there is taken, whatever series it was made for. */
void *kmap_of(enum series series, u32 frame);
void *kmap_try_of(enum series series, u32 frame);
/* "a pool slot", or that of a series. */
const char *series_slot(enum series series);
/* The series whose slot has the frame; SERIES_COUNT where none has. */
enum series pool_series_of(u32 frame);
/* Slots of the series that the task was the first to take and nobody has let go of; and that anybody holds. */
u32 pool_held_by(const struct task *task, enum series series);
u32 pool_held(enum series series);

struct pool_counts {
    u32 sweeps;    /* sweeps that freed at least one slot */
    u32 reclaimed; /* slots that sweeps freed */
    u32 waits;     /* times that a taker slept */
    u32 held_max;  /* slots that were held at a time */
};
extern struct pool_counts pool_counts;

#endif
