/* Program `storm`: page faults, as many as it can. Each round maps a few pages, touches each, and unmaps them.
 *
 * Story: few enough at a time that the kernel flushes page by page. A page beside them stays mapped, so that the page table
 * stays too and what is timed is the fault alone. */
#include "user.h"

#define KEPT 0x40000000u
#define BASE (KEPT + PAGE_SIZE)
#define PAGES 4
#define ROUNDS_PER_PERCENT 50

/* The store faults and gets a page of zeros of its own. */
static u32 touch(u32 page, u32 value)
{
    volatile u32 *words = (volatile u32 *)(BASE + page * PAGE_SIZE);
    u32 at = value % (PAGE_SIZE / 4 - 1);
    words[at] = value;
    return words[at] != value || words[at + 1] != 0;
}

u32 program_main(u32 seed, u32 scale, u32 flags)
{
    (void)flags;
    u32 rounds = scale * ROUNDS_PER_PERCENT, refused = 0, wrong = 0;
    expect(map(KEPT, PAGE_SIZE) == 0, "a page is mapped for good");
    *(volatile u32 *)KEPT = seed;
    stopwatch_start("storm.user", "faults", rounds * PAGES);
    for (u32 round = 0; round < rounds; round++) {
        refused += map(BASE, PAGES * PAGE_SIZE) != 0;
        for (u32 page = 0; page < PAGES; page++)
            wrong += touch(page, seed + round * PAGES + page + 1);
        refused += unmap(BASE, PAGES * PAGE_SIZE) != 0;
    }
    stopwatch_stop("storm.user");
    expect(refused == 0, "the kernel maps and unmaps");
    expect(wrong == 0, "every page comes as zeros and keeps what is stored");
    expect(*(volatile u32 *)KEPT == seed, "the page beside them is as it was");
    say("pager: storm user faults=", rounds * PAGES, " wrong=", wrong, NULL);
    tally_report();
    return 0;
}
