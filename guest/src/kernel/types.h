/* Plain types, and the few macros that everything uses. */
#ifndef TYPES_H
#define TYPES_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define PAGE_SHIFT 12
#define PAGE_SIZE 4096u
#define PAGE_MASK (~(PAGE_SIZE - 1))
#define MIB (1024u * 1024u)

#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#define ALIGN_DOWN(value, step) ((value) & ~((step)-1))
#define ALIGN_UP(value, step) (((value) + (step)-1) & ~((step)-1))

static inline u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }
static inline u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }

/* Lines of CPUs' caches. What all CPUs read, and hardly any writes, has lines of its own: beside a lock or a count it would have to come
 * from the CPU that took or counted last, again and again. */
#define CACHE_LINE 64
#define OWN_LINE __attribute__((aligned(CACHE_LINE)))
#define READ_MOSTLY __attribute__((section(".data.read_mostly")))

/* Keeps the compiler from moving memory accesses across this point. */
#define barrier() __asm__ volatile("" ::: "memory")

#endif
