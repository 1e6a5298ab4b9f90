/* Out of memory: which process has to go.
 *
 * Story: the largest, since its end helps most, and whoever has come to want memory may have next to none. Its pages are taken at
 * once, wherever it is; it cannot go on without them, and the first fault that it has ends it. So nobody waits for a process that
 * itself waits for memory.
 * Locks: the kernel's, so that no space comes, goes or changes its regions meanwhile; the process may run on another CPU. Never
 * sleeps. */
#include "oom.h"

#include "console.h"
#include "reclaim.h"
#include "space.h"
#include "task.h"

static struct space *find_largest(u32 *pages)
{
    struct space *largest = NULL;
    *pages = 0;
    for (struct space *space = spaces; space; space = space->next) {
        u32 size = space->doomed ? 0 : space_pages(space);
        if (size <= *pages)
            continue;
        largest = space;
        *pages = size;
    }
    return largest;
}

bool oom_kill_other(void)
{
    u32 pages;
    struct space *largest = find_largest(&pages);
    if (!largest)
        return false;
    reclaim_counts.out_of_memory++;
    /* An address space is the first part of its task. */
    printk("pager: out of memory: process %u has the most, %u pages\n", ((const struct task *)largest)->pid, pages);
    if (largest == &current->space)
        return false;
    space_reap(largest);
    return true;
}
