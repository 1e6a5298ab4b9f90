/* Checks that a workload counts, and assertions that stop the kernel. */
#ifndef CHECK_H
#define CHECK_H

#include "types.h"

struct tally {
    u32 checks, errors;
};
extern struct tally tally;

/* Counts one check; a failed one is printed (the first few) and makes the verdict FAIL. */
void check(bool holds, const char *what);

/* Prints the closing line and leaves through the debug-exit port with `status`. */
void finish(u32 status) __attribute__((noreturn));

/* The kernel lost an invariant: message, stack, windows, closing line with FAIL. */
void panic(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
void vpanic(const char *format, va_list args) __attribute__((noreturn));

#define ASSERT_TEXT(line) #line
#define ASSERT_LINE(line) ASSERT_TEXT(line)
#define ASSERT(condition)                                                                  \
    do {                                                                                   \
        if (!(condition))                                                                  \
            panic("assertion failed: %s, %s:%s", #condition, __FILE_NAME__, ASSERT_LINE(__LINE__)); \
    } while (0)

#endif
