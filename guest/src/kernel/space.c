/* Address spaces of processes.
 *
 * Jobs: 1. regions, 2. zapping pages, 3. the heap, 4. fork.
 * Holds: a present user entry is writable only if its region is and its frame has no other holder; every present entry holds
 * one reference to its frame, the zero page included; only the owner's task, or its parent before it first runs, changes a
 * space, but that reclaim takes pages out of present entries, and space_reap all pages: tables stay where a task has found them.
 * Locks: a change of regions has the kernel, tables their own lock (upt.h). The owner looks at its regions without either. */
#include "space.h"

#include "check.h"
#include "cpu.h"
#include "file.h"
#include "frames.h"
#include "locks.h"
#include "string.h"
#include "swap.h"
#include "tlb.h"
#include "window.h"

u32 zero_frame READ_MOSTLY;
struct space *spaces;

static struct lock list_lock;
void spaces_take(void) { lock_take(&list_lock, LOCK_SPACE_LIST); }
void spaces_give(void) { lock_give(&list_lock, LOCK_SPACE_LIST); }

void space_init(void)
{
    zero_frame = frame_alloc(ZONE_HIGH);
    ASSERT(zero_frame != FRAME_NONE);
    void *page = kmap_local(zero_frame, "zero page");
    clear_page(page);
    kunmap_local(page);
}

bool space_create(struct space *space)
{
    space->region_count = 0;
    space->brk_start = space->brk = 0;
    space->doomed = false;
    if (!upt_create(&space->upt))
        return false;
    spaces_take();
    space->previous = NULL;
    space->next = spaces;
    if (spaces)
        spaces->previous = space;
    spaces = space;
    space->live = true;
    spaces_give();
    return true;
}

/* Whoever looks at its tables has done so when this returns. */
static void forget_space(struct space *space)
{
    spaces_take();
    upt_take(&space->upt);
    space->live = false;
    upt_give(&space->upt);
    if (space->previous)
        space->previous->next = space->next;
    else
        spaces = space->next;
    if (space->next)
        space->next->previous = space->previous;
    spaces_give();
}

/* Job 1: regions. */

/* From the newest on: its pages are those that are still to come. */
struct region *space_find(struct space *space, u32 va)
{
    for (struct region *region = space->regions + space->region_count; region-- > space->regions;)
        if (va >= region->start && va < region->end)
            return region;
    return NULL;
}

static bool overlaps(const struct space *space, u32 start, u32 end)
{
    for (u32 i = 0; i < space->region_count; i++)
        if (start < space->regions[i].end && end > space->regions[i].start)
            return true;
    return false;
}

bool space_map(struct space *space, struct region region)
{
    if (region.start >= region.end || region.end > USER_END || region.start < PAGE_SIZE)
        return false;
    if (space->region_count == REGIONS_MAX || overlaps(space, region.start, region.end))
        return false;
    space->regions[space->region_count++] = region;
    return true;
}

static struct region *grow_stack(struct space *space, u32 va)
{
    u32 page = va & PAGE_MASK;
    for (u32 i = 0; i < space->region_count; i++) {
        struct region *region = &space->regions[i];
        if (!(region->flags & REGION_GROWS_DOWN) || va >= region->start ||
            va < region->end - USER_STACK_PAGES_MAX * PAGE_SIZE || overlaps(space, page, region->start))
            continue;
        region->start = page;
        return region;
    }
    return NULL;
}

struct region *space_grow_stack(struct space *space, u32 va)
{
    kernel_take();
    struct region *region = grow_stack(space, va);
    kernel_give_back();
    return region;
}

/* What is left of a region from `start` on. */
static struct region region_tail(struct region region, u32 start)
{
    u32 skipped = start - region.start;
    region.image_bytes = region.image_bytes > skipped ? region.image_bytes - skipped : 0;
    region.image = region.image_bytes ? region.image + skipped : NULL;
    region.start = start;
    return region;
}

static struct region region_head(struct region region, u32 end)
{
    region.end = end;
    region.image_bytes = min_u32(region.image_bytes, end - region.start);
    return region;
}

