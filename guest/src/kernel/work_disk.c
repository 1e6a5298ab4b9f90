/* Workload `disk`: a disk by itself, without anything above it.
 *
 *   write    pages with marks of their own, as many as a request takes at a time; flushed
 *   random   pages read one by one, each compared with its mark: timed
 *   discard  half of them discarded, written anew, and all read in large requests */
#include "blk.h"
#include "boot.h"
#include "check.h"
#include "console.h"
#include "frames.h"
#include "stopwatch.h"
#include "window.h"
#include "work.h"

#define PAGES 1024
#define READS_PER_PERCENT 20
#define WORDS (PAGE_SIZE / 4)

static u32 frames[BLK_PAGES_MAX];
static u32 wrong;

static u32 mark(u32 page, u32 version) { return (page + 1) * 0x9e3779b9u ^ boot.options.seed ^ version; }

static void fill(u32 frame, u32 page, u32 version)
{
    u32 *words = kmap_local(frame, "disk, write");
    for (u32 at = page % 16; at < WORDS; at += 64)
        words[at] = mark(page, version) + at;
    kunmap_local(words);
}

static void compare(u32 frame, u32 page, u32 version)
{
    const u32 *words = kmap_local(frame, "disk, read");
    u32 differ = 0;
    for (u32 at = page % 16; at < WORDS; at += 64)
        differ |= words[at] ^ (mark(page, version) + at);
    kunmap_local(words);
    wrong += differ != 0;
}

static bool write_all(struct blk *disk, u32 first, u32 version)
{
    bool ok = true;
    for (; first < PAGES; first += BLK_PAGES_MAX) {
        for (u32 i = 0; i < BLK_PAGES_MAX; i++)
            fill(frames[i], first + i, version);
        ok &= blk_transfer(disk, BLK_WRITE, first, frames, BLK_PAGES_MAX);
    }
    return ok && blk_flush(disk);
}

static bool read_all(struct blk *disk, u32 first, u32 end, u32 version)
{
    bool ok = true;
    for (; first < end; first += BLK_PAGES_MAX) {
        ok &= blk_transfer(disk, BLK_READ, first, frames, BLK_PAGES_MAX);
        for (u32 i = 0; i < BLK_PAGES_MAX; i++)
            compare(frames[i], first + i, version);
    }
    return ok;
}

static bool read_random(struct blk *disk, u32 reads)
{
    bool ok = true;
    u32 state = boot.options.seed * 0x9e3779b9u | 1;
    for (u32 i = 0; i < reads; i++) {
        state = state * 1664525u + 1013904223u; /* Numerical Recipes; the high bits are the better ones */
        u32 page = (state >> 16) % PAGES;
        ok &= blk_transfer(disk, BLK_READ, page, frames, 1);
        compare(frames[0], page, 0);
    }
    return ok;
}

static bool take_frames(void)
{
    for (u32 i = 0; i < BLK_PAGES_MAX; i++)
        if ((frames[i] = frame_alloc(ZONE_HIGH)) == FRAME_NONE)
            return false;
    return true;
}

void work_disk(void)
{
    struct blk *disk = blk_find("swap");
    u32 reads = boot.options.scale * READS_PER_PERCENT;
    check(disk && !blk_read_only(disk) && blk_pages(disk) >= PAGES, "there is a disk that calls itself swap");
    if (tally.errors || !take_frames())
        return;
    check(write_all(disk, 0, 0), "the disk takes pages");
    stopwatch_start("disk.random", "reads", reads);
    check(read_random(disk, reads), "the disk gives them back one by one");
    stopwatch_stop("disk.random");
    check(blk_discard(disk, PAGES / 2, PAGES / 2), "the disk takes a discard");
    check(write_all(disk, PAGES / 2, 1), "what was discarded can be written");
    check(read_all(disk, 0, PAGES / 2, 0) && read_all(disk, PAGES / 2, PAGES, 1), "the disk gives all pages back");
    check(wrong == 0, "every page is as it was written");
    printk("pager: disk pages=%u reads=%u wrong=%u\n", PAGES, reads, wrong);
    for (u32 i = 0; i < BLK_PAGES_MAX; i++)
        frame_put(frames[i]);
}
