/* Program `reclaim`: more memory than there is.
 *
 *   workers    one process for each pattern of access, with twice the machine's memory between them, and one and a half times on a
 *              slow CPU; each page carries the number of its last version in 32 words, which are compared at every touch;
 *              with work=N each touch also reads the whole page N times, as a process would that has use for what it keeps
 *   common     pages that all have from the parent, read by all and written by each: shared in swap, and copied
 *   file       two processes with a shared file, each the other's neighbour; a third that cuts it off and makes it longer again
 *
 * Holds: only the first process prints, after the others have ended, and nothing that hangs on the timer. */
#include "reclaim_pattern.h"
#include "user.h"

#define BASE 0x40000000u
#define COMMON 0x30000000u
#define FILE_BASE 0x80000000u
#define FILE_AGAIN 0x90000000u
#define FILE_WRITERS 2
#define RESERVED_STEP 4 /* one page of so many of a writer's gets its place on the disk before it is written out */
#define WITNESSED 8

/* A page's words: four in each eighth of it, and so that their numbers have every remainder by 32. Whoever looks at each 32nd word
 * of a page, from whichever on, meets one of them: swap's sum on a slow CPU does. */
#define EIGHTHS 8
#define RUN 4
#define WORD_STEP (PAGE_SIZE / 4 / EIGHTHS + RUN)
#define NEXT 0x27d4eb2fu /* from word to word */
#define STATUS_WRONG 1

/* How much a CPU has time for. */
static const struct amounts {
    u32 memory;       /* of all workers, in percent of the machine's */
    u32 touches;      /* percent of its pages that a worker touches between the first time and the last */
    u32 common;       /* pages */
    u32 file, steady; /* pages, and those of them that are never cut off */
} fast_amounts = {200, 100, 16, 96, 64}, slow_amounts = {150, 10, WITNESSED, 48, 32};

static const struct amounts *amounts;

static bool fast(void) { return amounts == &fast_amounts; }

static u32 wrong, work;

static u32 *page_at(u32 base, u32 page) { return (u32 *)(base + page * PAGE_SIZE); }

static u32 first_word(u32 key, u32 page, u32 version) { return (page + 1) * 0x9e3779b9u ^ version * 0x85ebca6bu ^ key; }

/* Where in the page its words are: in another quarter of each eighth for each of four pages. */
static u32 *words_of(u32 base, u32 page) { return page_at(base, page) + page % 4 * 32; }

static void stamp(u32 base, u32 page, u32 key, u32 version)
{
    u32 *words = words_of(base, page), word = first_word(key, page, version);
    for (u32 i = 0; i < EIGHTHS; i++, words += WORD_STEP)
#pragma GCC unroll 4
        for (u32 j = 0; j < RUN; j++, word += NEXT)
            words[j] = word;
}

static void verify(u32 base, u32 page, u32 key, u32 version)
{
    const u32 *words = words_of(base, page);
    u32 word = first_word(key, page, version), differ = 0;
    for (u32 i = 0; i < EIGHTHS; i++, words += WORD_STEP)
#pragma GCC unroll 4
        for (u32 j = 0; j < RUN; j++, word += NEXT)
            differ |= words[j] ^ word;
    wrong += differ != 0;
}

/* It reads as zeros where it will be stamped, and at its ends. */
static void verify_zero(u32 base, u32 page)
{
    const u32 *words = words_of(base, page), *all = page_at(base, page);
    u32 any = page % 4 ? all[0] : all[PAGE_SIZE / 4 - 1];
    for (u32 i = 0; i < EIGHTHS; i++, words += WORD_STEP)
        any |= words[0];
    wrong += any != 0;
}

/* The same of a page that has been stamped: the words next to the stamp's, but in the last eighth, where there may be none. */
static void verify_zero_beside(u32 base, u32 page)
{
    const u32 *words = words_of(base, page);
    u32 any = 0;
    for (u32 i = 0; i < EIGHTHS - 1; i++, words += WORD_STEP)
        any |= words[RUN];
    wrong += any != 0;
}

