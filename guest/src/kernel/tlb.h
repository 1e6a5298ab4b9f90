/* Which page tables are loaded, and making the CPU forget translations. */
#ifndef TLB_H
#define TLB_H

#include "types.h"

/* Loads CR3 unless it holds `root` already. Loading forgets all but global translations. */
void tlb_load(u32 root);
bool tlb_is_loaded(u32 root);

/* Forgets all but global translations; in PAE also reads the four top entries again. */
void flush_not_global(void);

#endif
