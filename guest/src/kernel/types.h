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

/* Keeps the compiler from moving memory accesses across this point. */
#define barrier() __asm__ volatile("" ::: "memory")

#endif
