/* Spin locks. See locks.h for which there are.
 *
 * Story: a lock names the CPU that has it. Who waits looks without a locked instruction, and says with PAUSE that it does. */
#include "locks.h"

#include "check.h"
#include "tlb.h"

struct lock pages_lock;

static struct cpu *owner_of(const struct lock *lock) { return *(struct cpu *const volatile *)&lock->owner; }

static void spin(struct lock *lock, struct cpu *self)
{
    while (!__sync_bool_compare_and_swap(&lock->owner, NULL, self))
        while (owner_of(lock)) {
            tlb_serve(self);
            pause();
        }
}

void lock_spin(struct lock *lock, enum lock_level level)
{
    struct cpu *self = cpu_self();
    if (owner_of(lock) == self) {
        lock->again++;
        return;
    }
    ASSERT(self->locks < 1u << level);
    spin(lock, self);
    lock->level = level;
    self->locks |= 1u << level;
}

static void release(struct lock *lock)
{
    barrier();
    *(struct cpu *volatile *)&lock->owner = NULL;
}

void lock_release(struct lock *lock)
{
    struct cpu *self = cpu_self();
    ASSERT(owner_of(lock) == self);
    if (lock->again) {
        lock->again--;
        return;
    }
    self->locks &= ~(1u << lock->level);
    release(lock);
}

void lock_spin_unordered(struct lock *lock)
{
    if (smp)
        spin(lock, cpu_self());
}

void lock_release_unordered(struct lock *lock)
{
    if (smp)
        release(lock);
}
