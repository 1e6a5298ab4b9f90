/* Reclaim.
 *
 * Story: frames are never made free in the middle of something. Whoever is going to allocate asks for room first (make_room),
 * where it may sleep; the allocation itself takes what there is. Below the low mark kswapd is woken, and works until the high
 * mark; below the lowest the task reclaims for itself.
 *
 *   free   0 ....... min ................ low ................ high
 *            reserve      direct reclaim       kswapd is woken      kswapd sleeps
 *
 * One batch: 1. balance: used pages that have not been used any more go to the inactive list. 2. pick: from the old end of that
 * list; one that was used goes to the active list. 3. unmap, all with one flush of the other CPUs. 4. write what is dirty, in order of slots. 5. free what nobody has
 * come to want meanwhile.
 *
 * Holds: INV-G-RECLAIM-1: a page is freed only unmapped, flushed, clean and in nobody's hands. INV-G-RECLAIM-2: no I/O is
 * started, and no file-system lock taken, against the scope of the task that reclaims.
 * Locks: none held; sleeps for I/O. */
#include "reclaim.h"

#include "balloon.h"
#include "check.h"
#include "file.h"
#include "frames.h"
#include "irq.h"
#include "lru.h"
#include "rmap.h"
#include "swap.h"
#include "task.h"
#include "tlb.h"

#define BATCH SWAP_OUT_MAX
/* Batches without a page made free before a task gives up. */
#define FRUITLESS_MAX 24

struct reclaim_counts reclaim_counts;
static u32 mark_min, mark_low, mark_high;
static bool started, kswapd_sleeps;

u32 reclaim_min(void) { return mark_min; }

u32 reclaim_scope(u32 without)
{
    u32 before = current->gfp_denied;
    current->gfp_denied |= without;
    return before;
}

void reclaim_restore(u32 before) { current->gfp_denied = before; }

static bool may(u32 right) { return !(current->gfp_denied & right); }

/* 1. */
static void balance(void)
{
    u32 steps = BATCH;
    while (lru_count[LRU_ACTIVE] > lru_count[LRU_INACTIVE] && steps--) {
        u32 frame = lru_isolate(LRU_ACTIVE);
        lru_add(frame, rmap_take_referenced(frame) ? LRU_ACTIVE : LRU_INACTIVE);
        swap_put(frame);
    }
}

static void put_back(u32 frame, enum lru list)
{
    lru_add(frame, list);
    swap_put(frame);
}

/* Nothing keeps the page from being written, if it has to be. An anonymous page gets its slot here. */
static bool can_go(u32 frame)
{
    const struct frame *page = frame_of(frame);
    if (page->flags & (FRAME_READING | FRAME_WRITING | FRAME_FAILED))
        return false;
    if (page->flags & FRAME_FILE)
        return may(GFP_FS) && may(GFP_IO) && file_may_write_out();
    return may(GFP_IO) && swap_slot_for(frame) != SLOT_NONE;
}

/* 2. and 3. Pages off the list and unmapped, those of the file apart. */
static void pick(u32 *pages, u32 *count, u32 *file_pages, u32 *file_count)
{
    *count = *file_count = 0;
    for (u32 steps = 4 * BATCH; steps && *count + *file_count < BATCH; steps--) {
        u32 frame = lru_isolate(LRU_INACTIVE);
        if (frame == FRAME_NONE)
            break;
        reclaim_counts.scanned++;
        if (rmap_take_referenced(frame)) {
            reclaim_counts.referenced++;
            put_back(frame, LRU_ACTIVE);
        } else if (!can_go(frame)) {
            reclaim_counts.scope_skipped++;
            put_back(frame, LRU_INACTIVE);
        } else {
            struct frame *page = frame_of(frame);
            if (rmap_begin_unmap(frame))
                page->flags |= FRAME_DIRTY;
            if (page->flags & FRAME_FILE)
                file_pages[(*file_count)++] = frame;
            else
                pages[(*count)++] = frame;
        }
    }
    tlb_finish();
}

