/* Memory and string primitives.
 *
 * Holds: no store here crosses a page boundary. Anything that is not known to be aligned goes byte by byte: a dword
 * store over the edge of a page, when the second page faults, is not restartable on every host that runs us. */
#include "string.h"

void *memcpy(void *to, const void *from, size_t bytes)
{
    void *start = to;
    if (((size_t)to | (size_t)from | bytes) % 4 == 0) {
        bytes /= 4;
        __asm__ volatile("rep movsl" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
    } else {
        __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
    }
    return start;
}

void *memset(void *to, int byte, size_t bytes)
{
    void *start = to;
    u32 value = (u8)byte * 0x01010101u;
    if (((size_t)to | bytes) % 4 == 0) {
        bytes /= 4;
        __asm__ volatile("rep stosl" : "+D"(to), "+c"(bytes) : "a"(value) : "memory");
    } else {
        __asm__ volatile("rep stosb" : "+D"(to), "+c"(bytes) : "a"(value) : "memory");
    }
    return start;
}

int memcmp(const void *a, const void *b, size_t bytes)
{
    const u8 *x = a, *y = b;
    for (; bytes; bytes--, x++, y++)
        if (*x != *y)
            return *x < *y ? -1 : 1;
    return 0;
}

size_t strlen(const char *s)
{
    size_t n = 0;
    while (s[n])
        n++;
    return n;
}

void copy_page(void *to, const void *from) { memcpy(to, from, PAGE_SIZE); }

/* With a step that the compiler knows it takes two instructions for a word. */
static inline __attribute__((always_inline)) u32 sum_each(u32 sum, const u32 *words, u32 step)
{
#pragma GCC unroll 32
    for (u32 at = 0; at < PAGE_SIZE / 4; at += step)
        sum = (sum << 1 | sum >> 31) + words[at];
    return sum;
}

u32 sum_page(u32 sum, const u32 *words) { return sum_each(sum, words, 1); }

u32 sum_sample(u32 sum, const u32 *words) { return sum_each(sum, words, SAMPLE_STEP); }
