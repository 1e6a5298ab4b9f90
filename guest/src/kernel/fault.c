/* Page faults at user addresses: demand-zero, demand-load, copy on write, stack growth, swap-in.
 *
 *              no region allows it --> BAD_ACCESS
 *              a region of the file -> file.c
 *   absent --> anonymous, read ------> the zero page, read-only
 *          \-> else -----------------> a fresh frame, filled from the image or with zeros
 *   in swap -------------------------> brought in, with nothing held; then, if it is still the page: mapped
 *   present, write, read-only -------> sole holder: made writable; else a private copy
 *
 * Holds: no entry gets W before its frame has this space as the only holder. Room is made before anything is held; where others were
 * faster and there is no frame then, it is made once more. A page is filled before it is on a list or in a table. A space that was
 * reaped gets no page any more: it is doomed before its first table is emptied.
 * Locks: an open leaf's (upt.h), also while the page is filled: others want that one only for pages of the same process. The file's
 * pages take the kernel. */
#include "check.h"
#include "cpu.h"
#include "file.h"
#include "frames.h"
#include "kmap.h"
#include "lru.h"
#include "reclaim.h"
#include "space.h"
#include "string.h"
#include "swap.h"
#include "tlb.h"
#include "trap.h"
#include "window.h"

/* A page, a table and a directory. */
#define ROOM 3

static pte_t region_bits(const struct region *region)
{
    return PTE_P | PTE_U | PTE_A | (region->flags & REGION_EXEC ? 0 : paging.nx);
}

static pte_t writable(pte_t entry) { return entry | PTE_W | PTE_D; }

static bool region_allows(const struct region *region, u32 error)
{
    if (error & FAULT_W)
        return region->flags & REGION_WRITE;
    if (error & FAULT_FETCH)
        return region->flags & REGION_EXEC;
    return true;
}

/* Fresh anonymous pages are what is common; the rest of this file is kept out of their way. */
#define SELDOM __attribute__((noinline))

/* From the image as far as it reaches, then zeros. */
static SELDOM void fill_from_image(u32 frame, const struct region *region, u32 offset)
{
    u8 *to = kmap_local(frame, "image");
    u32 bytes = min_u32(region->image_bytes - offset, PAGE_SIZE);
    memcpy(to, region->image + offset, bytes);
    memset(to + bytes, 0, PAGE_SIZE - bytes);
    kunmap_local(to);
}

/* A frame that has been filled, for the page, which reclaim may take from now on. */
static void list_page(const struct space *space, u32 page, u32 frame)
{
    frame_of(frame)->flags = FRAME_ANON;
    frame_of(frame)->index = page >> PAGE_SHIFT;
    frame_of(frame)->space = (u32)space;
    lru_add(frame, LRU_INACTIVE);
}

static inline __attribute__((always_inline)) void clear_frame(u32 frame)
{
    void *to = kmap_local(frame, "first touch");
    clear_page(to);
    kunmap_local(to);
}

/* The page's initial contents. */
static void fill_page(u32 frame, const struct region *region, u32 page)
{
    if (page - region->start >= region->image_bytes)
        clear_frame(frame);
    else
        fill_from_image(frame, region, page - region->start);
}

static SELDOM enum fault_result fix_by_zero_page(struct leaf *leaf, const struct region *region)
{
    frame_get(zero_frame);
    upt_enter(leaf, pte_make(zero_frame, region_bits(region)));
    return FAULT_FIXED;
}

/* As it was in 2002, for the scenes that switch the rules off: what a fault waits for with its table open, which the pool allows. */

static SELDOM void wait_for_frame(struct leaf *leaf)
{
    upt_give(leaf->upt);
    reclaim_await(1);
    upt_take(leaf->upt);
}

static SELDOM void clear_by_pool(struct leaf *leaf, u32 frame)
{
    upt_give(leaf->upt);
    void *to = kmap_of(SERIES_DEFAULT, frame);
    clear_page(to);
    kunmap(to);
    upt_take(leaf->upt);
}

static SELDOM void linger(struct leaf *leaf)
{
    upt_give(leaf->upt);
    place_pass(PLACE_TABLE_OPEN);
    upt_take(leaf->upt);
}

static enum fault_result fix_absent(const struct space *space, struct leaf *leaf, const struct region *region, u32 page, bool write)
{
    bool anonymous = page - region->start >= region->image_bytes;
    if (anonymous && !write && !(region->flags & REGION_EXEC))
        return fix_by_zero_page(leaf, region);
    if (!rule_kept(RULE_TABLE_WINDOW))
        linger(leaf);
    if (!rule_kept(RULE_ROOM_FIRST))
        wait_for_frame(leaf);
    u32 frame = frame_alloc(ZONE_HIGH);
    if (frame == FRAME_NONE)
        return FAULT_NO_FRAME;
    if (rule_kept(RULE_FILL_WINDOW))
        fill_page(frame, region, page);
    else
        clear_by_pool(leaf, frame);
    list_page(space, page, frame);
    pte_t entry = pte_make(frame, region_bits(region));
    upt_enter(leaf, write ? writable(entry) : entry);
    return FAULT_FIXED;
}