static void leave(const char *what)
{
    expect(wrong == 0, what);
    tally_report();
    exit(wrong ? STATUS_WRONG : 0);
}

/* workers */

/* All are to be under way at once, whatever the timer does. */
#define TURN 32

static void take_turns(u32 step)
{
    if (step % TURN == TURN - 1)
        yield();
}

/* Nobody gives his memory back before all have had theirs: with a CPU for each the first might be done before the last begins. Whoever
 * is killed is not waited for. */
static void wait_for_others(void)
{
    while (meet(0) < PATTERNS + FILE_WRITERS + 1)
        yield();
}

/* The versions are in the heap: they go to swap like everything else. */
static u8 *versions_of(u32 pages)
{
    u32 start = brk(0);
    expect(brk(start + pages) == start + pages, "the heap grows");
    return (u8 *)start;
}

static u32 sum(const u32 *words)
{
    u32 sum = 0;
    for (u32 i = 0; i < PAGE_SIZE / 4; i++)
        sum = (sum << 1 | sum >> 31) + words[i];
    return sum;
}

/* It comes to the same each time: nobody else writes to the page. */
static void use(u32 page)
{
    u32 first = work ? sum(page_at(BASE, page)) : 0;
    for (u32 i = 1; i < work; i++)
        wrong += sum(page_at(BASE, page)) != first;
}

static void touch(struct walk *walk, u8 *versions, u32 key)
{
    u32 page = walk_next(walk);
    use(page);
    verify(BASE, page, key, versions[page]);
    if (walk_draw(walk) & 1)
        stamp(BASE, page, key, ++versions[page]);
}

static void use_common(u32 key, u32 seed)
{
    for (u32 page = 0; page < amounts->common; page++) {
        verify(COMMON, page, seed, 0);
        if ((page + key) % 3 == 0)
            stamp(COMMON, page, key, 1);
    }
}

static void verify_common(u32 key, u32 seed)
{
    for (u32 page = 0; page < amounts->common; page++)
        if ((page + key) % 3 == 0)
            verify(COMMON, page, key, 1);
        else
            verify(COMMON, page, seed, 0);
}

static void worker(enum pattern pattern, u32 pages, u32 touches, u32 seed)
{
    u32 key = seed + 1 + pattern;
    struct walk walk = walk_begin(pattern, pages, touches, key);
    tally_forget();
    expect(map(BASE, pages * PAGE_SIZE) == 0, "a worker has its memory");
    u8 *versions = versions_of(pages);
    for (u32 page = 0; page < pages; page++) {
        stamp(BASE, page, key, 0);
        verify_zero_beside(BASE, page);
        use(page);
        take_turns(page);
    }
    meet(1);
    use_common(key, seed);
    for (u32 i = 0; i < touches; i++) {
        touch(&walk, versions, key);
        take_turns(i);
    }
    expect(pattern != SHIFT || touches < SHIFTS || walk_has_shifted(&walk), "the working set has shifted");
    verify_common(key, seed);
    for (u32 page = 0; page < pages; page++) {
        verify(BASE, page, key, versions[page]);
        use(page);
        take_turns(page);
    }
    wait_for_others();
    leave("what a worker reads is what it wrote");
}

/* file */

/* Writes every second page of what is never cut off, again and again, and looks at what it wrote before. Some of these get their place
 * on the disk at once, on a CPU that has time for it, the others when they are written out. */
static void file_writer(u32 which, u32 rounds, u32 seed)
{
    u32 key = seed + 100 + which;
    bool reserved = true;
    tally_forget();
    meet(1);
    expect(file_map(FILE_BASE) == 0, "a writer has the file");
    for (u32 round = 0; round < rounds; round++)
        for (u32 page = which; page < amounts->steady; page += FILE_WRITERS) {
            if (round)
                verify(FILE_BASE, page, key, round - 1);
            else
                verify_zero(FILE_BASE, page);
            stamp(FILE_BASE, page, key, round);
            if (fast() && round == 0 && page / FILE_WRITERS % RESERVED_STEP == 0)
                reserved &= file_reserve(page) == 0;
            take_turns(page);
        }
    expect(reserved, "pages have their place on the disk");
    leave("what a writer reads in the file is what it wrote");
}

