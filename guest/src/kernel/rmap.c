/* Who maps a page.
 *
 * Story: nothing is kept but the page's number (struct frame, index). Processes share a page only by fork, and have it at the
 * same address then; a file's page is where each region of the file says. So its mappings are found by looking there in
 * every address space.
 * Holds: INV-G-RMAP-1: an entry is taken away, and its A and D with it, before its translation is flushed, and nothing is done
 * with the page before that. The space may be that of a task that runs on another CPU, which sets A and D as it likes: an entry is
 * taken, or aged, by one locked instruction.
 * Locks: that of each space in turn, and of the list of them where the first look did not find all; for a file's page the caller has
 * the kernel, since regions are looked at, and without it the list does not change. Never sleeps. */
#include "rmap.h"

#include "file.h"
#include "locks.h"
#include "lru.h"
#include "space.h"
#include "swap.h"
#include "tlb.h"

/* An entry that maps a frame. */
struct mapping {
    u32 frame, root, va;
    struct leaf leaf;
};

/* Calls for each entry that maps the frame; returns what it was. */
typedef pte_t (*change_t)(struct mapping *mapping);

/* Where the space would have the page; false if nowhere. */
static bool place_of(struct space *space, const struct frame *page, u32 *va)
{
    if (page->flags & FRAME_FILE)
        return file_address(space, page->index, va);
    *va = page->index << PAGE_SHIFT;
    return true;
}

/* A walk from page to page, which keeps the lock of a space and the table that it has open for as long as the next page wants the same. */
struct look {
    struct space *space; /* whose lock it has; NULL for none */
    bool open;           /* the leaf of `mapping` */
    struct mapping mapping;
};

static void close_table(struct look *look)
{
    if (look->open)
        upt_close_held(&look->mapping.leaf);
    look->open = false;
}

static void leave(struct look *look)
{
    close_table(look);
    if (look->space)
        upt_give(&look->space->upt);
    look->space = NULL;
}

static void enter(struct look *look, struct space *space)
{
    if (look->space == space)
        return;
    leave(look);
    upt_take(&space->upt);
    look->space = space;
}

/* To the entry of the page; false if the space has no table there, or is none any more. */
static bool move_to(struct look *look, u32 frame)
{
    struct mapping *mapping = &look->mapping;
    struct space *space = look->space;
    u32 va;
    if (!space_is_live(space) || !place_of(space, frame_of(frame), &va))
        return false;
    if (look->open && !upt_reaches(mapping->va, va)) {
        close_table(look);
        /* Where tables are in the pool the lock was let go of. */
        if (!space_is_live(space))
            return false;
    }
    mapping->frame = frame;
    mapping->root = space->upt.cr3;
    mapping->va = va;
    if (look->open)
        upt_move(&mapping->leaf, va);
    else
        look->open = upt_open_held(&space->upt, va, false, &mapping->leaf);
    return look->open;
}

/* The page's entry in this space, as it was before; 0 if there is none. */
static pte_t look_in(struct look *look, struct space *space, u32 frame, change_t change)
{
    enter(look, space);
    if (!move_to(look, frame))
        return 0;
    pte_t entry = upt_get(&look->mapping.leaf);
    bool maps = (entry & PTE_P) && pte_frame(entry) == frame;
    return maps ? change(&look->mapping) : 0;
}

/* Without a lock: others may add one at any time after. Mappings, if nobody else holds the page but who asks and the cache: at
 * least as many as there are. */
static u32 mappings(u32 frame) { return frame_of(frame)->refs - 1 - (in_swap_cache(frame) || file_has(frame)); }

/* All bits that the entries had, together. */
static pte_t visit(struct look *look, u32 frame, change_t change)
{
    struct space *likely = (struct space *)frame_of(frame)->space;
    u32 left = mappings(frame);
    pte_t all = 0;
    if (left && likely && (all = look_in(look, likely, frame, change)))
        left--;
    if (!left)
        return all;
    leave(look);
    bool of_file = frame_of(frame)->flags & FRAME_FILE;
    if (!of_file)
        spaces_take();
    for (struct space *space = spaces; space && left; space = space->next) {
        pte_t entry = space == likely ? 0 : look_in(look, space, frame, change);
        all |= entry;
        left -= entry != 0;
    }
    leave(look);
    if (!of_file)
        spaces_give();
    return all;
}

static pte_t age(struct mapping *mapping)
{
    pte_t entry = upt_get(&mapping->leaf);
    if (entry & PTE_A) {
        upt_age(&mapping->leaf);
        tlb_age(mapping->root, mapping->va);
    }
    return entry;
}

void rmap_take_used(const u32 *frames, u32 count, pte_t *used)
{
    struct look look = {.space = NULL};
    for (u32 i = 0; i < count; i++)
        used[i] = visit(&look, frames[i], age) & (PTE_A | PTE_D);
    leave(&look);
}

/* The reference goes here too: whoever asks has one of its own. */
static pte_t replace(struct mapping *mapping, pte_t by)
{
    pte_t entry = upt_steal(&mapping->leaf);
    upt_put(&mapping->leaf, by);
    tlb_drop(mapping->root, mapping->va);
    return entry;
}

static pte_t to_swap(struct mapping *mapping)
{
    pte_t entry = replace(mapping, swap_entry(swap_slot_of(mapping->frame)));
    swap_unmapped(mapping->frame);
    return entry;
}

static pte_t to_nothing(struct mapping *mapping)
{
    pte_t entry = replace(mapping, 0);
    frame_put(mapping->frame);
    return entry;
}

void rmap_begin_unmap(const u32 *frames, u32 count, pte_t *bits)
{
    struct look look = {.space = NULL};
    for (u32 i = 0; i < count; i++)
        bits[i] = visit(&look, frames[i], frame_of(frames[i])->flags & FRAME_FILE ? to_nothing : to_swap);
    leave(&look);
}

bool rmap_unmap(u32 frame)
{
    pte_t bits;
    rmap_begin_unmap(&frame, 1, &bits);
    tlb_finish();
    return bits & PTE_D;
}
