/* Memory and string primitives. The mem* ones are also what the compiler calls by itself. */
#ifndef STRING_H
#define STRING_H

#include "types.h"

void *memcpy(void *to, const void *from, size_t bytes);
void *memset(void *to, int byte, size_t bytes);
int memcmp(const void *a, const void *b, size_t bytes);
size_t strlen(const char *s);

/* Whole pages, dword by dword. */
static inline void clear_page(void *page)
{
    u32 dwords = PAGE_SIZE / 4;
    __asm__ volatile("rep stosl" : "+D"(page), "+c"(dwords) : "a"(0) : "memory");
}

void copy_page(void *to, const void *from);

/* A sum over a page's words, that hangs on their order; and over each SAMPLE_STEP-th from `words` on. */
#define SAMPLE_STEP 32
u32 sum_page(u32 sum, const u32 *words);
u32 sum_sample(u32 sum, const u32 *words);

#endif
