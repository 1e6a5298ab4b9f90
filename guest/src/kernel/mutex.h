/* Locks that are waited for asleep. */
#ifndef MUTEX_H
#define MUTEX_H

#include "task.h"

struct mutex {
    const struct task *owner;
    const char *name;   /* for who reports; NULL: none */
    struct mutex *next; /* of those that its owner has */
};

/* With the kernel's lock; not by who has it. */
void mutex_lock(struct mutex *mutex);
void mutex_unlock(struct mutex *mutex);
bool mutex_is_mine(const struct mutex *mutex);

#endif
