/* Out of memory: which process has to go. */
#ifndef OOM_H
#define OOM_H

#include "types.h"

/* Takes the memory of the largest process, which is killed at its next touch of it. False where that is the current process, which
 * the caller is to fail, or there is none. With the kernel's lock. */
bool oom_kill_other(void);

#endif
