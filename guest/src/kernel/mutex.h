/* Locks that are waited for asleep. */
#ifndef MUTEX_H
#define MUTEX_H

#include "task.h"

struct mutex {
    const struct task *owner;
};

/* With the kernel's lock; not by who has it. */
void mutex_lock(struct mutex *mutex);
void mutex_unlock(struct mutex *mutex);

#endif
