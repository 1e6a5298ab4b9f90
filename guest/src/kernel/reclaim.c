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
 * list, one process's after the other's; one that was used, or cannot go now, goes to the active list. 3. unmap, all with one flush
 * of the other CPUs. 4. write what is dirty, in order of slots. 5. free what nobody has come to want meanwhile. LOCK_PAGES is held for
 * many pages at once, but in the middle of 3, where each mapping takes it: where two CPUs reclaim they wait for this lock, and for the
 * lines of the caches that go with it from one to the other.
 *
 * Anonymous pages that have no slot in swap, while there is none, are on a list of their own until one comes free.
 *
 * When to give up: not while a disk has a request, since what it has may come free; else after looking at each page of both
 * lists a few times, and once more after others have run; nor while another CPU has some in hand. Then the balloon gives back;
 * then the largest process is killed.
 *
 * Holds: INV-G-RECLAIM-1: a page is freed only unmapped, flushed, clean and in nobody's hands. INV-G-RECLAIM-2: no file-system
 * lock is taken against the scope of the task that reclaims.
 * Locks: none held over a batch, which is only this task's: its pages are on no list. A page of the file is looked at, unmapped and
 * freed with the kernel's lock. Sleeps for I/O. */
#include "reclaim.h"

#include "balloon.h"
#include "blk.h"
#include "check.h"
#include "file.h"
#include "frames.h"
#include "locks.h"
#include "lru.h"
#include "oom.h"
#include "paging.h"
#include "rmap.h"
#include "rule.h"
#include "swap.h"
#include "task.h"
#include "tlb.h"

#define BATCH SWAP_OUT_MAX
/* Looks at each page before reclaim gives up: it may be moved between the lists, and have to be found unused. */
#define LOOKS 3
/* So many pages are not taken: when all others are stuck, they are those that processes have just come to need, and would take from
 * each other for ever. */
#define KEPT 16

struct reclaim_counts reclaim_counts;
static u32 mark_min READ_MOSTLY, mark_low READ_MOSTLY, mark_high READ_MOSTLY;
static u32 in_hand; /* pages off a list that are being looked at or unmapped; LOCK_PAGES */
static const struct task *started;
static volatile bool kswapd_sleeps;
static const u32 frames_wanted; /* stands for them, where somebody waits for others to make some free */

u32 reclaim_min(void) { return mark_min; }

u32 reclaim_scope(u32 without)
{
    u32 before = current->gfp_denied;
    current->gfp_denied |= without;
    return before;
}

void reclaim_restore(u32 before) { current->gfp_denied = before; }

static bool may(u32 right) { return !(current->gfp_denied & right); }

/* Pages off the inactive list, unmapped, by what is to be done with them. */
struct batch {
    u32 looked; /* at pages of either list */
    u32 clean_count, anon_count, file_count;
    bool clean_of_file; /* one of the clean is the file's */
    u32 clean[BATCH], anon[BATCH], file[BATCH];
};

static void put_back_held(u32 frame, enum lru list)
{
    lru_add_held(frame, list);
    swap_put_held(frame);
}

/* In the order of their keys; those of one key stay in the order they are in. */
static inline __attribute__((always_inline)) void sort(u32 *frames, u32 count, u32 (*key)(u32 frame))
{
    for (u32 i = 1; i < count; i++) {
        u32 frame = frames[i], at = i, own = key(frame);
        for (; at > 0 && key(frames[at - 1]) > own; at--)
            frames[at] = frames[at - 1];
        frames[at] = frame;
    }
}

/* Pages are sorted by it since two CPUs use pages of two processes in turn, but each process wants back what it used together; those of
 * the file come first. It is a guess, as for rmap.c. */
static u32 owner(u32 frame) { return frame_of(frame)->flags & FRAME_FILE ? 0 : frame_of(frame)->space | 1; }

/* Pages off the old end of a list: how many. */
static u32 isolate(enum lru list, u32 *frames, u32 most)
{
    u32 count = 0, frame;
    pages_take();
    while (count < most && (frame = lru_isolate_held(list)) != FRAME_NONE)
        frames[count++] = frame;
    in_hand += count;
    pages_give();
    sort(frames, count, owner);
    return count;
}

