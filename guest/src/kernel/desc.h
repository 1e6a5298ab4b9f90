/* GDT, TSS and IDT. */
#ifndef DESC_H
#define DESC_H

#include "types.h"

struct cpu;

/* Makes all three, with a TSS for each CPU, and loads them. From here on exceptions reach trap.c. */
void descriptors_init(void);
/* The same tables for another CPU, by itself. */
void descriptors_load(const struct cpu *self);
/* The kernel stack that this CPU's next trap from user mode starts on. */
void tss_set_stack(u32 top);

#endif
