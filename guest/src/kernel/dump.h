/* What a kernel that cannot go on says before it stops. */
#ifndef DUMP_H
#define DUMP_H

#include "trap.h"

/* An exception in kernel code, or one that no code may raise: prints everything and ends the run. */
void die(const struct trap_frame *frame, u32 cr2) __attribute__((noreturn));

/* "read", "write" or "fetch", and why it was refused, in words. */
const char *fault_access_text(u32 error);
const char *fault_reason_text(u32 error);

#endif
