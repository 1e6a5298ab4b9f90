/* Which page tables are loaded, and making CPUs forget translations. */
#ifndef TLB_H
#define TLB_H

#include "cpus.h"
#include "omit.h"

/* Loads CR3 unless it holds `root` already. Loading forgets all but global translations. */
void tlb_load(u32 root);
/* On this CPU. A process's root is loaded on one CPU at most, that of its task (INV-G-TLB-1): what the task does to its own space
 * concerns no other. */
static inline bool tlb_is_loaded(u32 root) { return cpu_self()->loaded_root == root; }
bool tlb_is_loaded_anywhere(u32 root);

/* Forgets all but global translations here; in PAE also reads the four top entries again. Its name is for going without. */
void flush_not_global(enum flush flush);
/* The same on every CPU, for the pool. */
void flush_not_global_everywhere(void);

/* A page's entry in the space of `root` has been taken away: forgotten here at once, elsewhere by tlb_finish. */
void tlb_drop(u32 root, u32 page);
/* An entry's A has been taken away: forgotten here at once, elsewhere before that CPU's next trap ends. Until then it may
 * use the page without setting A again, which does no harm. */
void tlb_age(u32 root, u32 page);
/* Returns when no CPU can use what was dropped. Before that nothing is done with the frames behind it. */
void tlb_finish(void);

/* For whoever takes a lock or waits for another CPU, and the flush interrupt: does what is wanted of this CPU. */
void tlb_serve_all(struct cpu *self);
static inline void tlb_serve(struct cpu *self)
{
    if (self->called)
        tlb_serve_all(self);
}
/* As a trap ends, and for a CPU that goes on after it has halted. */
static inline void tlb_refresh(enum flush flush)
{
    if (cpu_self()->stale)
        flush_not_global(flush);
}

#endif
