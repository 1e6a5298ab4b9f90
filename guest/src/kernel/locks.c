/* Spin locks. See locks.h for which there are.
 *
 * Story: a lock names the CPU that has it. Who waits looks without a locked instruction, and says with PAUSE that it does. */
#include "locks.h"

#include "check.h"
#include "tlb.h"

struct lock pages_lock;

void lock_wait(struct lock *lock, struct cpu *self)
{
    do
        while (lock->owner) {
            tlb_serve(self);
            pause();
        }
    while (!__sync_bool_compare_and_swap(&lock->owner, NULL, self));
}

void lock_out_of_order(const struct cpu *self, enum lock_level level)
{
    panic("CPU %u has locks of levels %x and wants one of level %u", self->index, self->locks, level);
}

void lock_take_unordered(struct lock *lock)
{
    if (smp && !__sync_bool_compare_and_swap(&lock->owner, NULL, cpu_self()))
        lock_wait(lock, cpu_self());
}

void lock_give_unordered(struct lock *lock)
{
    barrier();
    lock->owner = NULL;
}
