/* Workload `series`: kmap pools in series, and page tables through them, as discussed in 2002 ("pte-highmem").
 *
 * The kernel has one pool, and its page tables are reached through the window. With `bug` the tables have slots of the pool, in
 * series of their own (kmap.h), held for as long as a table is open: while a fault waits for memory, too.
 *
 *   order     one has a DEFAULT slot and wants a PAGETABLE one, another has it the other way round
 *   spinlock  a table is mapped, and a slot waited for, with the spin lock of the tables
 *   border    a mapping that was made for one series is found and kept by another
 *   clear     a new table is cleared through DEFAULT, and starts there
 *   walker    faults have all slots and wait for frames; reclaim waits for a slot
 *   spare     NR_CPUS tasks have a slot each and want one more */
#include "boot.h"
#include "check.h"
#include "cpus.h"
#include "frames.h"
#include "kmap.h"
#include "reclaim.h"
#include "scene.h"
#include "scene_memory.h"
#include "swap.h"
#include "work.h"

#define MARK 0x9e3779b9u
#define WALKERS 4
/* Pages of a space; the first few are stored to. */
#define SPACE_PAGES 256
#define STORED 4

static struct space walked[WALKERS];
static const char *const walker_names[WALKERS] = {"walker 1", "walker 2", "walker 3", "walker 4"};

static u32 mark(u32 which, u32 page) { return (which * SPACE_PAGES + page + 1) * MARK; }

static void fault_in(u32 which, u32 page)
{
    scene_want(scene_store(&walked[which], page, mark(which, page)), "the page is there");
}

static void walk(u32 which)
{
    for (u32 page = 0; page < STORED; page++)
        fault_in(which, page);
}

static void make_spaces(u32 count)
{
    for (u32 which = 0; which < count; which++)
        scene_space(&walked[which], SPACE_PAGES);
}

static void check_space(struct space *space, u32 which, u32 pages)
{
    u32 value, wrong = 0;
    for (u32 page = 0; page < pages; page++) {
        bool there = scene_load(space, page, &value);
        if ((!there || value != mark(which, page)) && wrong++ == 0)
            scene_saw("page %u of space %u: %s %08x, and it had %08x", page, which, there ? "reads" : "is lost", value, mark(which, page));
    }
    scene_want(wrong == 0, "every page reads what was stored to it");
}

/* Where tables are in the pool a fault can be held up with its table open; else there is nothing to wait for. */
static const struct task *walkers[WALKERS];

static void hold_up_walkers(u32 first, u32 end)
{
    bool by_pool = !rule_kept(RULE_TABLE_WINDOW);
    if (by_pool)
        place_close(PLACE_TABLE_OPEN);
    for (u32 which = first; which < end; which++)
        walkers[which] = scene_start(walker_names[which], walk, which);
    if (by_pool) {
        scene_until(place_count(PLACE_TABLE_OPEN) == end - first);
        scene_saw("%u faults have their tables open", end - first);
    }
}

/* order */

static u32 page_of_file;

static void read_to_user(u32 which)
{
    u32 *page = kmap(page_of_file);
    fault_in(which, 0);
    page[0]++;
    kunmap(page);
}

static void order(void)
{
    pool_divide(1, 1, 0);
    make_spaces(2);
    page_of_file = frame_alloc(ZONE_HIGH);
    scene_want(page_of_file != FRAME_NONE, "there is a page to read");
    hold_up_walkers(0, 1);
    const struct task *reader = scene_start("reader", read_to_user, 1);
    if (!rule_kept(RULE_TABLE_WINDOW)) {
        scene_until(task_waits_for(reader, "a PAGETABLE slot"));
        scene_saw("the reader has its page mapped, and faults as it copies to the user");
        place_open(PLACE_TABLE_OPEN);
    }
    scene_join();
    scene_saw("a fault that clears a page, and a read that faults, went past each other");
    check_space(&walked[0], 0, STORED);
    check_space(&walked[1], 1, 1);
}

/* spinlock: that of the tables is one on several CPUs alone, so the lock is made one here. */
static void spinlock(void)
{
    if (!smp)
        kernel_become_smp();
    pool_divide(1, 1, 0);
    make_spaces(2);
    hold_up_walkers(0, 1);
    scene_start(walker_names[1], walk, 1);
    scene_join();
    scene_saw("two faults had their tables open under the spin lock, and neither slept");
    check_space(&walked[0], 0, STORED);
    check_space(&walked[1], 1, STORED);
}

/* border: of a fork's two tables the child's has a series of its own, in which nobody is ever to wait. */

static struct space parent, child;

static void fork_into(struct space *space)
{
    scene_want(space_create(space) && space_fork(&parent, space), "the space is copied");
}

static void walk_beyond(u32 which)
{
    fault_in(which, STORED);
}