/* No list. */
#define LRU_NONE LRU_LISTS

/* The list of a page that has to stay whether it was used or not. */
static enum lru aside(u32 frame)
{
    const struct frame *page = frame_of(frame);
    if (frame_is(frame, FRAME_READING | FRAME_WRITING | FRAME_FAILED)) {
        reclaim_counts.busy++;
        return LRU_ACTIVE;
    }
    if (!(page->flags & FRAME_ANON) || in_swap_cache(frame) || !swap_is_full())
        return LRU_NONE;
    reclaim_counts.no_slot++;
    return LRU_STUCK;
}

static enum write_order write_order READ_MOSTLY;
void reclaim_choose_order(enum write_order order) { write_order = order; }

/* A page that is unmapped, but may still be in a TLB; LOCK_PAGES is held. */
static void add_held(struct batch *batch, u32 frame, bool written_to)
{
    bool of_file = frame_of(frame)->flags & FRAME_FILE;
    if (!written_to && !frame_is(frame, FRAME_DIRTY)) {
        batch->clean[batch->clean_count++] = frame;
        batch->clean_of_file |= of_file;
    } else if (of_file) {
        frame_mark_held(frame, FRAME_DIRTY, 0);
        batch->file[batch->file_count++] = frame;
    } else {
        frame_mark_held(frame, FRAME_DIRTY | FRAME_WRITING, 0);
        batch->anon[batch->anon_count++] = frame;
    }
}

/* 3. Whoever calls has the other CPUs flush after, where nothing is written yet. */
static void begin_unmap(struct batch *batch, const u32 *frames, u32 count)
{
    pte_t bits[BATCH];
    u32 begun = batch->anon_count;
    rmap_begin_unmap(frames, count, bits);
    pages_take();
    for (u32 i = 0; i < count; i++)
        add_held(batch, frames[i], bits[i] & PTE_D);
    in_hand -= count;
    pages_give();
    for (; write_order == WRITE_AT_SCAN && begun < batch->anon_count; begun++) {
        tlb_finish();
        swap_out(&batch->anon[begun], 1);
    }
}

/* Where a page goes that need not go aside; LOCK_PAGES is held, and for one of the file the kernel. */
typedef enum lru (*decide_t)(u32 frame, pte_t used);

/* Pages of the file alone, with the kernel, or none. Those that go to no list are unmapped. A is taken from all: when a slot comes free
 * for one that is stuck, it is to be known whether it was used since, or the page that has just come in would be the only one that
 * looks unused, and go again. */
static void look_at_some(const u32 *frames, u32 count, decide_t decide, struct batch *batch)
{
    pte_t used[BATCH];
    u32 going[BATCH], gone = 0;
    rmap_take_used(frames, count, used);
    pages_take();
    for (u32 i = 0; i < count; i++) {
        enum lru list = aside(frames[i]);
        if (list == LRU_NONE)
            list = decide(frames[i], used[i]);
        if (list == LRU_NONE)
            going[gone++] = frames[i];
        else
            put_back_held(frames[i], list);
    }
    in_hand -= count - gone;
    pages_give();
    if (gone)
        begin_unmap(batch, going, gone);
}

/* At pages off a list, those of the file first. */
static void look_at(const u32 *frames, u32 count, decide_t decide, struct batch *batch)
{
    u32 of_file = 0;
    while (of_file < count && frame_of(frames[of_file])->flags & FRAME_FILE)
        of_file++;
    if (of_file) {
        kernel_take();
        look_at_some(frames, of_file, decide, batch);
        kernel_give_back();
    }
    if (of_file < count)
        look_at_some(frames + of_file, count - of_file, decide, batch);
    batch->looked += count;
}

/* Where slots have come free, pages that wait for one come back; most of them to no avail, but then few slots are free. */
static void unstick(void)
{
    pages_take();
    for (u32 steps = BATCH / 4, frame; steps && !swap_is_full() && (frame = lru_isolate_held(LRU_STUCK)) != FRAME_NONE; steps--)
        put_back_held(frame, LRU_INACTIVE);
    pages_give();
}

static enum lru keep_if_used(u32 frame, pte_t used)
{
    (void)frame;
    return used & PTE_A ? LRU_ACTIVE : LRU_INACTIVE;
}