/* Takes [start, end) out of region i; it may vanish, shrink, or fall in two. */
static void region_cut(struct space *space, u32 i, u32 start, u32 end)
{
    struct region region = space->regions[i];
    bool head = region.start < start, tail = region.end > end;
    if (head)
        space->regions[i] = region_head(region, start);
    else if (tail)
        space->regions[i] = region_tail(region, end);
    else
        space->regions[i] = space->regions[--space->region_count];
    if (head && tail)
        space->regions[space->region_count++] = region_tail(region, end);
}

/* Job 2: zapping. Frames are collected and put only after the flush: until then a TLB may still lead to them. */

#define ZAP_BATCH 32
#define ZAP_SINGLE_FLUSHES_MAX 4

struct zap {
    struct space *space;
    bool keeps_tables;
    u32 count;
    u32 va[ZAP_BATCH];
    u32 frame[ZAP_BATCH];
};

static void zap_finish(struct zap *zap)
{
    if (tlb_is_loaded(zap->space->upt.cr3)) {
        if (zap->count > ZAP_SINGLE_FLUSHES_MAX)
            flush_not_global(FLUSH_ZAP_MANY);
        else if (flush_kept(FLUSH_ZAP_FEW))
            for (u32 i = 0; i < zap->count; i++)
                invlpg(zap->va[i]);
    } else if (smp) {
        for (u32 i = 0; i < zap->count; i++)
            tlb_drop(zap->space->upt.cr3, zap->va[i]);
        tlb_finish();
    }
    for (u32 i = 0; i < zap->count; i++)
        swap_put(zap->frame[i]);
    zap->count = 0;
}

static void zap_add(struct zap *zap, u32 va, u32 frame)
{
    if (zap->count == ZAP_BATCH)
        zap_finish(zap);
    zap->va[zap->count] = va;
    zap->frame[zap->count] = frame;
    zap->count++;
}

/* The space may run on another CPU, when it is reaped: that sets A and D until the entry is gone. */
static pte_t take_entry(struct leaf *leaf, pte_t entry)
{
    if (smp && entry & PTE_P) {
        entry = upt_steal(leaf);
        upt_put(leaf, 0);
    } else {
        upt_clear(leaf);
    }
    return entry;
}

/* [start, end) lies within one table. */
static void zap_table(struct zap *zap, u32 start, u32 end)
{
    struct leaf leaf;
    if (!upt_open(&zap->space->upt, start, false, &leaf))
        return;
    u32 left = upt_count(&leaf);
    for (u32 va = start; va < end && left; va += PAGE_SIZE, upt_next(&leaf)) {
        pte_t entry = upt_get(&leaf);
        if (!entry)
            continue;
        entry = take_entry(&leaf, entry);
        left--;
        if (is_swap_entry(entry)) {
            swap_entry_dropped(swap_entry_slot(entry));
            continue;
        }
        if (entry & PTE_D)
            file_note_dirty(pte_frame(entry));
        zap_add(zap, va, pte_frame(entry));
    }
    upt_close(&leaf);
    if (left == 0 && !zap->keeps_tables)
        zap_add(zap, start, upt_unlink(&zap->space->upt, start));
}

static void zap_range(struct space *space, u32 start, u32 end, bool keeps_tables)
{
    /* The arrays hold nothing until zap_add fills them. */
    struct zap zap;
    zap.space = space;
    zap.keeps_tables = keeps_tables;
    zap.count = 0;
    for (u32 va = start; va < end; va = table_end(va, end))
        zap_table(&zap, va, table_end(va, end));
    zap_finish(&zap);
}

static bool cuts_file(const struct space *space, u32 start, u32 end)
{
    for (u32 i = 0; i < space->region_count; i++) {
        const struct region *region = &space->regions[i];
        bool meets = start < region->end && end > region->start, covers = start <= region->start && end >= region->end;
        if (region->flags & REGION_FILE && meets && !covers)
            return true;
    }
    return false;
}

/* Only a cut from the middle adds a region; the range then meets no other, so a refusal comes before any change. */
bool space_unmap(struct space *space, u32 start, u32 end)
{
    if (start >= end || end > USER_END || cuts_file(space, start, end))
        return false;
    for (u32 i = space->region_count; i-- > 0;) {
        struct region *region = &space->regions[i];
        u32 region_start = region->start, region_end = region->end;
        if (start >= region_end || end <= region_start)
            continue;
        if (region_start < start && region_end > end && space->region_count == REGIONS_MAX)
            return false;
        zap_range(space, max_u32(start, region_start), min_u32(end, region_end), false);
        region_cut(space, i, start, end);
        if (region_start <= start && region_end >= end)
            break;
    }
    return true;
}