static void border(void)
{
    pool_divide(2, 4, 1);
    scene_space(&parent, SPACE_PAGES);
    for (u32 page = 0; page < STORED; page++)
        scene_want(scene_store(&parent, page, mark(0, page)), "a page is there");
    fork_into(&walked[0]);
    scene_saw("a fork: the child's table was mapped as the second of two");
    if (!rule_kept(RULE_TABLE_WINDOW))
        place_close(PLACE_TABLE_OPEN);
    scene_start(walker_names[0], walk_beyond, 0);
    if (!rule_kept(RULE_TABLE_WINDOW)) {
        scene_until(place_count(PLACE_TABLE_OPEN) == 1);
        scene_want(pool_series_of(walked[0].upt.recent) == SERIES_PAGETABLE2, "the fault has found the fork's mapping");
        scene_saw("the child faults, finds that mapping and keeps it while it waits for memory");
        scene_measured("PAGETABLE-slots-held", pool_held(SERIES_PAGETABLE), "slots");
        scene_measured("PAGETABLE2-slots-held", pool_held(SERIES_PAGETABLE2), "slots");
    }
    fork_into(&child);
    scene_saw("another fork");
    scene_join();
    check_space(&walked[0], 0, STORED + 1);
    check_space(&child, 0, STORED);
}

/* clear */
static void clear(void)
{
    u32 astray = 0;
    pool_divide(2, 2, 0);
    make_spaces(2);
    hold_up_walkers(0, 2);
    for (u32 which = 0; which < 2 && !rule_kept(RULE_TABLE_WINDOW); which++)
        astray += pool_series_of(walked[which].upt.recent) == SERIES_DEFAULT;
    if (astray) {
        scene_measured("DEFAULT-slots-held", pool_held(SERIES_DEFAULT), "slots");
        scene_measured("PAGETABLE-slots-held", pool_held(SERIES_PAGETABLE), "slots");
        scene_failed("type", "%u open page tables have slots of DEFAULT, where they were cleared", astray);
    }
    scene_join();
    scene_saw("no page table has a slot of the pool");
    scene_want(pool_held(SERIES_DEFAULT) + pool_held(SERIES_PAGETABLE) == 0, "the pool is nobody's");
    for (u32 which = 0; which < 2; which++)
        check_space(&walked[which], which, STORED);
}

/* walker */

/* Several batches: each who reclaims has one in hand, and those that are left are to be enough. */
#define OLD_PAGES 128
static struct space old;

static void walker(void)
{
    struct blk *swap = blk_find("swap");
    scene_want(swap && swap_on(swap) && reclaim_start(), "kswapd starts, with the disk that calls itself swap");
    reclaim_settle();
    pool_divide(1, WALKERS, 0);
    scene_space(&old, SPACE_PAGES);
    for (u32 page = 0; page < OLD_PAGES; page++)
        scene_want(scene_store(&old, page, mark(WALKERS, page)), "a page is there");
    make_spaces(WALKERS);
    scene_leave_free(0);
    scene_saw("no frame is free; %u pages of another process can be reclaimed", OLD_PAGES);
    place_close(PLACE_KSWAPD);
    hold_up_walkers(0, WALKERS);
    place_open(PLACE_TABLE_OPEN);
    if (!rule_kept(RULE_TABLE_WINDOW))
        for (u32 which = 0; which < WALKERS; which++)
            scene_until(task_waits_for(walkers[which], "a free frame"));
    place_open(PLACE_KSWAPD);
    scene_join();
    reclaim_settle();
    scene_saw("every fault had its frame; %u pages went to swap", swap_counts.pages_written);
    scene_give_back();
    for (u32 which = 0; which < WALKERS; which++)
        check_space(&walked[which], which, STORED);
    check_space(&old, WALKERS, OLD_PAGES);
}

/* spare: NR_CPUS is a constant of the kernel's. */

#define HOLDERS CPUS_MAX
static const char *const holder_names[HOLDERS] = {"holder 1", "holder 2", "holder 3", "holder 4",
                                                  "holder 5", "holder 6", "holder 7", "holder 8"};
static u32 frames[2 * HOLDERS];
static volatile u32 have_one;

/* It does not wait while it has both, though others have their turn. */

static void hold_two(u32 which)
{
    void *first = kmap(frames[2 * which]);
    have_one++;
    while (have_one < HOLDERS)
        schedule();
    void *second = kmap(frames[2 * which + 1]);
    schedule();
    kunmap(second);
    kunmap(first);
}

static void spare(void)
{
    u32 slots = HOLDERS + rule_kept(RULE_POOL_SPARE);
    pool_divide(slots, 0, 0);
    for (u32 i = 0; i < 2 * HOLDERS; i++)
        scene_want((frames[i] = frame_alloc(ZONE_HIGH)) != FRAME_NONE, "there is high memory");
    scene_measured("slots", slots, "slots");
    scene_measured("holders", HOLDERS, "tasks");
    for (u32 which = 0; which < HOLDERS; which++)
        scene_start(holder_names[which], hold_two, which);
    scene_join();
    scene_measured("held-at-most", pool_counts.held_max, "slots");
    scene_measured("waits", pool_counts.waits, "times");
    scene_measured("sweeps", pool_counts.sweeps, "times");
    scene_want(pool_counts.held_max == slots, "each had one, and one of them two");
}

void work_series(void)
{
    scene_begin();
    if (scene_is(CASE_SERIES_ORDER))
        order();
    if (scene_is(CASE_SERIES_SPINLOCK))
        spinlock();
    if (scene_is(CASE_SERIES_BORDER))
        border();
    if (scene_is(CASE_SERIES_CLEAR))
        clear();
    if (scene_is(CASE_SERIES_WALKER))
        walker();
    if (scene_is(CASE_SERIES_SPARE))
        spare();
    scene_passed();
}