/* Pages that the active list has beyond its half of both. */
static u32 surplus(void)
{
    u32 active = lru_count[LRU_ACTIVE], inactive = lru_count[LRU_INACTIVE];
    return active > inactive ? (active - inactive + 1) / 2 : 0;
}

/* 1. */
static void balance(struct batch *batch)
{
    u32 frames[BATCH], steps = BATCH, count;
    unstick();
    for (; steps && (count = isolate(LRU_ACTIVE, frames, min_u32(steps, surplus()))); steps -= count)
        look_at(frames, count, keep_if_used, batch);
}

/* The file's pages need the lock of the file system only for a block, and a block only when they are written. */
static bool file_page_can_go(const struct frame *page, bool dirty)
{
    if (!dirty)
        return true;
    bool allowed = may(GFP_FS) || file_has_block(page->index);
    reclaim_counts.denied += !allowed;
    return allowed && file_may_write_out();
}

/* Nothing keeps the page from being written, if it has to be. An anonymous page gets its slot here. */
static bool can_go(u32 frame, bool mapped_dirty)
{
    const struct frame *page = frame_of(frame);
    if (page->flags & FRAME_FILE)
        return file_page_can_go(page, mapped_dirty || page->flags & FRAME_DIRTY);
    return swap_slot_for_held(frame) != SLOT_NONE;
}

static enum lru unmap_if_unused(u32 frame, pte_t used)
{
    if (used & PTE_A) {
        reclaim_counts.referenced++;
        return LRU_ACTIVE;
    }
    return can_go(frame, used & PTE_D) ? LRU_NONE : LRU_ACTIVE;
}

static u32 room_in(const struct batch *batch) { return BATCH - batch->clean_count - batch->anon_count - batch->file_count; }

/* 2. */
static void pick(struct batch *batch)
{
    u32 frames[BATCH], steps = 4 * BATCH, wanted;
    while ((wanted = min_u32(steps, room_in(batch)))) {
        u32 count = isolate(LRU_INACTIVE, frames, wanted);
        look_at(frames, count, unmap_if_unused, batch);
        steps -= count;
        reclaim_counts.scanned += count;
        if (count < wanted)
            break;
    }
    tlb_finish();
}

static u32 rank(u32 frame) { return write_order == WRITE_BY_FRAMES ? frame : swap_slot_of(frame); }

/* 5. Frees the page if only the cache has it beside this reference, and it is clean. */
static bool free_or_put_back_held(u32 frame)
{
    struct frame *page = frame_of(frame);
    u32 cached = in_swap_cache(frame) || file_has(frame);
    bool free = page->refs == 1 + cached && !(page->flags & FRAME_DIRTY);
    if (!free) {
        put_back_held(frame, LRU_INACTIVE);
        return false;
    }
    if (file_has(frame))
        file_forget_held(frame);
    if (in_swap_cache(frame))
        swap_forget_held(frame);
    frame_put_held(frame);
    reclaim_counts.stolen++;
    return true;
}

/* Where one is the file's the caller has the kernel. */
static u32 free_all(const u32 *frames, u32 count)
{
    u32 freed = 0;
    pages_take();
    for (u32 i = 0; i < count; i++)
        freed += free_or_put_back_held(frames[i]);
    pages_give();
    return freed;
}

static u32 free_clean(const struct batch *batch)
{
    if (batch->clean_of_file)
        kernel_take();
    u32 freed = free_all(batch->clean, batch->clean_count);
    if (batch->clean_of_file)
        kernel_give_back();
    reclaim_counts.stolen_clean += freed;
    return freed;
}

static u32 write_and_free_anon(struct batch *batch)
{
    sort(batch->anon, batch->anon_count, rank);
    if (write_order != WRITE_AT_SCAN)
        swap_out(batch->anon, batch->anon_count);
    return free_all(batch->anon, batch->anon_count);
}

/* A page that was clean when it was looked at may have been written to before it was unmapped: what the scope forbids is not done
 * then, and the page goes back dirty. */
