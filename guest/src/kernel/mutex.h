/* Locks that are waited for asleep. */
#ifndef MUTEX_H
#define MUTEX_H

#include "task.h"

struct mutex {
    const struct task *owner;
};

static inline bool mutex_try_lock(struct mutex *mutex)
{
    if (mutex->owner)
        return false;
    mutex->owner = current;
    return true;
}

/* Not by an interrupt handler, nor by who has it. */
void mutex_lock(struct mutex *mutex);
void mutex_unlock(struct mutex *mutex);

#endif
