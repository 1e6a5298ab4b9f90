/* Swap.
 *
 * Jobs: 1. slots, 2. the cache, 3. in, 4. out.
 *
 * Story: a slot is free if no page-table entry names it and the cache has no page for it. A page gets its slot when reclaim
 * first picks it, next to those that were picked with it, of its own process first, so that what was used together is written together
 * and read ahead together. While a page is in the cache its slot's entries and its mappings may both exist: whoever faults finds it.
 *
 *   mapped only --picked--> mapped, cached, dirty --unmapped, written--> cached, clean --dropped--> in swap alone
 *        ^                                                                    |                         |
 *        +------------------------- sole holder writes to it -----------------+<------- swap_in --------+
 *
 * Holds: INV-G-SWAP-1: a slot's contents are those of its cached page unless the page is FRAME_DIRTY or an entry that maps
 * it has D. INV-G-SWAP-2: a page is changed through a mapping only by its sole holder, so a slot that an entry names keeps
 * what the entry's owner had. INV-G-SWAP-3: a page that comes in has the sum that went out.
 * Locks: LOCK_PAGES; what names a slot in a table changes under that table's lock besides. swap_in and swap_out sleep, and hold
 * references alone then. Pages are summed without a lock: FRAME_READING and FRAME_WRITING keep their contents from all, as while the
 * disk has them. */
#include "swap.h"

#include "audit.h"
#include "check.h"
#include "console.h"
#include "kpt.h"
#include "locks.h"
#include "lru.h"
#include "pace.h"
#include "reclaim.h"
#include "string.h"
#include "task.h"
#include "tlb.h"
#include "window.h"

/* Pages read at once: those of an aligned group. */
#define READ_AHEAD 8
/* New slots come from an aligned group of so many free ones, while there is one. */
#define CLUSTER 32
/* At most so many slots for a frame of memory: the map of a large disk would fill a small machine. */
#define SLOTS_A_FRAME 8

struct slot {
    u32 entries; /* of page tables that name it */
    u32 frame;   /* in the cache */
    u32 sum;     /* of what was written to it last */
};

static struct blk *disk READ_MOSTLY;
static struct slot *const slots = (struct slot *)SWAP_MAP_BASE;
static u32 slot_count READ_MOSTLY;
static u32 used;
/* Where each CPU takes new slots from, so that what reclaimers on two find together does not mix. */
static struct cluster {
    u32 cursor, left;
} clusters[CPUS_MAX];
static bool sums_all READ_MOSTLY; /* words of a page */
struct swap_counts swap_counts;

/* Job 1: slots. */

bool swap_on(struct blk *on)
{
    u32 count = min_u32(blk_pages(on), (SWAP_MAP_END - SWAP_MAP_BASE) / sizeof(struct slot));
    count = min_u32(count, SLOTS_A_FRAME * frames_total());
    if (!paging.pae)
        count = min_u32(count, SLOTS_LEGACY_MAX);
    if (blk_read_only(on) || count < CLUSTER)
        return false;
    u32 end = ALIGN_UP(SWAP_MAP_BASE + count * sizeof(struct slot), PAGE_SIZE);
    kpt_cover(SWAP_MAP_BASE, end);
    for (u32 va = SWAP_MAP_BASE; va < end; va += PAGE_SIZE) {
        u32 frame = frame_alloc(ZONE_HIGH);
        if (frame == FRAME_NONE)
            return false;
        kpt_set(va, pte_make(frame, kpt_data_bits()));
        clear_page((void *)va);
    }
    disk = on;
    slot_count = count;
    sums_all = pace_is_fast();
    return true;
}

u32 swap_slots_used(void) { return used; }

static bool is_free(u32 slot) { return slots[slot].entries == 0 && slots[slot].frame == FRAME_NONE; }

static bool cluster_is_free(u32 first)
{
    for (u32 slot = first; slot < first + CLUSTER; slot++)
        if (!is_free(slot))
            return false;
    return true;
}

static void find_cluster(struct cluster *cluster)
{
    u32 count = slot_count / CLUSTER, first = cluster->cursor / CLUSTER;
    for (u32 step = 1; step <= count; step++) {
        u32 at = (first + step) % count * CLUSTER;
        if (!cluster_is_free(at))
            continue;
        *cluster = (struct cluster){.cursor = at, .left = CLUSTER};
        return;
    }
}