/* The mapping's reference keeps what is shared as it is. */
static SELDOM void copy_shared(u32 own, u32 shared)
{
    void *to = kmap_local(own, "copy on write, to"), *from = kmap_local(shared, "copy on write, from");
    copy_page(to, from);
    kunmap_local(from);
    kunmap_local(to);
}

/* Making an entry more permissive needs no flush: a stale read-only translation only brings the CPU back here, and the fault
 * itself has dropped it. A new frame behind a present entry does need one. */
static SELDOM enum fault_result fix_write(const struct space *space, struct leaf *leaf, u32 page)
{
    pte_t entry = upt_get(leaf);
    u32 shared = pte_frame(entry);
    if ((entry & PTE_W) || (shared != zero_frame && swap_claim(shared))) {
        upt_change(leaf, writable(entry));
        return FAULT_FIXED;
    }
    u32 own = frame_alloc(ZONE_HIGH);
    if (own == FRAME_NONE)
        return FAULT_NO_FRAME;
    if (shared == zero_frame)
        clear_frame(own);
    else
        copy_shared(own, shared);
    list_page(space, page, own);
    upt_change(leaf, writable(pte_make(own, entry & ~PTE_FRAME)));
    if (flush_kept(FLUSH_COPY))
        invlpg(page);
    swap_put(shared);
    return FAULT_FIXED;
}

/* Puts the page of a slot, with its reference, where its entry was. */
static void enter_swapped(const struct space *space, struct leaf *leaf, const struct region *region, u32 page, u32 frame)
{
    struct frame *entry = frame_of(frame);
    entry->index = page >> PAGE_SHIFT;
    entry->space = (u32)space;
    u32 slot = swap_entry_slot(upt_get(leaf));
    upt_change(leaf, pte_make(frame, region_bits(region)));
    swap_came_in(frame, slot);
}

/* The slot, or the entry, is another only if the space was reaped meanwhile. A write faults once more, and has a copy or its right then. */
static SELDOM enum fault_result fix_swapped(struct space *space, const struct region *region, u32 page, pte_t entry)
{
    u32 frame;
    switch (swap_in(swap_entry_slot(entry), &frame)) {
    case SWAP_NO_MEMORY: return FAULT_OUT_OF_MEMORY;
    case SWAP_LOST: return FAULT_LOST;
    case SWAP_STALE: return FAULT_FIXED;
    case SWAP_DONE: break;
    }
    struct leaf leaf;
    bool there = upt_open(&space->upt, page, false, &leaf);
    if (there && upt_get(&leaf) == entry && !space->doomed)
        enter_swapped(space, &leaf, region, page, frame);
    else
        swap_put(frame);
    if (there)
        upt_close(&leaf);
    return FAULT_FIXED;
}

static SELDOM enum fault_result fix_file(struct space *space, const struct region *region, u32 page)
{
    kernel_take();
    enum fault_result result = file_fault(space, region, page);
    kernel_give_back();
    return result;
}

static inline __attribute__((always_inline)) enum fault_result fix_own(struct space *space, const struct region *region, u32 page,
                                                                       bool write)
{
    struct leaf leaf;
    if (!upt_open(&space->upt, page, true, &leaf))
        return FAULT_NO_FRAME;
    enum fault_result result = FAULT_FIXED;
    pte_t entry = upt_get(&leaf);
    if (is_swap_entry(entry)) {
        upt_close(&leaf);
        return fix_swapped(space, region, page, entry);
    }
    if (space->doomed)
        result = FAULT_OUT_OF_MEMORY;
    else if (!entry)
        result = fix_absent(space, &leaf, region, page, write);
    else if (write)
        result = fix_write(space, &leaf, page);
    upt_close(&leaf);
    return result;
}

enum fault_result space_fault(struct space *space, u32 va, u32 error)
{
    if (va >= USER_END)
        return FAULT_BAD_ACCESS;
    if (space->doomed)
        return FAULT_OUT_OF_MEMORY;
    if (error & FAULT_RSVD)
        panic("reserved bit in the user page tables at %08x", va);
    struct region *region = space_find(space, va);
    if (!region)
        region = space_grow_stack(space, va);
    if (!region || !region_allows(region, error))
        return FAULT_BAD_ACCESS;
    u32 page = va & PAGE_MASK;
    enum fault_result result;
    cpu_self()->faults++;
    do {
        if (rule_kept(RULE_ROOM_FIRST) && !make_room(ROOM))
            return FAULT_OUT_OF_MEMORY;
        result = region->flags & REGION_FILE ? fix_file(space, region, page) : fix_own(space, region, page, error & FAULT_W);
    } while (result == FAULT_NO_FRAME);
    return result;
}
