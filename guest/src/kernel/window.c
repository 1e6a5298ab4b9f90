/* The temporary window.
 *
 * Story: high frames have no address of their own. A mapping claims the next slot of the CPU, writes its page-table entry and
 * flushes that one page; a release clears the entry and leaves the flush to the slot's next user, so a map-and-release costs
 * one INVLPG. Low frames claim a slot too, so that order and depth are checked alike, but are reached where they are.
 *
 * Holds: slot i is mapped only while i < depth. A slot is claimed before its entry is written and given back after it was
 * cleared, so an interrupt in between takes the next one and no interrupt needs to be held off. No task has gone deeper than
 * the high-water mark, which is no deeper than it may go.
 * Locks: none; never sleeps. */
#include "window.h"

#include "check.h"
#include "console.h"
#include "cpu.h"
#include "frames.h"
#include "kpt.h"

struct window_stack *current_windows;
static u32 depth_max = WINDOW_TASK_DEPTH_MAX; /* of the context that runs now */
static u32 high_water;

static u32 slot_address(u32 slot) { return WINDOW_BASE + slot * PAGE_SIZE; }

static u32 slot_index(u32 slot) { return top_index(WINDOW_BASE) + slot; }
static void slot_clear(u32 slot) { table_clear(paging.pae, top_tables, slot_index(slot)); }

static inline __attribute__((always_inline)) void slot_map(u32 slot, u32 frame)
{
    table_enter(paging.pae, top_tables, slot_index(slot), pte_make(frame, kpt_data_bits()));
    invlpg(slot_address(slot));
}

/* A slot deeper than any before; in an interrupt, any beyond the deepest of a task. */
static __attribute__((noinline)) void go_deeper(u32 slot, u32 frame, const char *why)
{
    if (slot >= depth_max)
        panic("window overflow: mapping frame %x for \"%s\" at depth %u", frame, why, slot);
    if (depth_max == WINDOW_TASK_DEPTH_MAX)
        high_water = slot + 1;
}

void *kmap_local(u32 frame, const char *why)
{
    struct window_stack *stack = current_windows;
    u32 slot = stack->depth++;
    barrier();
    if (slot >= high_water)
        go_deeper(slot, frame, why);
    bool low = frame_is_low(frame);
    void *address = low ? low_address(frame) : (void *)slot_address(slot);
    stack->entries[slot] = (struct window_entry){frame, address, why};
    if (!low)
        slot_map(slot, frame);
    return address;
}

enum window_error window_release(const void *address)
{
    struct window_stack *stack = current_windows;
    if (stack->depth == 0)
        return WINDOW_EMPTY;
    u32 slot = stack->depth - 1;
    if (stack->entries[slot].address != address)
        return WINDOW_OUT_OF_ORDER;
    if ((u32)address == slot_address(slot))
        slot_clear(slot);
    barrier();
    stack->depth = slot;
    return WINDOW_OK;
}

void kunmap_local(const void *address)
{
    if (window_release(address) != WINDOW_OK)
        panic("window release of %08x is not that of the newest mapping", (u32)address);
}

u32 window_high_water(void) { return high_water; }
void window_reset_high_water(void) { high_water = 0; }

static u32 enter(u32 share)
{
    depth_max += share;
    return current_windows->depth;
}

static void leave(u32 share, u32 depth_at_entry, const char *what)
{
    if (current_windows->depth != depth_at_entry)
        panic("%s handler entered at window depth %u and left at %u", what, depth_at_entry, current_windows->depth);
    depth_max -= share;
}

u32 window_irq_enter(void) { return enter(WINDOW_IRQ_DEPTH_MAX); }
void window_irq_leave(u32 depth_at_entry) { leave(WINDOW_IRQ_DEPTH_MAX, depth_at_entry, "interrupt"); }
u32 window_nmi_enter(void) { return enter(WINDOW_NMI_DEPTH_MAX); }
void window_nmi_leave(u32 depth_at_entry) { leave(WINDOW_NMI_DEPTH_MAX, depth_at_entry, "NMI"); }

void window_init(struct window_stack *stack) { current_windows = stack; }

void window_switch(const struct window_stack *from, struct window_stack *to)
{
    for (u32 slot = 0; slot < from->depth; slot++)
        slot_clear(slot);
    current_windows = to;
    for (u32 slot = 0; slot < to->depth; slot++)
        if ((u32)to->entries[slot].address == slot_address(slot))
            slot_map(slot, to->entries[slot].frame);
}

void *window_map_for_dump(u32 frame)
{
    slot_clear(WINDOW_DUMP_SLOT);
    slot_map(WINDOW_DUMP_SLOT, frame);
    return (void *)slot_address(WINDOW_DUMP_SLOT);
}

void window_dump_stack(void)
{
    if (!current_windows)
        return;
    u32 depth = min_u32(current_windows->depth, WINDOW_DEPTH_MAX);
    printk("windows held: %u\n", current_windows->depth);
    for (u32 i = 0; i < depth; i++)
        printk("  %u: frame %05x at %08x for \"%s\"\n", i, current_windows->entries[i].frame,
               (u32)current_windows->entries[i].address, current_windows->entries[i].why);
}