static u32 write_and_free_file(const struct batch *batch)
{
    if (batch->file_count == 0)
        return 0;
    kernel_take();
    for (u32 i = 0; i < batch->file_count; i++)
        if (file_page_can_go(frame_of(batch->file[i]), true))
            file_write_out(&batch->file[i], 1);
    u32 freed = free_all(batch->file, batch->file_count);
    kernel_give_back();
    return freed;
}

/* One batch; returns how many frames came free. */
static u32 shrink(u32 *looked)
{
    struct batch batch;
    batch.looked = batch.clean_count = batch.anon_count = batch.file_count = 0;
    batch.clean_of_file = false;
    current->has_batch = true;
    balance(&batch);
    pick(&batch);
    *looked += batch.looked;
    u32 freed = free_clean(&batch);
    freed += write_and_free_anon(&batch);
    freed += write_and_free_file(&batch);
    current->has_batch = false;
    if (freed && scene_looks_on)
        task_wake(&frames_wanted);
    return freed;
}

static u32 candidates(void)
{
    return lru_count[LRU_ACTIVE] + lru_count[LRU_INACTIVE] + (swap_is_full() ? 0 : lru_count[LRU_STUCK]);
}

/* Batches until `goal` frames are free, or there is no way; with `enough` of them one look at each page finds that there is none.
 * Returns how many batches. */
static u32 reclaim_to(u32 goal, u32 enough)
{
    u32 batches = 0, looked = 0, pages;
    bool others_ran = false;
    for (; frames_free() < goal; batches++) {
        pages = candidates();
        bool few = pages <= KEPT, content = frames_free() >= enough;
        if (few && content)
            break;
        if ((!few && shrink(&looked)) || blk_wait_any()) {
            looked = 0;
            others_ran = false;
        } else if (content && looked >= pages) {
            break;
        } else if (few || looked >= LOOKS * pages) {
            if (others_ran && !in_hand)
                break;
            looked = 0;
            others_ran = true;
            schedule();
        }
    }
    return batches;
}

static void kswapd(u32 argument)
{
    (void)argument;
    current->makes_room = true;
    kernel_give_back();
    while (1) {
        place_pass(PLACE_KSWAPD);
        reclaim_to(mark_high, 0);
        kswapd_sleeps = true;
        task_wait_while(kswapd_sleeps, &kswapd_sleeps);
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

u32 reclaim_to_spare(void)
{
    bool works = started && !kswapd_sleeps;
    return works || frames_free() < mark_high ? 0 : frames_free() - mark_high;
}

void reclaim_init(void)
{
    mark_min = max_u32(16, frames_total() / 64);
    mark_low = 2 * mark_min;
    mark_high = 3 * mark_min;
}

bool reclaim_start(void)
{
    started = task_start_thread("kswapd", kswapd, 0);
    return started;
}

const struct task *reclaim_thread(void) { return started; }

/* The last half of the reserve is reclaim's own. */
static u32 enough_for(u32 frames) { return mark_min / 2 + frames; }

static void reclaim_for_current(u32 frames)
{
    current->makes_room = true;
    reclaim_counts.direct += reclaim_to(mark_min + frames, enough_for(frames));
    current->makes_room = false;
}

bool room_is_there(u32 frames) { return frames_free() >= mark_min + frames || current->makes_room; }

void reclaim_await(u32 frames)
{
    kernel_take();
    if (frames_free() < frames)
        wake_kswapd();
    current->waits_for = "a free frame";
    task_wait_while(frames_free() < frames, &frames_wanted);
    current->waits_for = NULL;
    kernel_give_back();
}

bool try_room(u32 frames)
{
    if (frames_free() >= mark_low + frames || current->makes_room)
        return true;
    if (frames_free() < mark_low)
        wake_kswapd();
    if (started && frames_free() < mark_min + frames)
        reclaim_for_current(frames);
    /* Better the host's wish unheeded than a process killed; but the balloon itself does not take from itself. */
    while (frames_free() < enough_for(frames) && balloon_give_back(frames))
        barrier();
    return frames_free() >= enough_for(frames);
}

bool make_room(u32 frames)
{
    while (!try_room(frames)) {
        kernel_take();
        bool killed = oom_kill_other();
        kernel_give_back();
        if (!killed)
            return false;
    }
    return true;
}
