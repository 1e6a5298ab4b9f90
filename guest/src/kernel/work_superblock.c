/* Workload `superblock`: reclaim that comes to want a lock which its caller has, as discussed in January 1999 ("arca-vm-8").
 *
 * A file's pages are dirty, by a mapping, and have no block yet: to write one out takes the superblock's lock. Memory is short. Then
 * somebody allocates with a lock in hand.
 *
 *   direct     the writer has the superblock's lock, and its own reclaim wants it
 *   kswapd     the writer has it and waits for kswapd's frame, and kswapd waits for the lock
 *   inode      a large write to a file that is mapped as well; page-out wants the inode's lock
 *   truncate   the file is cut off while one of its pages is on its way out
 *   recursive  the lock may be taken again by who has it: what it protects is then seen half changed
 *   clustering what went to swap in order of slots, against an order of frames, and page by page
 *   cures      what each cure leaves unreclaimed and costs, over the same work */
#include "audit.h"
#include "blk.h"
#include "check.h"
#include "file.h"
#include "frames.h"
#include "reclaim.h"
#include "scene.h"
#include "scene_memory.h"
#include "swap.h"
#include "work.h"

/* Pages of the file: mapped and dirty ones, so many that each of two who reclaim finds more than it would leave alone, whatever the other
 * has in hand; then those that the writer wants. */
#define DIRTY (3 * SWAP_OUT_MAX)
#define WANTED 6
#define PAGES (DIRTY + WANTED)

static struct space mapper;
static u32 value_of(u32 index) { return (index + 1) * 0x9e3779b9u; }

static void mount(void)
{
    struct blk *disk = blk_find("file");
    scene_want(disk && file_mount(disk) && file_truncate(PAGES), "there is a file, on the disk that calls itself file");
    scene_want(reclaim_start(), "kswapd starts");
    reclaim_settle();
}

static void map_and_dirty(void)
{
    mount();
    scene_file_space(&mapper);
    for (u32 index = 0; index < DIRTY; index++)
        scene_want(scene_store(&mapper, index, value_of(index)), "a page of the file is stored to");
    scene_saw("%u pages of a shared file dirty by a mapping, without a block on the disk", DIRTY);
}

/* Too little to allocate without reclaim, and enough to go on if it brings nothing. */
static void make_short(void)
{
    scene_leave_free(reclaim_min() / 2);
    scene_saw("%u frames free, of which %u are reclaim's reserve", frames_free(), reclaim_min());
}

static void check_contents(void)
{
    u32 wrong = 0, value;
    scene_give_back();
    for (u32 index = 0; index < DIRTY; index++)
        wrong += !scene_load(&mapper, index, &value) || value != value_of(index);
    scene_want(wrong == 0, "every page reads what was stored to it");
    scene_want(file_sync() && audit() == 0, "the file is on its disk, and the audit finds nothing");
}

static void reserve(u32 index)
{
    scene_want(file_reserve(index), "a page gets its block");
}

static void direct(void)
{
    map_and_dirty();
    make_short();
    scene_start("writer", reserve, DIRTY);
    scene_join();
    scene_saw("the writer has its block: %u pages were left alone for its sake", reclaim_counts.denied);
    check_contents();
}

static void allocate(u32 frames)
{
    try_room(frames);
}

static void kswapd(void)
{
    map_and_dirty();
    place_close(PLACE_SB_HELD);
    const struct task *writer = scene_start("writer", reserve, DIRTY);
    scene_until(place_count(PLACE_SB_HELD) == 1);
    scene_saw("%s holds the lock, for a block", writer->name);
    scene_leave_free(0);
    const struct task *allocator = scene_start("allocator", allocate, 1);
    scene_until(task_waits_for(allocator, "superblock") && task_waits_for(reclaim_thread(), "superblock"));
    scene_saw("no frame is free; another task's reclaim and kswapd have come to want the lock");
    place_open(PLACE_SB_HELD);
    scene_join();
    reclaim_settle();
    scene_saw("the writer took from the reserve; then both went on, and %u frames are free", frames_free());
    check_contents();
}

static void write_much(u32 first)
{
    scene_want(file_write(first, WANTED, first), "the write goes through");
}

static void inode(void)
{
    map_and_dirty();
    make_short();
    scene_start("writer", write_much, DIRTY);
    scene_join();
    scene_saw("%u pages written, while page-out wrote %u", WANTED, file_counts.pages_written);
    for (u32 index = DIRTY; index < PAGES; index++) {
        u32 value;
        scene_want(file_read(index, &value) && value == DIRTY + index, "what was written is read");
    }
    check_contents();
}

static void page_out(u32 frames)
{
    try_room(frames);
}

static void truncate(u32 pages)
{
    scene_want(file_truncate(pages), "the file is cut off");
}

