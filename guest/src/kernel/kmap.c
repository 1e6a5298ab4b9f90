/* The persistent pool.
 *
 * Story: a slot is *free*, *held* (references > 0) or *idle* (mapped, held by nobody). A release makes a slot idle and
 * flushes nothing: the next kmap of the same frame finds it still mapped. When no slot is free, one sweep unmaps all idle
 * ones and pays for all with one flush, on every CPU; entries here are not global, so that reloading CR3 is that flush.
 *
 * Holds: an idle or held slot is mapped; a free slot is unmapped, and no TLB remembers it. Page-table access never uses the
 * pool: reclaiming memory must not wait for a slot.
 * Locks: the kernel's. kmap may sleep. */
#include "kmap.h"

#include "check.h"
#include "frames.h"
#include "kpt.h"
#include "tlb.h"
#include "task.h"
#include "window.h"

enum slot_state { SLOT_FREE, SLOT_IDLE, SLOT_HELD };

struct slot {
    enum slot_state state;
    u32 frame;
    u32 refs;
};

static struct slot slots[POOL_SLOTS];
struct pool_counts pool_counts;

static void *slot_address(const struct slot *slot)
{
    return (void *)(POOL_BASE + (u32)(slot - slots) * PAGE_SIZE);
}

static void sweep(void)
{
    u32 freed = 0;
    for (struct slot *slot = slots; slot < slots + POOL_SLOTS; slot++) {
        if (slot->state != SLOT_IDLE)
            continue;
        kpt_clear((u32)slot_address(slot));
        slot->state = SLOT_FREE;
        freed++;
    }
    if (freed == 0)
        return;
    flush_not_global_everywhere();
    pool_counts.sweeps++;
    pool_counts.reclaimed += freed;
}

static struct slot *find_mapped(u32 frame)
{
    for (struct slot *slot = slots; slot < slots + POOL_SLOTS; slot++)
        if (slot->state != SLOT_FREE && slot->frame == frame)
            return slot;
    return NULL;
}

static struct slot *find_free(void)
{
    for (struct slot *slot = slots; slot < slots + POOL_SLOTS; slot++)
        if (slot->state == SLOT_FREE)
            return slot;
    return NULL;
}

static struct slot *map_free(u32 frame)
{
    struct slot *slot = find_free();
    if (!slot) {
        sweep();
        slot = find_free();
    }
    if (!slot)
        return NULL;
    kpt_enter((u32)slot_address(slot), pte_make(frame, kpt_data_bits() & ~(pte_t)PTE_G));
    *slot = (struct slot){.state = SLOT_IDLE, .frame = frame};
    return slot;
}

void *kmap_try(u32 frame)
{
    struct slot *slot = find_mapped(frame);
    if (!slot)
        slot = map_free(frame);
    if (!slot)
        return NULL;
    slot->state = SLOT_HELD;
    slot->refs++;
    return slot_address(slot);
}

void *kmap(u32 frame)
{
    void *address;
    while (!(address = kmap_try(frame))) {
        ASSERT(window_depth() == 0);
        pool_counts.waits++;
        task_wait_on(slots);
    }
    return address;
}

void kunmap(const void *address)
{
    u32 index = ((u32)address - POOL_BASE) / PAGE_SIZE;
    ASSERT(index < POOL_SLOTS && slots[index].state == SLOT_HELD);
    if (--slots[index].refs)
        return;
    slots[index].state = SLOT_IDLE;
    task_wake(slots);
}
