/* What programs use: system calls, lines on the console, counted checks. */
#ifndef USER_H
#define USER_H

#include "syscalls.h"
#include "types.h"

/* Exit status = what it returns. */
u32 program_main(u32 seed, u32 scale, u32 flags);

static inline u32 system_call(u32 number, u32 a, u32 b, u32 c)
{
    u32 result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "memory");
    return result;
}

static inline void exit(u32 status)
{
    system_call(SYS_EXIT, status, 0, 0);
    __builtin_unreachable();
}

static inline u32 fork(void) { return system_call(SYS_FORK, 0, 0, 0); }
static inline u32 wait(u32 *status) { return system_call(SYS_WAIT, (u32)status, 0, 0); }
static inline u32 getpid(void) { return system_call(SYS_GETPID, 0, 0, 0); }
static inline void yield(void) { system_call(SYS_YIELD, 0, 0, 0); }
static inline u32 write(const void *text, u32 bytes) { return system_call(SYS_WRITE, (u32)text, bytes, 0); }
static inline u32 brk(u32 end) { return system_call(SYS_BRK, end, 0, 0); }
static inline u32 map(u32 start, u32 bytes) { return system_call(SYS_MAP, start, bytes, 0); }
static inline u32 unmap(u32 start, u32 bytes) { return system_call(SYS_UNMAP, start, bytes, 0); }
static inline u32 witness(const char *name, u32 start, u32 pages)
{
    return system_call(SYS_WITNESS, (u32)name, start, pages);
}
static inline u32 preemptions(void) { return system_call(SYS_PREEMPTIONS, 0, 0, 0); }
static inline u32 fpu_takes(void) { return system_call(SYS_FPU_TAKES, 0, 0, 0); }
static inline u32 meet(u32 meets) { return system_call(SYS_MEET, meets, 0, 0); }
static inline u32 cpus(void) { return system_call(SYS_CPUS, 0, 0, 0); }
static inline u32 memory(void) { return system_call(SYS_MEMORY, 0, 0, 0); }
static inline u32 file_map(u32 start) { return system_call(SYS_FILE_MAP, start, 0, 0); }
static inline u32 file_truncate(u32 pages) { return system_call(SYS_FILE_TRUNCATE, pages, 0, 0); }
static inline u32 file_reserve(u32 page) { return system_call(SYS_FILE_RESERVE, page, 0, 0); }
static inline u32 audit(void) { return system_call(SYS_AUDIT, 0, 0, 0); }
static inline u32 age(void *start, u32 pages) { return system_call(SYS_AGE, (u32)start, pages, 0); }
static inline u32 await_age(const void *word) { return system_call(SYS_AWAIT_AGE, (u32)word, 0, 0); }
static inline u32 file_sync(void) { return system_call(SYS_FILE_SYNC, 0, 0, 0); }
static inline void sleep(u32 ticks) { system_call(SYS_SLEEP, ticks, 0, 0); }

/* Builds one line: text and numbers in turn, until NULL. say("a=", 1, " b=", 2, NULL) */
void say(const char *text, ...);

/* Around what is timed: "time: begin PHASE UNIT=COUNT", then "time: end PHASE tsc1024=N", N in 1024 counts of the time-stamp
 * counter. Whoever measures from outside goes by when the two lines come, and by COUNT. */
void stopwatch_start(const char *phase, const char *unit, u32 count);
void stopwatch_stop(const char *phase);

/* Counts a check of this process; a failed one is said. */
void expect(bool holds, const char *what);
/* Hands the counts to the kernel and clears them: before an exit, and after a fork in the child. */
void tally_report(void);
void tally_forget(void);

#endif
