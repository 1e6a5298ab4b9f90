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
#include "locks.h"
#include "rule.h"
#include "task.h"
#include "tlb.h"
#include "window.h"

enum slot_state { SLOT_FREE, SLOT_IDLE, SLOT_HELD };

struct slot {
    enum slot_state state;
    u32 frame;
    u32 refs;
    const struct task *taker; /* who took the first of them */
};

static struct slot slots[POOL_SLOTS];
static u32 held;

/* Where a series finds a free slot. */
static struct range {
    u32 first, end;
} ranges[SERIES_COUNT] = {{0, POOL_SLOTS}, {0, POOL_SLOTS}, {0, POOL_SLOTS}};
static bool divided;

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

static struct slot *find_free(enum series series)
{
    for (struct slot *slot = slots + ranges[series].first; slot < slots + ranges[series].end; slot++)
        if (slot->state == SLOT_FREE)
            return slot;
    return NULL;
}

static struct slot *map_free(enum series series, u32 frame)
{
    struct slot *slot = find_free(series);
    if (!slot) {
        sweep();
        slot = find_free(series);
    }
    if (!slot)
        return NULL;
    kpt_enter((u32)slot_address(slot), pte_make(frame, kpt_data_bits() & ~(pte_t)PTE_G));
    *slot = (struct slot){.state = SLOT_IDLE, .frame = frame};
    return slot;
}

void *kmap_try_of(enum series series, u32 frame)
{
    struct slot *slot = find_mapped(frame);
    if (!slot)
        slot = map_free(series, frame);
    if (!slot)
        return NULL;
    if (slot->refs++ == 0) {
        slot->taker = current;
        pool_counts.held_max = max_u32(pool_counts.held_max, ++held);
    }
    slot->state = SLOT_HELD;
    return slot_address(slot);
}

void *kmap_try(u32 frame) { return kmap_try_of(SERIES_DEFAULT, frame); }

/* The kernel's lock goes with its task and may be had over a sleep; no other may. */
static void may_sleep(void)
{
    u32 spinning = cpu_self()->locks & ~(1u << LOCK_KERNEL);
    if (spinning)
        rule_broken("sleep", "%s is to wait for a slot of the pool with a spin lock held (levels %x)", current->name, spinning);
    ASSERT(window_depth() == 0);
}

void *kmap_of(enum series series, u32 frame)
{
    void *address;
    while (!(address = kmap_try_of(series, frame))) {
        if (series == SERIES_PAGETABLE2)
            rule_broken("exhausted", "%s finds no PAGETABLE2 slot, and may not wait for one", current->name);
        may_sleep();
        pool_counts.waits++;
        task_wait_for(series_slot(series), slots);
    }
    return address;
}

void *kmap(u32 frame) { return kmap_of(SERIES_DEFAULT, frame); }

void kunmap(const void *address)
{
    u32 index = ((u32)address - POOL_BASE) / PAGE_SIZE;
    ASSERT(index < POOL_SLOTS && slots[index].state == SLOT_HELD);
    if (--slots[index].refs)
        return;
    held--;
    slots[index].state = SLOT_IDLE;
    task_wake(slots);
}

void pool_divide(u32 plain, u32 tables, u32 second_tables)
{
    ASSERT(held == 0 && plain + tables + second_tables <= POOL_SLOTS);
    sweep();
    ranges[SERIES_DEFAULT] = (struct range){0, plain};
    ranges[SERIES_PAGETABLE] = (struct range){plain, plain + tables};
    ranges[SERIES_PAGETABLE2] = (struct range){plain + tables, plain + tables + second_tables};
    divided = tables;
}

const char *series_slot(enum series series)
{
    static const char *const names[] = {"a DEFAULT slot", "a PAGETABLE slot", "a PAGETABLE2 slot"};
    return divided ? names[series] : "a pool slot";
}

static bool has(enum series series, const struct slot *slot)
{
    u32 index = (u32)(slot - slots);
    return index >= ranges[series].first && index < ranges[series].end;
}

enum series pool_series_of(u32 frame)
{
    const struct slot *slot = find_mapped(frame);
    enum series series = 0;
    while (series < SERIES_COUNT && !(slot && has(series, slot)))
        series++;
    return series;
}

static u32 count_held(const struct task *task, enum series series)
{
    u32 count = 0;
    for (const struct slot *slot = slots + ranges[series].first; slot < slots + ranges[series].end; slot++)
        count += slot->state == SLOT_HELD && (!task || slot->taker == task);
    return count;
}

u32 pool_held_by(const struct task *task, enum series series)
{
    return divided || series == SERIES_DEFAULT ? count_held(task, series) : 0;
}

u32 pool_held(enum series series) { return count_held(NULL, series); }
