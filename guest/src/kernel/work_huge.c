/* Workload `huge`: a large-page arena, touched at random.
 *
 *   fill     each page gets a count of 0, and a word that goes with it
 *   touch    a page at random: its word must go with its count; both are stored anew, with the count one higher
 *   verify   all words go with their counts, which come to as many touches as there were
 *
 * Story: 64 MiB, or as much as there is, in large pages, which a TLB can hold where it could not hold as many small ones. Physical
 * memory behind it is contiguous, so that whoever runs this machine may map it large as well.
 * Holds: nothing but this file stores to the arena. It is the kernel's for good. */
#include "boot.h"
#include "check.h"
#include "console.h"
#include "frames.h"
#include "kpt.h"
#include "pace.h"
#include "stopwatch.h"
#include "work.h"

#define ARENA_BYTES_MAX (64 * MIB)
#define TOUCHES_PER_PERCENT_FAST 40000
#define TOUCHES_PER_PERCENT_SLOW 400
/* A slow CPU fills and verifies a part of it. */
#define SLOW_STEP 16

struct cell {
    u32 count, word;
};

static u32 pages;

/* Each page's on a line of its own, so that a cache has use for all of its sets. */
static volatile struct cell *cell_of(u32 page)
{
    return (volatile struct cell *)(ARENA_BASE + (page << PAGE_SHIFT) + page % 64 * 64);
}

static u32 word_of(u32 page, u32 count) { return ((page + 1) * 0x9e3779b9u ^ boot.options.seed) + count * 0x85ebca6bu; }

static void fill(u32 step)
{
    for (u32 page = 0; page < pages; page += step) {
        cell_of(page)->count = 0;
        cell_of(page)->word = word_of(page, 0);
    }
}

/* How many cells were wrong. */
static u32 touch(u32 touches, u32 step)
{
    u32 wrong = 0, x = boot.options.seed | 1;
    for (u32 i = 0; i < touches; i++) {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        u32 page = x % pages / step * step, count = cell_of(page)->count;
        wrong += cell_of(page)->word != word_of(page, count);
        cell_of(page)->count = count + 1;
        cell_of(page)->word = word_of(page, count + 1);
    }
    return wrong;
}

void work_huge(void)
{
    u32 size = arena_map(ARENA_BYTES_MAX), step = pace_is_fast() ? 1 : SLOW_STEP;
    pages = size >> PAGE_SHIFT;
    check(pages > 0, "there is contiguous high memory for large pages");
    if (!pages)
        return;
    u32 touches = boot.options.scale * (step == 1 ? TOUCHES_PER_PERCENT_FAST : TOUCHES_PER_PERCENT_SLOW);
    fill(step);
    stopwatch_start("huge", "touches", touches);
    u32 wrong = touch(touches, step), counted = 0;
    stopwatch_stop("huge");
    for (u32 page = 0; page < pages; page += step) {
        counted += cell_of(page)->count;
        wrong += cell_of(page)->word != word_of(page, cell_of(page)->count);
    }
    check(wrong == 0, "a page holds what was stored last");
    check(counted == touches, "no store was lost");
    printk("pager: huge mib=%u large-pages=%u wrong=%u lost=%u\n", size / MIB, size >> paging.directory_shift, wrong,
           touches - counted);
}