void space_destroy(struct space *space)
{
    for (u32 i = 0; i < space->region_count; i++)
        zap_range(space, space->regions[i].start, space->regions[i].end, false);
    space->region_count = 0;
    forget_space(space);
    upt_destroy(&space->upt);
}

void space_reap(struct space *space)
{
    space->doomed = true;
    for (u32 i = 0; i < space->region_count; i++)
        zap_range(space, space->regions[i].start, space->regions[i].end, true);
}

static u32 count_pages(struct space *space, u32 start, u32 end)
{
    struct leaf leaf;
    u32 pages = 0;
    if (!upt_open(&space->upt, start, false, &leaf))
        return 0;
    for (u32 va = start; va < end; va += PAGE_SIZE, upt_next(&leaf)) {
        pte_t entry = upt_get(&leaf);
        pages += entry && pte_frame(entry) != zero_frame;
    }
    upt_close(&leaf);
    return pages;
}

u32 space_pages(struct space *space)
{
    u32 pages = 0;
    for (u32 i = 0; i < space->region_count; i++) {
        const struct region *region = &space->regions[i];
        if (region->flags & REGION_FILE)
            continue;
        for (u32 va = region->start; va < region->end; va = table_end(va, region->end))
            pages += count_pages(space, va, table_end(va, region->end));
    }
    return pages;
}

/* Job 3: the heap, from brk_start on. */

static bool heap_grow(struct space *space, u32 from, u32 to)
{
    struct region *last = from > space->brk_start ? space_find(space, from - 1) : NULL;
    if (overlaps(space, from, to))
        return false;
    if (!last)
        return space_map(space, (struct region){.start = from, .end = to, .flags = REGION_WRITE});
    last->end = to;
    return true;
}

u32 space_brk(struct space *space, u32 end)
{
    if (end < space->brk_start || end > USER_MAP_BASE)
        return space->brk;
    u32 from = ALIGN_UP(space->brk, PAGE_SIZE), to = ALIGN_UP(end, PAGE_SIZE);
    if (to > from && !heap_grow(space, from, to))
        return space->brk;
    if (to < from && !space_unmap(space, to, from))
        return space->brk;
    space->brk = end;
    return end;
}

/* Job 4: fork. */

/* Shares the pages of one table's part of a region. The child's entry and the parent's become read-only alike; the parent's
 * old, writable translation is flushed once, at the end of space_fork. */
static bool fork_table(struct space *parent, struct space *child, u32 start, u32 end, bool shared)
{
    struct leaf from, to;
    if (!upt_open(&parent->upt, start, false, &from))
        return true;
    bool ok = upt_open_as(&child->upt, start, true, &to, LOCK_CHILD);
    if (ok) {
        for (u32 va = start, left = upt_count(&from); va < end && left; va += PAGE_SIZE, upt_next(&from), upt_next(&to)) {
            pte_t entry = upt_get(&from);
            if (!entry)
                continue;
            left--;
            if (is_swap_entry(entry)) {
                swap_entry_copied(swap_entry_slot(entry));
            } else {
                if (entry & PTE_W && !shared)
                    upt_change(&from, entry &= ~(pte_t)PTE_W);
                frame_get(pte_frame(entry));
            }
            upt_enter(&to, entry);
        }
        upt_close(&to);
    }
    upt_close(&from);
    return ok;
}

static bool fork_region(struct space *parent, struct space *child, const struct region *region)
{
    for (u32 va = region->start; va < region->end; va = table_end(va, region->end))
        if (!fork_table(parent, child, va, table_end(va, region->end), region->flags & REGION_FILE))
            return false;
    return true;
}

bool space_fork(struct space *parent, struct space *child)
{
    bool ok = true;
    child->brk_start = parent->brk_start;
    child->brk = parent->brk;
    for (u32 i = 0; i < parent->region_count && ok; i++) {
        child->regions[child->region_count++] = parent->regions[i];
        ok = fork_region(parent, child, &parent->regions[i]);
    }
    if (tlb_is_loaded(parent->upt.cr3))
        flush_not_global(FLUSH_FORK);
    return ok;
}