bool swap_is_full(void) { return used == slot_count; }

static u32 alloc_slot(void)
{
    struct cluster *cluster = &clusters[cpu_self()->index];
    if (swap_is_full())
        return SLOT_NONE;
    if (cluster->left == 0)
        find_cluster(cluster);
    while (!is_free(cluster->cursor))
        cluster->cursor = (cluster->cursor + 1) % slot_count;
    u32 slot = cluster->cursor;
    cluster->cursor = (slot + 1) % slot_count;
    cluster->left -= cluster->left > 0;
    used++;
    return slot;
}

static void forget_if_alone(u32 frame, u32 refs);

static void free_if_unused(u32 slot) { used -= is_free(slot); }

/* LOCK_PAGES is held. */
static void drop_entry(u32 slot)
{
    ASSERT(slots[slot].entries);
    slots[slot].entries--;
    u32 frame = slots[slot].frame;
    if (frame == FRAME_NONE)
        free_if_unused(slot);
    else
        forget_if_alone(frame, 1);
}

void swap_entry_copied(u32 slot)
{
    ASSERT(slot < slot_count);
    pages_take();
    slots[slot].entries++;
    pages_give();
}

void swap_entry_dropped(u32 slot)
{
    pages_take();
    drop_entry(slot);
    pages_give();
}

/* Job 2: the cache. */

/* The lock is held. */
static void cache(u32 frame, u32 slot)
{
    frame_get_held(frame);
    frame_of(frame)->slot = slot + 1;
    slots[slot].frame = frame;
}

void swap_forget_held(u32 frame)
{
    u32 slot = swap_slot_of(frame);
    ASSERT(slots[slot].frame == frame);
    slots[slot].frame = FRAME_NONE;
    frame_of(frame)->slot = 0;
    free_if_unused(slot);
    frame_put_held(frame);
}

static bool is_moving(u32 frame) { return frame_of(frame)->flags & (FRAME_READING | FRAME_WRITING); }

/* Forgets a page that has so many references, the cache's among them, and that no entry names. */
static void forget_if_alone(u32 frame, u32 refs)
{
    const struct frame *entry = frame_of(frame);
    if (entry->slot && entry->refs == refs && !is_moving(frame) && slots[entry->slot - 1].entries == 0)
        swap_forget_held(frame);
}

void swap_put_held(u32 frame)
{
    forget_if_alone(frame, 2);
    frame_put_held(frame);
}

void swap_put(u32 frame)
{
    pages_take();
    swap_put_held(frame);
    pages_give();
}

void swap_unmapped(u32 frame)
{
    pages_take();
    slots[swap_slot_of(frame)].entries++;
    frame_put_held(frame);
    pages_give();
}

u32 swap_slot_for_held(u32 frame)
{
    u32 slot = in_swap_cache(frame) ? swap_slot_of(frame) : alloc_slot();
    if (slot != SLOT_NONE && !in_swap_cache(frame)) {
        cache(frame, slot);
        frame_of(frame)->flags |= FRAME_DIRTY;
    }
    return slot;
}

/* The lock is held. */
static bool has_one_holder(u32 frame)
{
    const struct frame *entry = frame_of(frame);
    return entry->slot ? entry->refs == 2 && slots[entry->slot - 1].entries == 0 : entry->refs == 1;
}

bool swap_claim(u32 frame)
{
    pages_take();
    bool sole = has_one_holder(frame);
    if (sole && in_swap_cache(frame))
        swap_forget_held(frame);
    pages_give();
    return sole;
}

void swap_came_in(u32 frame, u32 slot)
{
    pages_take();
    drop_entry(slot);
    if (used > slot_count / 2 && has_one_holder(frame)) {
        swap_forget_held(frame);
        frame_of(frame)->flags |= FRAME_DIRTY;
    }
    pages_give();
}

/* Job 3: in. */

void swap_lost(const char *what, u32 number)
{
    kernel_take();
    if (swap_counts.lost++ < 4)
        printk("pager: swap: slot %u %s\n", number, what);
    tally.errors++;
    kernel_give_back();
}

/* What is compared when the page comes back: on a slow CPU a sample, that hangs on the slot. The workload's pages have words of their
 * own in each (user/reclaim.c). */
