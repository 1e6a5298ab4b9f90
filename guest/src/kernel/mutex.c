/* Locks that are waited for asleep. Whoever looks at one has the kernel's lock, and so nothing comes between a look and a change. */
#include "mutex.h"

#include "check.h"

void mutex_lock(struct mutex *mutex)
{
    ASSERT(mutex->owner != current);
    while (mutex->owner)
        task_wait_on(mutex);
    mutex->owner = current;
}

void mutex_unlock(struct mutex *mutex)
{
    ASSERT(mutex->owner == current);
    mutex->owner = NULL;
    task_wake(mutex);
}
