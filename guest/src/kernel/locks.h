/* The kernel's locks, and the one order in which they are taken.
 *
 *   level             type   protects
 *   ---------------   ----   ---------------------------------------------------------------------------------------------
 *   LOCK_KERNEL       spin   all that no other lock does: the file and its cache, processes' birth and death, regions, the balloon,
 *                            the pool, out-of-memory, workloads, the console. Goes with its task: schedule() lets go of it and
 *                            takes it again (cpus.h)
 *   LOCK_SPACE_LIST   spin   which address spaces there are
 *   LOCK_SPACE        spin   one address space's page tables (upt.h): an open leaf holds it
 *   LOCK_CHILD        spin   the same of a second space: the child's, while fork has the parent's
 *   LOCK_PAGES        spin   frames: who holds them, what they are, the free lists, the lists of reclaim, the map of swap
 *   LOCK_DEVICES      spin   rings of virtio devices and their requests; interrupts are off
 *   LOCK_TASKS        spin   who runs, who waits for what, which CPU is idle; interrupts are off, held over a switch
 *
 * Holds: INV-G-LOCK-1: a lock is taken only by a CPU that has none of its level or below it, which lock_take checks. INV-G-LOCK-2: nobody sleeps with any but LOCK_KERNEL (schedule checks). INV-G-LOCK-3: who takes a lock,
 * or waits for it, does what others want of its TLB, so that who has it may wait for that (tlb.c). Interrupt handlers take the last two alone.
 * Limits: whoever comes first gets it, in no order.
 * Nothing of this is done on a machine of one CPU. */
#ifndef LOCKS_H
#define LOCKS_H

#include "cpus.h"
#include "tlb.h"

enum lock_level { LOCK_KERNEL, LOCK_SPACE_LIST, LOCK_SPACE, LOCK_CHILD, LOCK_PAGES, LOCK_DEVICES, LOCK_TASKS };

/* Where it is not to be had at once. */
void lock_wait(struct lock *lock, struct cpu *self);
void lock_out_of_order(const struct cpu *self, enum lock_level level) __attribute__((noreturn));
/* For the audit, which has the kernel and takes one of a level after the other: without a check, and without a note of it. */
void lock_take_unordered(struct lock *lock);
void lock_give_unordered(struct lock *lock);

static inline void lock_spin(struct lock *lock, enum lock_level level)
{
    struct cpu *self = cpu_self();
    if (self->locks >> level)
        lock_out_of_order(self, level);
    tlb_serve(self);
    if (!__sync_bool_compare_and_swap(&lock->owner, NULL, self))
        lock_wait(lock, self);
    self->locks |= 1u << level;
}

static inline void lock_release(struct lock *lock, enum lock_level level)
{
    cpu_self()->locks &= ~(1u << level);
    barrier();
    lock->owner = NULL;
}

static inline void lock_take(struct lock *lock, enum lock_level level)
{
    if (smp)
        lock_spin(lock, level);
}

static inline void lock_give(struct lock *lock, enum lock_level level)
{
    if (smp)
        lock_release(lock, level);
}

/* LOCK_PAGES: frames.h, lru.h and swap.h. What each call of these does is one step for all others; who needs several to be one has
 * the lock around them, and calls those whose names end in _held. */
extern struct lock pages_lock;
static inline void pages_take(void) { lock_take(&pages_lock, LOCK_PAGES); }
static inline void pages_give(void) { lock_give(&pages_lock, LOCK_PAGES); }

#endif