static void truncation(void)
{
    u32 found = 0, value;
    map_and_dirty();
    place_close(PLACE_KSWAPD);
    place_close(PLACE_PAGE_OUT);
    make_short();
    scene_start("page-out", page_out, 1);
    scene_until(place_count(PLACE_PAGE_OUT) == 1);
    scene_saw("a page is on its way out, and has no block yet");
    const struct task *cutter = scene_start("truncate", truncate, 0);
    scene_until(task_waits_for(cutter, "a page-out") || file_counts.truncations == 2);
    scene_saw(file_counts.truncations == 2 ? "the file is cut off: the page is gone in the middle of its page-out"
                                           : "truncation waits for the page-out");
    place_open(PLACE_PAGE_OUT);
    scene_join();
    place_open(PLACE_KSWAPD);
    scene_give_back();
    reclaim_settle();
    scene_want(file_truncate(PAGES), "the file is made longer again");
    for (u32 index = 0; index < DIRTY; index++) {
        scene_want(file_read(index, &value), "a page can be read");
        if (value && found++ == 0)
            scene_saw("page %u of the new file reads %08x", index, value);
    }
    if (found)
        scene_failed("content", "%u pages that were cut off have come back with what they had", found);
    scene_want(file_sync() && audit() == 0, "the file is on its disk, and the audit finds nothing");
}

static void recursive(void)
{
    u32 wrong = 0, value;
    file_choose_cure(CURE_RECURSIVE);
    map_and_dirty();
    place_close(PLACE_KSWAPD);
    make_short();
    scene_start("writer", reserve, DIRTY);
    scene_join();
    scene_saw("the lock was taken %u times by who had it", file_counts.nested);
    scene_want(file_counts.nested > 0, "the writer's reclaim has taken the lock again");
    scene_want(file_write(DIRTY, 1, 0) && file_sync(), "the page is written");
    scene_give_back();
    for (u32 index = 0; index < DIRTY; index++) {
        scene_want(scene_load(&mapper, index, &value), "a page can be read");
        if (value != value_of(index) && wrong++ == 0)
            scene_saw("page %u reads %08x, and had %08x", index, value, value_of(index));
    }
    if (wrong)
        scene_failed("content", "%u pages lost to another with the same block: it was free for who looked in between", wrong);
    place_open(PLACE_KSWAPD);
    check_contents();
}

/* The same work under each cure: some pages of the file clean, the others dirty, memory short, BLOCKS blocks to be had. kswapd has no
 * turn. */

/* Several blocks one after the other, so that whatever a cure costs is counted often. */
#define BLOCKS 3
#define CLEAN 12

struct cost {
    u32 dirty_left, clean_left, least, scanned, retries, nested;
};

static void reserve_all(u32 first)
{
    for (u32 index = first; index < first + BLOCKS; index++) {
        scene_leave_at_most(reclaim_min() / 2);
        reserve(index);
    }
}

static u32 dirty_pages(void)
{
    u32 count = 0;
    for (u32 index = CLEAN; index < DIRTY; index++)
        count += !file_has_block(index);
    return count;
}

static struct cost cost_of(enum file_cure cure)
{
    u32 value;
    scene_want(file_truncate(CLEAN) && file_truncate(PAGES), "all but what is clean begins anew");
    for (u32 index = 0; index < CLEAN; index++)
        scene_want(file_read(index, &value) && value == index, "a clean page is read");
    for (u32 index = CLEAN; index < DIRTY; index++)
        scene_want(scene_store(&mapper, index, value_of(index)), "a page of the file is stored to");
    make_short();
    file_choose_cure(cure);
    u32 scanned = reclaim_counts.scanned;
    file_counts.retries = file_counts.nested = 0;
    file_counts.least_free = frames_total();
    scene_start("writer", reserve_all, DIRTY);
    scene_join();
    struct cost cost = {dirty_pages(), file_count_cached(0, CLEAN), file_counts.least_free, reclaim_counts.scanned - scanned,
                        file_counts.retries, file_counts.nested};
    file_choose_cure(CURE_NO_IO);
    scene_give_back();
    return cost;
}

static void measure_cure(const char *const texts[], const struct cost *cost)
{
    scene_measured(texts[0], cost->dirty_left, "dirty pages unreclaimed");
    scene_measured(texts[1], cost->clean_left, "clean pages unreclaimed");
    scene_measured(texts[2], cost->least, "frames");
    scene_measured(texts[3], cost->scanned, "pages");
    scene_measured(texts[4], cost->retries, "times");
    scene_measured(texts[5], cost->nested, "times");
}

