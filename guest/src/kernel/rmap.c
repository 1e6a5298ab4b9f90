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

/* The table where the space would have the page; false if there is none, or no such space any more. */
static bool open_there(struct space *space, struct mapping *mapping)
{
    upt_take(&space->upt);
    bool open = space_is_live(space) && place_of(space, frame_of(mapping->frame), &mapping->va) &&
                upt_open_held(&space->upt, mapping->va, false, &mapping->leaf);
    if (!open)
        upt_give(&space->upt);
    return open;
}

/* The entry in this space, as it was before; 0 if it does not map the frame. */
static pte_t visit_one(struct space *space, u32 frame, change_t change)
{
    struct mapping mapping = {.frame = frame, .root = space->upt.cr3};
    if (!open_there(space, &mapping))
        return 0;
    pte_t entry = upt_get(&mapping.leaf);
    bool maps = (entry & PTE_P) && pte_frame(entry) == frame;
    if (maps)
        entry = change(&mapping);
    upt_close(&mapping.leaf);
    return maps ? entry : 0;
}

/* Without a lock: others may add one at any time after. Mappings, if nobody else holds the page but who asks and the cache: at
 * least as many as there are. */
static u32 mappings(u32 frame) { return frame_of(frame)->refs - 1 - (in_swap_cache(frame) || file_has(frame)); }

/* All bits that the entries had, together. */
static pte_t visit(u32 frame, change_t change)
{
    struct space *likely = (struct space *)frame_of(frame)->space;
    u32 left = mappings(frame);
    pte_t all = 0;
    if (left && likely && (all = visit_one(likely, frame, change)))
        left--;
    if (!left)
        return all;
    bool of_file = frame_of(frame)->flags & FRAME_FILE;
    if (!of_file)
        spaces_take();
    for (struct space *space = spaces; space && left; space = space->next) {
        pte_t entry = space == likely ? 0 : visit_one(space, frame, change);
        all |= entry;
        left -= entry != 0;
    }
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

pte_t rmap_take_used(u32 frame) { return visit(frame, age) & (PTE_A | PTE_D); }

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

bool rmap_begin_unmap(u32 frame)
{
    return visit(frame, frame_of(frame)->flags & FRAME_FILE ? to_nothing : to_swap) & PTE_D;
}

bool rmap_unmap(u32 frame)
{
    bool dirty = rmap_begin_unmap(frame);
    tlb_finish();
    return dirty;
}
