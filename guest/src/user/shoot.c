/* Program `shoot`: processes that store to pages of the shared file, without a pause, while another one has the file written out
 * again and again, which takes the pages away from them.
 *
 * Story: a page that nobody maps leaves the cache once it is on the disk. So whoever keeps a translation longer than it may stores
 * into a frame that is the file's no more, and misses that store when the page comes back.
 * Holds: a writer has pages of its own, and each round stores to one word of each and looks at the one before. What a page holds at
 * the end is known. */
#include "user.h"

#define BASE 0x40000000u
#define WRITERS 3
#define PAGES_EACH 2
#define DONE (WRITERS * PAGES_EACH) /* the page in which a writer says that it is done */
#define PAGES (DONE + 1)
#define WORDS (PAGE_SIZE / 4)
#define ROUNDS_PER_PERCENT 2000
#define SYNCS_MAX 1000000u

static u32 seed;

static volatile u32 *page_at(u32 page) { return (volatile u32 *)(BASE + page * PAGE_SIZE); }

static u32 value(u32 page, u32 round) { return ((round + 1) * 0x9e3779b9u ^ page * 0x85ebca6bu) + seed; }

/* What a word holds after so many rounds, of which at least WORDS. */
static u32 last_value(u32 page, u32 word, u32 rounds)
{
    u32 last = rounds - 1, back = (last - word) % WORDS;
    return value(page, last - back);
}

static u32 count_wrong(u32 first, u32 pages, u32 rounds)
{
    u32 wrong = 0;
    for (u32 page = first; page < first + pages; page++)
        for (u32 word = 0; word < WORDS; word++)
            wrong += page_at(page)[word] != last_value(page, word, rounds);
    return wrong;
}

static void writer(u32 which, u32 rounds)
{
    u32 first = which * PAGES_EACH, wrong = 0;
    tally_forget();
    for (u32 round = 0; round < rounds; round++)
        for (u32 page = first; page < first + PAGES_EACH; page++) {
            volatile u32 *words = page_at(page);
            wrong += round && words[(round - 1) % WORDS] != value(page, round - 1);
            words[round % WORDS] = value(page, round);
        }
    wrong += count_wrong(first, PAGES_EACH, rounds);
    expect(wrong == 0, "what a writer reads is what it stored");
    page_at(DONE)[which] = 1;
    tally_report();
    exit(wrong != 0);
}

static bool all_done(void)
{
    u32 done = 0;
    for (u32 which = 0; which < WRITERS; which++)
        done += page_at(DONE)[which];
    return done == WRITERS;
}

u32 program_main(u32 run_seed, u32 scale, u32 flags)
{
    (void)flags;
    u32 rounds = scale * ROUNDS_PER_PERCENT + WORDS, syncs = 0, status;
    seed = run_seed;
    expect(file_truncate(PAGES) == 0 && file_map(BASE) == 0, "the file has its pages");
    for (u32 which = 0; which < WRITERS; which++) {
        u32 pid = fork();
        expect(pid != SYS_ERROR, "a writer is forked");
        if (pid == 0)
            writer(which, rounds);
    }
    /* It may not come to an end, since pages are stored to while they are written. */
    while (!all_done() && syncs++ < SYNCS_MAX)
        file_sync();
    expect(syncs < SYNCS_MAX, "the writers come to their end");
    for (u32 which = 0; which < WRITERS; which++)
        expect(wait(&status) != SYS_ERROR && status == 0, "a writer ends well");
    expect(file_sync() == 0, "the file is on its disk");
    u32 wrong = count_wrong(0, DONE, rounds);
    expect(wrong == 0, "the file is what was stored last");
    expect(file_truncate(0) == 0, "the file is cut off");
    say("pager: shoot writers=", WRITERS, " rounds=", rounds, " wrong=", wrong, NULL);
    tally_report();
    return 0;
}