static void cures(void)
{
#define TEXTS(name) {name "-dirty-left", name "-clean-left", name "-free-at-least", name "-looked-at", name "-dropped", name "-taken-again"}
    static const char *const texts[CURE_COUNT][6] = {
        [CURE_NO_IO] = TEXTS("noio"), [CURE_RESERVE] = TEXTS("memalloc"), [CURE_RECURSIVE] = TEXTS("recursive"),
        [CURE_RETRY] = TEXTS("retry"),
    };
#undef TEXTS
    struct cost costs[CURE_COUNT];
    mount();
    scene_file_space(&mapper);
    scene_want(file_write(0, CLEAN, 0) && file_sync(), "some pages are on the disk");
    place_close(PLACE_KSWAPD);
    for (enum file_cure cure = 0; cure < CURE_COUNT; cure++) {
        costs[cure] = cost_of(cure);
        measure_cure(texts[cure], &costs[cure]);
    }
    const struct cost *noio = &costs[CURE_NO_IO], *reserve = &costs[CURE_RESERVE];
    const struct cost *recursive = &costs[CURE_RECURSIVE], *retry = &costs[CURE_RETRY];
    scene_want(noio->dirty_left == DIRTY - CLEAN && reserve->dirty_left == noio->dirty_left, "neither scope writes under the lock");
    scene_want(noio->clean_left < CLEAN && reserve->clean_left == CLEAN, "NoIo takes what is clean, and MemAlloc nothing");
    scene_want(recursive->dirty_left < noio->dirty_left && retry->dirty_left < noio->dirty_left, "both rejected cures write");
    scene_want(recursive->nested > 0 && retry->retries > 0, "and each costs what it was rejected for");
}

/* clustering: a space's pages, on frames in no order, go to swap in each of three ways, and are all wanted again one after the other.
 * kswapd has no turn. */

#define ANON 64
/* No factor of ANON. */
#define STRIDE 37

static void scatter_frames(void)
{
    u32 frames[ANON];
    for (u32 i = 0; i < ANON; i++)
        scene_want((frames[i] = frame_alloc_high()) != FRAME_NONE, "there is high memory");
    for (u32 i = 0; i < ANON; i++)
        frame_put(frames[i * STRIDE % ANON]);
}

static struct swap_counts out_and_in(enum write_order order)
{
    static struct space space;
    u32 value, wrong = 0;
    struct swap_counts before = swap_counts;
    reclaim_choose_order(order);
    scatter_frames();
    scene_space(&space, ANON);
    for (u32 page = 0; page < ANON; page++)
        scene_want(scene_store(&space, page, value_of(page)), "a page is there");
    scene_leave_at_most(reclaim_min() / 2);
    scene_want(try_room(1), "a batch makes room");
    scene_give_back();
    for (u32 page = 0; page < ANON; page++)
        wrong += !scene_load(&space, page, &value) || value != value_of(page);
    scene_want(wrong == 0 && swap_counts.lost == before.lost, "every page comes back as it went");
    space_destroy(&space);
    reclaim_choose_order(WRITE_BY_SLOTS);
    return (struct swap_counts){.writes = swap_counts.writes - before.writes,
                                .pages_written = swap_counts.pages_written - before.pages_written,
                                .reads = swap_counts.reads - before.reads,
                                .pages_read = swap_counts.pages_read - before.pages_read};
}

static void clustering(void)
{
    static const struct {
        const char *writes, *pages, *reads;
    } texts[WRITE_ORDERS] = {
#define TEXTS(name) {name "-writes", name "-pages-written", name "-refault-reads"}
        [WRITE_BY_SLOTS] = TEXTS("by-slots"), [WRITE_BY_FRAMES] = TEXTS("by-frames"), [WRITE_AT_SCAN] = TEXTS("at-scan"),
#undef TEXTS
    };
    struct swap_counts counts[WRITE_ORDERS];
    struct blk *swap = blk_find("swap");
    scene_want(swap && swap_on(swap) && reclaim_start(), "kswapd starts, with the disk that calls itself swap");
    reclaim_settle();
    place_close(PLACE_KSWAPD);
    for (enum write_order order = 0; order < WRITE_ORDERS; order++) {
        counts[order] = out_and_in(order);
        scene_measured(texts[order].writes, counts[order].writes, "requests");
        scene_measured(texts[order].pages, counts[order].pages_written, "pages");
        scene_measured(texts[order].reads, counts[order].reads, "requests");
    }
    const struct swap_counts *slots = &counts[WRITE_BY_SLOTS];
    for (enum write_order order = WRITE_BY_FRAMES; order < WRITE_ORDERS; order++)
        scene_want(counts[order].pages_written == slots->pages_written && counts[order].writes >= 4 * slots->writes,
                   "the same pages take many times the writes");
}

void work_superblock(void)
{
    scene_begin();
    if (scene_is(CASE_SUPERBLOCK_DIRECT))
        direct();
    if (scene_is(CASE_SUPERBLOCK_KSWAPD))
        kswapd();
    if (scene_is(CASE_SUPERBLOCK_INODE))
        inode();
    if (scene_is(CASE_SUPERBLOCK_TRUNCATE))
        truncation();
    if (scene_is(CASE_SUPERBLOCK_RECURSIVE))
        recursive();
    if (scene_is(CASE_SUPERBLOCK_CURES))
        cures();
    if (scene_is(CASE_SUPERBLOCK_CLUSTERING))
        clustering();
    scene_passed();
}