/* Writes beyond that, cuts it off, and finds zeros there when the file is longer again. In between, while all others are
 * at work, the kernel's audit has its turn, on a CPU that has time for it. */
static void file_cutter(u32 rounds, u32 seed)
{
    tally_forget();
    meet(1);
    expect(file_map(FILE_BASE) == 0, "the cutter has the file");
    expect(file_map(FILE_AGAIN) == SYS_ERROR, "a page of the file has one place in a process");
    expect(unmap(FILE_BASE, PAGE_SIZE) == SYS_ERROR, "the file is unmapped as a whole, or not");
    for (u32 round = 0; round < rounds; round++) {
        for (u32 page = amounts->steady; page < amounts->file; page++) {
            verify_zero(FILE_BASE, page);
            stamp(FILE_BASE, page, seed, round);
            take_turns(page);
        }
        expect(file_truncate(amounts->steady) == 0, "the file is cut off");
        expect(!fast() || audit() == 0, "the kernel's audit finds nothing");
        yield();
        expect(file_truncate(amounts->file) == 0, "the file is made longer");
    }
    expect(unmap(FILE_BASE, FILE_PAGES_MAX * PAGE_SIZE) == 0 && file_map(FILE_AGAIN) == 0, "the file can move");
    verify_zero(FILE_AGAIN, amounts->steady);
    leave("what was cut off reads as zeros");
}

/* the first process */

static void fork_workers(u32 pages, u32 touches, u32 seed)
{
    for (u32 pattern = 0; pattern < PATTERNS; pattern++) {
        u32 pid = fork();
        expect(pid != SYS_ERROR, "a worker is forked");
        if (pid == 0)
            worker(pattern, pages, touches, seed);
    }
}

static void fork_file_users(u32 rounds, u32 seed)
{
    for (u32 which = 0; which <= FILE_WRITERS; which++) {
        u32 pid = fork();
        expect(pid != SYS_ERROR, "a user of the file is forked");
        if (pid != 0)
            continue;
        if (which < FILE_WRITERS)
            file_writer(which, rounds, seed);
        else
            file_cutter(rounds, seed);
    }
}

static u32 wait_for_all(void)
{
    u32 status, failed = 0, ended = 0;
    while (wait(&status) != SYS_ERROR) {
        failed += status != 0;
        ended++;
    }
    expect(failed == 0, "every process ends well");
    return ended;
}

u32 program_main(u32 seed, u32 scale, u32 flags)
{
    work = flags >> FLAGS_WORK_SHIFT;
    amounts = flags & FLAG_FAST ? &fast_amounts : &slow_amounts;
    u32 pages = memory() * amounts->memory / 100 / PATTERNS, rounds = 2 + scale / 200;
    u32 touches = pages * scale / 100 * amounts->touches / 100;
    expect(map(COMMON, amounts->common * PAGE_SIZE) == 0, "there is memory for all");
    for (u32 page = 0; page < amounts->common; page++)
        stamp(COMMON, page, seed, 0);
    expect(file_truncate(amounts->file) == 0, "the file has its pages");
    stopwatch_start("reclaim", "touches", PATTERNS * (2 * pages + touches));
    fork_workers(pages, touches, seed);
    fork_file_users(rounds, seed);
    u32 ended = wait_for_all();
    stopwatch_stop("reclaim");
    for (u32 page = 0; page < amounts->common; page++)
        verify(COMMON, page, seed, 0);
    expect(wrong == 0, "the parent's pages are as they were");
    expect(witness("reclaim.common", COMMON, WITNESSED) == 0, "pages are published");
    expect(file_sync() == 0, "the file is on its disk");
    say("pager: reclaim processes=", ended, " wrong=", wrong, NULL);
    tally_report();
    return 0;
}