static void sort_by_slot(u32 *frames, u32 count)
{
    for (u32 i = 1; i < count; i++) {
        u32 frame = frames[i], at = i;
        for (; at > 0 && swap_slot_of(frames[at - 1]) > swap_slot_of(frame); at--)
            frames[at] = frames[at - 1];
        frames[at] = frame;
    }
}

/* Moves the dirty ones to the front, marked; returns how many they are. */
static u32 dirty_first(u32 *frames, u32 count)
{
    u32 dirty = 0;
    for (u32 i = 0; i < count; i++) {
        u32 frame = frames[i];
        if (!(frame_of(frame)->flags & FRAME_DIRTY))
            continue;
        frame_of(frame)->flags |= FRAME_WRITING;
        frames[i] = frames[dirty];
        frames[dirty++] = frame;
    }
    return dirty;
}

/* 5. Frees the page if only the cache has it beside this reference, and it is clean. */
static u32 free_or_put_back(u32 frame)
{
    struct frame *page = frame_of(frame);
    u32 cached = in_swap_cache(frame) || file_has(frame);
    if (page->refs == 1 + cached && !(page->flags & FRAME_DIRTY)) {
        if (file_has(frame))
            file_forget(frame);
        if (in_swap_cache(frame))
            swap_forget(frame);
        frame_put(frame);
        return 1;
    }
    put_back(frame, LRU_INACTIVE);
    return 0;
}

static u32 free_all(const u32 *frames, u32 count)
{
    u32 freed = 0;
    for (u32 i = 0; i < count; i++)
        freed += free_or_put_back(frames[i]);
    reclaim_counts.stolen += freed;
    return freed;
}

/* One batch; returns how many frames came free. */
static u32 shrink(void)
{
    u32 pages[BATCH], count, file_pages[BATCH], file_count;
    balance();
    pick(pages, &count, file_pages, &file_count);
    u32 dirty = dirty_first(pages, count);
    u32 freed = free_all(pages + dirty, count - dirty);
    reclaim_counts.stolen_clean += freed;
    sort_by_slot(pages, dirty);
    swap_out(pages, dirty);
    freed += free_all(pages, dirty);
    file_write_out(file_pages, file_count);
    return freed + free_all(file_pages, file_count);
}

static void kswapd(u32 argument)
{
    (void)argument;
    current->makes_room = true;
    while (1) {
        u32 fruitless = 0;
        while (frames_free() < mark_high && fruitless < FRUITLESS_MAX) {
            fruitless = shrink() ? 0 : fruitless + 1;
            if (fruitless)
                task_sleep(1);
        }
        irq_off();
        kswapd_sleeps = true;
        task_wait_on(&kswapd_sleeps);
        irq_on();
    }
}

static void wake_kswapd(void)
{
    if (!kswapd_sleeps)
        return;
    kswapd_sleeps = false;
    reclaim_counts.background++;
    task_wake(&kswapd_sleeps);
}

void reclaim_settle(void)
{
    while (started && !kswapd_sleeps)
        task_sleep(1);
}

bool reclaim_start(void)
{
    mark_min = max_u32(16, frames_total() / 64);
    mark_low = 2 * mark_min;
    mark_high = 3 * mark_min;
    started = task_start_thread("kswapd", kswapd, 0) != NULL;
    return started;
}

bool make_room(u32 frames)
{
    if (!started || current->makes_room)
        return true;
    if (frames_free() < mark_low)
        wake_kswapd();
    current->makes_room = true;
    for (u32 fruitless = 0; frames_free() < mark_min + frames && fruitless < FRUITLESS_MAX;) {
        reclaim_counts.direct++;
        fruitless = shrink() ? 0 : fruitless + 1;
        if (fruitless)
            task_sleep(1);
    }
    current->makes_room = false;
    /* Better the host's wish unheeded than a process killed; but the balloon itself does not take from itself. */
    while (frames_free() < mark_min / 2 + frames && balloon_give_back(frames))
        barrier();
    bool room = frames_free() >= mark_min / 2 + frames;
    reclaim_counts.out_of_memory += !room;
    return room;
}
