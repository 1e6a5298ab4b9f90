/* Program `age`: pages whose accessed bits the kernel takes again and again, as reclaim does, while they are used.
 *
 * Jobs: 1. by the process that uses them, 2. by another one while the first runs, 3. while it waits, and its CPU halts; the kernel
 * reads from a page of its before it goes on.
 * Holds: a page that was used since its bits were taken has one again, which is what a CPU's TLB would keep it from without a flush.
 * The pages are shared by fork and only read after it, so that each of both may take the bits of both. What both know is on a page of
 * the shared file. */
#include "user.h"

#define BASE 0x40000000u
#define PAGES 8
#define PERCENT_PER_ROUND 10
/* The one under way when bits are taken, one that the next system call ends, and one for sure. */
#define LOOPS 3
/* Looks at what the other does before it is woken once more. */
#define LOOKS 10000

enum word { LOOP, STOP, ROUND };

static char pages[PAGES][PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));

static volatile u32 *shared(enum word word) { return (volatile u32 *)BASE + word; }

static void use_pages(void)
{
    for (u32 page = 0; page < PAGES; page++)
        *(volatile char *)pages[page];
}

/* Where there is one CPU, the other process needs it. */
static void pass(void)
{
    if (cpus() == 1)
        yield();
    else
        __asm__ volatile("pause");
}

static u32 own(u32 rounds)
{
    u32 used = 0;
    for (u32 round = 0; round < rounds; round++) {
        use_pages();
        used += age(pages, PAGES);
    }
    return used;
}

static void run_on(void)
{
    while (!*shared(STOP)) {
        use_pages();
        ++*shared(LOOP);
        getpid();
    }
    exit(0);
}

static u32 while_it_runs(u32 rounds)
{
    u32 used = 0, status;
    *shared(LOOP) = *shared(STOP) = 0;
    u32 pid = fork();
    expect(pid != SYS_ERROR, "a process is forked");
    if (pid == 0)
        run_on();
    age(pages, PAGES);
    for (u32 round = 0; round < rounds; round++) {
        for (u32 loop = *shared(LOOP); *shared(LOOP) - loop < LOOPS;)
            pass();
        used += age(pages, PAGES);
    }
    *shared(STOP) = 1;
    expect(wait(&status) != SYS_ERROR && status == 0, "it ends well");
    return used;
}

static void run_and_wait(u32 rounds)
{
    u32 wrong = 0;
    for (u32 round = 1; round <= rounds; round++) {
        use_pages();
        *shared(ROUND) = round;
        wrong += await_age(pages[0]) != (u8)pages[0][0];
    }
    *shared(ROUND) = rounds + 1;
    exit(wrong);
}

/* One that is late may take bits of the next round: all rounds together have as many as there must be. */
static u32 while_it_waits(u32 rounds)
{
    u32 used = 0, status;
    *shared(ROUND) = 0;
    age(pages, PAGES);
    u32 pid = fork();
    expect(pid != SYS_ERROR, "another process is forked");
    if (pid == 0)
        run_and_wait(rounds);
    for (u32 round = 1; round <= rounds; round++) {
        while (*shared(ROUND) < round)
            pass();
        do {
            used += age(pages, PAGES);
            for (u32 looks = 0; *shared(ROUND) == round && looks < LOOKS; looks++)
                pass();
        } while (*shared(ROUND) == round);
    }
    expect(wait(&status) != SYS_ERROR && status == 0, "it ends well");
    return used;
}

u32 program_main(u32 seed, u32 scale, u32 flags)
{
    (void)flags;
    u32 rounds = 1 + scale / PERCENT_PER_ROUND, all = rounds * PAGES;
    expect(file_truncate(1) == 0 && file_map(BASE) == 0, "the file has its page");
    for (u32 page = 0; page < PAGES; page++)
        pages[page][0] = (char)(seed + page);
    bool by_itself = own(rounds) >= all, while_running = while_it_runs(rounds) >= all, while_waiting = while_it_waits(rounds) >= all;
    expect(by_itself, "pages that a process has aged and used have been used");
    expect(while_running, "so have those that another aged while it ran");
    expect(while_waiting, "so have those that another aged while it waited");
    for (u32 page = 0; page < PAGES; page++)
        expect(pages[page][0] == (char)(seed + page), "a page is as it was");
    expect(file_truncate(0) == 0, "the file is cut off");
    say("pager: age rounds=", rounds, " pages=", PAGES, " missed=", !by_itself + !while_running + !while_waiting, NULL);
    tally_report();
    return 0;
}