static u32 page_sum(struct cpu *self, u32 frame, u32 slot)
{
    const u32 *page = window_map(self, frame, "sum");
    u32 sum = sums_all ? sum_page(slot, page) : sum_sample(slot, page + slot % SAMPLE_STEP);
    window_unmap(self, page);
    return sum;
}

/* Of pages that are marked as on their way, and so keep their slots. It takes long, mostly with interrupts off: others are not to wait
 * for this CPU's TLB meanwhile. */
static void sum_pages(const u32 *frames, u32 count, u32 *sums)
{
    struct cpu *self = cpu_self();
    kernel_lend();
    for (u32 i = 0; i < count; i++) {
        sums[i] = page_sum(self, frames[i], swap_slot_of(frames[i]));
        tlb_serve(self);
    }
    kernel_regain();
}

/* The lock is held. A frame for a slot that has none, marked as on its way; FRAME_NONE if there is none to be had. */
static u32 begin_in(u32 slot)
{
    u32 frame = frame_alloc_held(ZONE_HIGH);
    if (frame == FRAME_NONE)
        return FRAME_NONE;
    frame_of(frame)->flags = FRAME_ANON | FRAME_READING;
    cache(frame, slot);
    return frame;
}

/* Pages that have been read, or not. */
static void end_group(const u32 *frames, u32 count, bool read, const u32 *sums)
{
    bool same[READ_AHEAD];
    for (u32 i = 0; i < count; i++) {
        u32 slot = swap_slot_of(frames[i]);
        same[i] = read && sums[i] == slots[slot].sum;
        if (!same[i])
            swap_lost(read ? "is not what was written" : "could not be read", slot);
    }
    pages_take();
    swap_counts.checked += count;
    for (u32 i = 0; i < count; i++) {
        frame_arrived_held(frames[i], same[i] ? 0 : FRAME_FAILED, FRAME_READING);
        lru_add_held(frames[i], LRU_INACTIVE);
        swap_put_held(frames[i]);
    }
    pages_give();
}

#ifdef SWAP_TWIN
/* The twins of INV-G-SWAP-3: from the 50th request on a few have a page that comes back as zeros (1), or as its neighbour (2). */
static void damage(const u32 *frames, u32 count)
{
    static u32 requests;
    if (count < 2 || ++requests < 50 || requests > 60)
        return;
    void *to = kmap_local(frames[0], "twin, to"), *from = kmap_local(frames[1], "twin, from");
    if (SWAP_TWIN == 1)
        clear_page(to);
    else
        copy_page(to, from);
    kunmap_local(from);
    kunmap_local(to);
}
#else
static void damage(const u32 *frames, u32 count) { (void)frames, (void)count; }
#endif

static bool wants_reading(u32 slot) { return slots[slot].entries && slots[slot].frame == FRAME_NONE; }

/* Frames for the slot and those beside it in its group that are wanted too, as far as there are frames to spare, marked as on their
 * way: how many, and the first slot. None where somebody else was faster. */
static u32 begin_group(u32 slot, u32 *first, u32 *frames)
{
    u32 end = slot + 1, group = ALIGN_DOWN(slot, READ_AHEAD), count = 0, frame;
    *first = slot;
    pages_take();
    bool wanted = wants_reading(slot), spare = wanted && frames_free() > READ_AHEAD + reclaim_min();
    while (spare && *first > group && wants_reading(*first - 1))
        --*first;
    while (spare && end < min_u32(group + READ_AHEAD, slot_count) && wants_reading(end))
        end++;
    for (u32 at = *first; wanted && at < end && (frame = begin_in(at)) != FRAME_NONE; at++)
        frames[count++] = frame;
    if (count) {
        swap_counts.reads++;
        swap_counts.pages_read += count;
        swap_counts.read_ahead += count - 1;
    }
    pages_give();
    return count;
}

static void read_group(u32 slot)
{
    u32 frames[READ_AHEAD], sums[READ_AHEAD], first, count = begin_group(slot, &first, frames);
    if (count == 0)
        return;
    bool read = blk_transfer(disk, BLK_READ, first, frames, count);
    damage(frames, count);
    sum_pages(frames, count, sums);
    end_group(frames, count, read, sums);
}

/* The slot's page, with a reference; FRAME_NONE where it has none in the cache. False where no entry names the slot. */
static bool find_cached(u32 slot, u32 *frame, bool first)
{
    pages_take();
    bool named = slots[slot].entries;
    *frame = named ? slots[slot].frame : FRAME_NONE;
    if (*frame != FRAME_NONE)
        frame_get_held(*frame);
    swap_counts.ins += first;
    swap_counts.hits += first && *frame != FRAME_NONE && !frame_is(*frame, FRAME_READING);
    pages_give();
    return named;
}

