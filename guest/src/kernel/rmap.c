/* Who maps a page.
 *
 * Story: nothing is kept but the page's number (struct frame, index). Processes share a page only by fork, and have it at the
 * same address then; a file's page is where each region of the file says. So its mappings are found by looking there in
 * every address space.
 * Holds: INV-G-RMAP-1: an entry is taken away, and its A and D with it, before its translation is flushed, and nothing is done
 * with the page before that.
 * Locks: none; never sleeps. One CPU: no other can set A or D in between. */
#include "rmap.h"

#include "cpu.h"
#include "file.h"
#include "lru.h"
#include "space.h"
#include "swap.h"
#include "tlb.h"

/* Calls for each entry that maps the frame; `change` returns what the entry is to be. */
typedef pte_t (*change_t)(u32 frame, pte_t entry);

/* Where the space would have the page; false if nowhere. */
static bool place_of(struct space *space, const struct frame *page, u32 *va)
{
    if (page->flags & FRAME_FILE)
        return file_address(space, page->index, va);
    *va = page->index << PAGE_SHIFT;
    return true;
}

/* The entry in this space, changed; 0 if it does not map the frame. */
static pte_t visit_one(struct space *space, u32 frame, change_t change)
{
    u32 va;
    struct leaf leaf;
    if (!place_of(space, frame_of(frame), &va) || !upt_open(&space->upt, va, false, &leaf))
        return 0;
    pte_t entry = upt_get(&leaf);
    bool maps = (entry & PTE_P) && pte_frame(entry) == frame;
    if (maps) {
        pte_t now = change(frame, entry);
        if (now == 0)
            upt_clear(&leaf);
        else if (now != entry)
            upt_change(&leaf, now);
        if (now != entry && tlb_is_loaded(space->upt.cr3))
            invlpg(va);
    }
    upt_close(&leaf);
    return maps ? entry : 0;
}

/* Mappings, if nobody else holds the page but who asks and the cache: at least as many as there are. */
static u32 mappings(u32 frame) { return frame_of(frame)->refs - 1 - (in_swap_cache(frame) || file_has(frame)); }

/* All bits that the entries had, together. */
static pte_t visit(u32 frame, change_t change)
{
    struct space *likely = (struct space *)frame_of(frame)->space;
    u32 left = mappings(frame);
    pte_t all = 0;
    if (left && space_is_live(likely) && (all = visit_one(likely, frame, change)))
        left--;
    for (struct space *space = spaces; space && left; space = space->next) {
        pte_t entry = space == likely ? 0 : visit_one(space, frame, change);
        all |= entry;
        left -= entry != 0;
    }
    return all;
}

static pte_t without_accessed(u32 frame, pte_t entry)
{
    (void)frame;
    return entry & ~(pte_t)PTE_A;
}

bool rmap_take_referenced(u32 frame) { return visit(frame, without_accessed) & PTE_A; }

/* The reference goes here too: whoever asks has one of its own. */
static pte_t in_swap(u32 frame, pte_t entry)
{
    (void)entry;
    u32 slot = swap_slot_of(frame);
    swap_entry_copied(slot);
    frame_put(frame);
    return swap_entry(slot);
}

static pte_t absent(u32 frame, pte_t entry)
{
    (void)entry;
    frame_put(frame);
    return 0;
}

bool rmap_unmap(u32 frame)
{
    return visit(frame, frame_of(frame)->flags & FRAME_FILE ? absent : in_swap) & PTE_D;
}
