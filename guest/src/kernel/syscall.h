/* The kernel's side of system calls. */
#ifndef SYSCALL_H
#define SYSCALL_H

#include "trap.h"

void syscall_dispatch(struct trap_frame *frame);

/* traps.S: copies between kernel and user memory; false if the user's part is not accessible. The addresses are checked to
 * be the user's by copy_from_user and copy_to_user alone. */
bool user_copy(void *to, const void *from, u32 bytes);
extern const char user_copy_access[], user_copy_failed[];

#endif
