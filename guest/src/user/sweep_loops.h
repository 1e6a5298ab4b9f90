/* The loops of program `sweep`. All go four accesses at a time over dwords; a value stored is SWEEP_STEP more than the one
 * before it. Also read by the assembler. */
#ifndef SWEEP_LOOPS_H
#define SWEEP_LOOPS_H

#define SWEEP_STEP 0x9e3779b9

/* From one access of a strided loop to the next: a page and a bit. In dwords it is odd, so that a loop over a power of two of
 * them meets each once. */
#define SWEEP_STRIDE 4164

#ifndef __ASSEMBLER__
#include "types.h"

/* Loads give the sum of what they read. */
void store_sequential(u32 *at, u32 fours, u32 first);
u32 load_sequential(const u32 *at, u32 fours);
/* From `offset` bytes above `base` on; offsets are taken modulo `mask` + 1. */
void store_strided(u32 *base, u32 fours, u32 first, u32 offset, u32 mask);
u32 load_strided(const u32 *base, u32 fours, u32 offset, u32 mask);
#endif

#endif
