/* Locks that are waited for asleep. Whoever looks at one has the kernel's lock, and so nothing comes between a look and a change. */
#include "mutex.h"

#include "check.h"
#include "rule.h"

/* It waits for itself. A scene looks on and says so; else nobody would. */
static void mutex_own_wanted(const struct mutex *mutex)
{
    ASSERT(mutex->owner != current || scene_looks_on);
}

void mutex_lock(struct mutex *mutex)
{
    if (mutex->owner == current)
        mutex_own_wanted(mutex);
    while (mutex->owner)
        task_wait_for(mutex->name, mutex);
    mutex->owner = current;
    mutex->next = current->mutexes;
    current->mutexes = mutex;
}

bool mutex_is_mine(const struct mutex *mutex) { return mutex->owner == current; }

static void forget(struct mutex *mutex)
{
    struct mutex **link = &current->mutexes;
    while (*link != mutex)
        link = &(*link)->next;
    *link = mutex->next;
}

void mutex_unlock(struct mutex *mutex)
{
    ASSERT(mutex->owner == current);
    forget(mutex);
    mutex->owner = NULL;
    task_wake(mutex);
}
