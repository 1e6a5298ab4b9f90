/* Workload `disk`: a disk by itself, without anything above it.
 *
 *   write    pages with marks of their own, as many as a request takes at a time; flushed
 *   random   pages read one by one, each compared with its mark: timed
 *   discard  half of them discarded, written anew
 *   zeroes   a quarter of them made zeros by the disk; all read in large requests
 *   ro       where there is a disk of that name, which may only be read: its words are 0, 1, 2.. from its beginning to its end,
 *            also after a write to it, which it refuses */
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

/* One word of 16 of each page, from another one on in each. */
static bool read_zeroes(struct blk *disk, u32 first, u32 end)
{
    bool ok = true;
    for (; first < end; first += BLK_PAGES_MAX) {
        ok &= blk_transfer(disk, BLK_READ, first, frames, BLK_PAGES_MAX);
        for (u32 i = 0; i < BLK_PAGES_MAX; i++) {
            const u32 *words = kmap_local(frames[i], "disk, zeroes");
            u32 any = 0;
            for (u32 at = i % 16; at < WORDS; at += 16)
                any |= words[at];
            kunmap_local(words);
            wrong += any != 0;
        }
    }
    return ok;
}

static bool read_counting(struct blk *disk, u32 pages)
{
    bool ok = blk_transfer(disk, BLK_READ, 0, frames, pages);
    for (u32 i = 0; i < pages; i++) {
        const u32 *words = kmap_local(frames[i], "disk, ro");
        u32 differ = 0;
        for (u32 at = 0; at < WORDS; at++)
            differ |= words[at] ^ (i * WORDS + at);
        kunmap_local(words);
        wrong += differ != 0;
    }
    return ok;
}

static void read_only(void)
{
    struct blk *disk = blk_find("ro");
    if (!disk)
        return;
    u32 pages = min_u32(blk_pages(disk), BLK_PAGES_MAX);
    check(blk_read_only(disk), "the disk that calls itself ro says that it is");
    check(read_counting(disk, pages), "it can be read");
    fill(frames[0], 1, 2);
    check(!blk_transfer(disk, BLK_WRITE, 0, frames, 1), "it refuses a write");
    check(!blk_write_zeroes(disk, 0, 1), "it does not write zeroes either");
    check(read_counting(disk, pages), "it can be read after that");
    printk("pager: disk ro pages=%u errors=%u wrong=%u\n", pages, blk_counts(disk)->errors, wrong);
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
    check(blk_write_zeroes(disk, PAGES / 4, PAGES / 4), "the disk makes zeros of pages");
    check(read_zeroes(disk, PAGES / 4, PAGES / 2), "the disk gives zeros");
    check(read_all(disk, 0, PAGES / 4, 0) && read_all(disk, PAGES / 2, PAGES, 1), "the disk gives all other pages back");
    check(!blk_find("nobody"), "no disk has another's name");
    check(wrong == 0, "every page is as it was written");
    printk("pager: disk pages=%u reads=%u wrong=%u\n", PAGES, reads, wrong);
    read_only();
    for (u32 i = 0; i < BLK_PAGES_MAX; i++)
        frame_put(frames[i]);
}
