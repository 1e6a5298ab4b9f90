/* Workload `report`: memory that is free again, and that the host is told so of.
 *
 *   pages that were written to are freed; the balloon's thread reports them; taken again they may have lost what was in them, and
 *   hold what is written to them from then on. */
#include "apic.h"
#include "balloon.h"
#include "boot.h"
#include "check.h"
#include "console.h"
#include "frames.h"
#include "task.h"
#include "window.h"
#include "work.h"

#define PAGES 512
/* How long the host has, in seconds. */
#define PATIENCE 20

static u32 frames[PAGES];

static u32 mark(u32 page, u32 version) { return (page + 1) * 0x9e3779b9u ^ boot.options.seed ^ version; }

/* Takes and writes them; how many. */
static u32 fill(u32 version)
{
    u32 count = 0;
    for (; count < PAGES && (frames[count] = frame_alloc(ZONE_HIGH)) != FRAME_NONE; count++) {
        u32 *words = kmap_local(frames[count], "report, fill");
        words[count] = mark(count, version);
        kunmap_local(words);
    }
    return count;
}

static u32 right(u32 version)
{
    u32 count = 0;
    for (u32 page = 0; page < PAGES; page++) {
        const u32 *words = kmap_local(frames[page], "report, look");
        count += words[page] == mark(page, version);
        kunmap_local(words);
    }
    return count;
}

static void put_all(void)
{
    for (u32 page = 0; page < PAGES; page++)
        frame_put(frames[page]);
}

void work_report(void)
{
    check(fill(0) == PAGES, "there is memory for the pages");
    if (tally.errors)
        return;
    check(right(0) == PAGES, "they hold what was written");
    u32 before = balloon_counts.reported, end = ticks + PATIENCE * boot.options.hz;
    put_all();
    while (balloon_counts.reported - before < PAGES && (int)(ticks - end) < 0)
        task_sleep(1);
    check(balloon_counts.reported - before >= PAGES, "the host is told of them");
    /* For whoever looks from outside. */
    task_sleep(boot.options.hz / 4);
    check(fill(1) == PAGES && right(1) == PAGES, "they can be had again");
    put_all();
    printk("pager: report pages=%u\n", PAGES);
}