/* It is there, and was on its way when it was found. */
static enum swap_result wait_for_arrival(u32 slot, u32 frame)
{
    frame_wait_while(frame, FRAME_READING);
    pages_take();
    bool failed = frame_is(frame, FRAME_FAILED), done = slots[slot].frame == frame && !failed;
    if (!done)
        swap_put_held(frame);
    pages_give();
    return done ? SWAP_DONE : failed ? SWAP_LOST : SWAP_STALE;
}

/* Whoever else waits for the page may take it, write to it and have it written out again before this one runs, and others may take
 * the frames that room was made for: hence the loop. */
enum swap_result swap_in(u32 slot, u32 *frame)
{
    for (bool first = true; find_cached(slot, frame, first); first = false) {
        if (*frame == FRAME_NONE) {
            if (!make_room(1))
                return SWAP_NO_MEMORY;
            read_group(slot);
        } else if (!frame_is(*frame, FRAME_READING | FRAME_FAILED)) {
            return SWAP_DONE;
        } else {
            enum swap_result result = wait_for_arrival(slot, *frame);
            if (result != SWAP_STALE)
                return result;
        }
    }
    return SWAP_STALE;
}

/* Job 4: out. */

static u32 run_length(const u32 *frames, u32 count)
{
    u32 length = 1;
    while (length < count && swap_slot_of(frames[length]) == swap_slot_of(frames[0]) + length)
        length++;
    return min_u32(length, BLK_PAGES_MAX);
}

#define REQUESTS_MAX 4

struct run {
    struct blk_request *request;
    const u32 *frames;
    u32 count;
};

static bool begin_run(struct run *run, bool may_wait)
{
    u32 first = swap_slot_of(run->frames[0]);
    run->request = blk_start(disk, BLK_WRITE, first, run->frames, run->count, may_wait);
    if (!run->request)
        return false;
    pages_take();
    swap_counts.writes++;
    swap_counts.pages_written += run->count;
    pages_give();
    return true;
}

static void end_run(const struct run *run)
{
    bool written = blk_wait(run->request);
    pages_take();
    for (u32 i = 0; i < run->count; i++)
        frame_arrived_held(run->frames[i], written ? 0 : FRAME_DIRTY, FRAME_WRITING);
    pages_give();
}

/* They are unmapped, and nobody stores to a page that others hold: what is summed is what goes out. */
static void sum_all(const u32 *frames, u32 count)
{
    u32 sums[SWAP_OUT_MAX];
    ASSERT(count <= SWAP_OUT_MAX);
    pages_take();
    for (u32 i = 0; i < count; i++)
        frame_mark_held(frames[i], 0, FRAME_DIRTY);
    pages_give();
    sum_pages(frames, count, sums);
    for (u32 i = 0; i < count; i++)
        slots[swap_slot_of(frames[i])].sum = sums[i];
}

void swap_out(const u32 *frames, u32 count)
{
    struct run runs[REQUESTS_MAX];
    sum_all(frames, count);
    for (u32 done = 0; done < count;) {
        u32 begun = 0;
        for (; begun < REQUESTS_MAX && done < count; begun++) {
            struct run run = {.frames = frames + done, .count = run_length(frames + done, count - done)};
            if (!begin_run(&run, begun == 0))
                break;
            runs[begun] = run;
            done += run.count;
        }
        for (u32 i = 0; i < begun; i++)
            end_run(&runs[i]);
    }
}

/* For the audit. */

bool swap_audit_entry(u32 slot, bool take)
{
    if (slot >= slot_count || (take && slots[slot].entries == 0))
        return false;
    slots[slot].entries += take ? -1u : 1;
    return true;
}

bool swap_audit_used(void)
{
    u32 count = 0;
    for (u32 slot = 0; slot < slot_count; slot++)
        count += !is_free(slot);
    return count == used;
}

bool swap_audit_rest(void)
{
    for (u32 slot = 0; slot < slot_count; slot++) {
        u32 frame = slots[slot].frame;
        if (slots[slot].entries || (frame != FRAME_NONE && frame_of(frame)->slot != slot + 1))
            return false;
    }
    return true;
}
