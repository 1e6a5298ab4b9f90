/* An audit of what reclaim keeps.
 *
 * Story: each entry of every user page table is taken off the count that it stands in: of its slot, or of its frame. What is left must
 * be what nobody maps: no entry at all of a slot, and of a frame at least what the cache holds. Then all is put back.
 * Checks: INV-G-SWAP (slots, their entries and pages, and how many are in use), INV-G-RMAP (a mapping holds its frame), INV-G-FILE
 * (the cache has pages of the file alone), INV-G-RECLAIM (lists have what their counts say).
 * Locks: all that have to do with pages: the kernel's, each address space's and LOCK_PAGES. So nobody is between two counts that belong
 * together, and nobody sees one that is not what it should be: an NMI looks at tables alone. None waits for a space's lock with
 * another's, since only fork would, which has the kernel. */
#include "audit.h"

#include "console.h"
#include "frames.h"
#include "locks.h"
#include "space.h"
#include "swap.h"

static u32 broken;

static void want(bool holds, const char *what)
{
    if (!holds && broken++ < 4)
        printk("pager: audit: %s\n", what);
}

static void visit_entry(pte_t entry, bool take)
{
    if (is_swap_entry(entry)) {
        want(swap_audit_entry(swap_entry_slot(entry), take), "a slot has more entries than it counts");
        return;
    }
    struct frame *page = frame_of(pte_frame(entry));
    want(!take || page->refs, "a frame has more mappings than references");
    page->refs += take ? -1u : 1;
}

static void visit_table(struct space *space, u32 start, u32 end, bool take)
{
    struct leaf leaf;
    if (!upt_open_held(&space->upt, start, false, &leaf))
        return;
    u32 left = upt_count(&leaf);
    for (u32 va = start; va < end && left; va += PAGE_SIZE, upt_next(&leaf)) {
        pte_t entry = upt_get(&leaf);
        if (!entry)
            continue;
        visit_entry(entry, take);
        left--;
    }
    upt_close_held(&leaf);
}

static void visit_all(bool take)
{
    for (struct space *space = spaces; space; space = space->next)
        for (u32 i = 0; i < space->region_count; i++) {
            const struct region *region = &space->regions[i];
            for (u32 va = region->start; va < region->end; va = table_end(va, region->end))
                visit_table(space, va, table_end(va, region->end), take);
        }
}

static void stop_others(void)
{
    kernel_take();
    spaces_take();
    for (struct space *space = spaces; space; space = space->next)
        lock_take_unordered(&space->upt.lock);
    pages_take();
}

static void let_others_go_on(void)
{
    pages_give();
    for (struct space *space = spaces; space; space = space->next)
        lock_give_unordered(&space->upt.lock);
    spaces_give();
    kernel_give_back();
}

u32 audit(void)
{
    stop_others();
    broken = 0;
    want(swap_audit_used(), "more or fewer slots are in use than it is said");
    visit_all(true);
    want(swap_audit_rest(), "a slot has an entry that nobody has, or a page that has another slot");
    visit_all(false);
    want(lru_audit(), "a list does not have what its count says");
    want(file_audit(), "the file's cache has what is not the file's");
    let_others_go_on();
    return broken;
}
