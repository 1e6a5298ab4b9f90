/* GDT, TSS and IDT. */
#ifndef DESC_H
#define DESC_H

#include "types.h"

/* Loads all three. From here on exceptions reach trap.c. */
void descriptors_init(void);
/* The kernel stack that the next trap from user mode starts on. */
void tss_set_stack(u32 top);

#endif
