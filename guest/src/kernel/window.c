/* The temporary window.
 *
 * Story: high frames have no address of their own. A mapping claims the next slot of the CPU, writes its page-table entry and
 * flushes that one page; a release clears the entry and leaves the flush to the slot's next user, so a map-and-release costs
 * one INVLPG. Low frames claim a slot too, so that order and depth are checked alike, but are reached where they are.
 *
 * Holds: a CPU has slots of its own, so what another's TLB remembers of one is nobody's business; a task that holds some stays on
 * its CPU. Slot i is mapped only while i < depth. A slot is claimed before its entry is written and given back after it was
 * cleared, so an interrupt in between takes the next one and no interrupt needs to be held off. No task has gone deeper than
 * the high-water mark, which is no deeper than it may go.
 * Locks: none; never sleeps. */
#include "window.h"

#include "check.h"
#include "console.h"
#include "cpu.h"
#include "frames.h"
#include "kpt.h"
#include "omit.h"
#include "rule.h"

static u32 high_water READ_MOSTLY;

/* While tags are collected the high-water mark stays 0, and every mapping goes deeper than that. */
#define TAGS_MAX 64
static bool collects;
static const char *tags[TAGS_MAX];
static u32 tag_count, deepest[CLASS_COUNT];
static u32 entered_at[CPUS_MAX][CLASS_COUNT]; /* the depth at which a class's handler began */

static enum window_class class_of(const struct cpu *self)
{
    switch (self->window_depth_max) {
    case WINDOW_TASK_DEPTH_MAX: return CLASS_TASK;
    case WINDOW_TASK_DEPTH_MAX + WINDOW_IRQ_DEPTH_MAX: return CLASS_IRQ;
    default: return CLASS_NMI;
    }
}

static void collect(const struct cpu *self, const char *tag, u32 slot)
{
    u32 at = 0;
    enum window_class class = class_of(self);
    while (at < tag_count && tags[at] != tag)
        at++;
    if (at == tag_count && tag_count < TAGS_MAX)
        tags[tag_count++] = tag;
    deepest[class] = max_u32(deepest[class], slot + 1 - entered_at[self->index][class]);
}

_Static_assert(WINDOW_DUMP_SLOT < WINDOW_SLOTS && WINDOW_BASE + CPUS_MAX * WINDOW_SLOTS * PAGE_SIZE <= POOL_BASE, "");

static inline u32 slot_address(const struct cpu *self, u32 slot) { return self->window_base + slot * PAGE_SIZE; }
static inline void slot_clear(u32 address) { table_clear(paging.pae, top_tables, top_index(address)); }

static inline __attribute__((always_inline)) void slot_map(u32 address, u32 frame)
{
    table_enter(paging.pae, top_tables, top_index(address), pte_make(frame, kpt_data_bits()));
    if (flush_kept(FLUSH_WINDOW))
        invlpg(address);
}

/* A slot deeper than any before; in an interrupt, any beyond the deepest of a task. */
static __attribute__((noinline)) void go_deeper(const struct cpu *self, u32 slot, u32 frame, const char *why)
{
    if (slot >= self->window_depth_max)
        rule_broken("nesting", "window overflow: mapping frame %x for \"%s\" at depth %u", frame, why, slot);
    if (collects)
        collect(self, why, slot);
    else if (self->window_depth_max == WINDOW_TASK_DEPTH_MAX)
        high_water = slot + 1;
}

void *window_map(struct cpu *self, u32 frame, const char *why)
{
    struct window_stack *stack = self->windows;
    u32 slot = stack->depth++;
    barrier();
    if (slot >= high_water)
        go_deeper(self, slot, frame, why);
    bool low = frame_is_low(frame);
    void *address = low ? low_address(frame) : (void *)slot_address(self, slot);
    stack->entries[slot] = (struct window_entry){frame, address, why};
    if (!low)
        slot_map((u32)address, frame);
    return address;
}

static inline enum window_error release(struct cpu *self, const void *address)
{
    struct window_stack *stack = self->windows;
    if (stack->depth == 0)
        return WINDOW_EMPTY;
    u32 slot = stack->depth - 1;
    if (stack->entries[slot].address != address && rule_kept(RULE_LAST_FIRST))
        return WINDOW_OUT_OF_ORDER;
    if ((u32)address >= WINDOW_BASE) /* else it is that of a low frame */
        slot_clear((u32)address);
    barrier();
    stack->depth = slot;
    return WINDOW_OK;
}

enum window_error window_release(const void *address) { return release(cpu_self(), address); }

void window_unmap(struct cpu *self, const void *address)
{
    if (release(self, address) != WINDOW_OK)
        panic("window release of %08x is not that of the newest mapping", (u32)address);
}

u32 window_high_water(void) { return high_water; }
void window_reset_high_water(void) { high_water = 0; }

void window_collect_tags(void)
{
    collects = true;
    high_water = 0;
}
u32 window_tags(void) { return tag_count; }
u32 window_deepest(enum window_class class) { return deepest[class]; }

static const char *const type_tags[TYPE_COUNT] = {"user 0", "user 1"};

#define TYPED_SLOT(type) (WINDOW_DUMP_SLOT + 1 + (type))
_Static_assert(TYPED_SLOT(TYPE_COUNT) <= WINDOW_SLOTS, "");

void *window_map_typed(u32 frame, enum window_type type)
{
    if (rule_kept(RULE_STACK))
        return kmap_local(frame, type_tags[type]);
    u32 address = slot_address(cpu_self(), TYPED_SLOT(type));
    slot_map(address, frame);
    return (void *)address;
}

enum window_error window_release_typed(const void *address, enum window_type type)
{
    if (rule_kept(RULE_STACK))
        return window_release(address);
    u32 named = slot_address(cpu_self(), TYPED_SLOT(type));
    slot_clear(named);
    return (u32)address == named ? WINDOW_OK : WINDOW_WRONG_TYPE;
}

bool window_is_mapped(const void *address) { return kpt_get((u32)address) & PTE_P; }

static u32 enter(struct cpu *self, u32 share)
{
    self->window_depth_max += share;
    entered_at[self->index][class_of(self)] = self->windows->depth;
    return self->windows->depth;
}

static void leave(struct cpu *self, u32 share, u32 depth_at_entry, const char *what)
{
    if (self->windows->depth != depth_at_entry)
        panic("%s handler entered at window depth %u and left at %u", what, depth_at_entry, self->windows->depth);
    self->window_depth_max -= share;
}

u32 window_irq_enter(void) { return enter(cpu_self(), WINDOW_IRQ_DEPTH_MAX); }
void window_irq_leave(u32 depth_at_entry) { leave(cpu_self(), WINDOW_IRQ_DEPTH_MAX, depth_at_entry, "interrupt"); }
static u32 nmi_share(void) { return rule_kept(RULE_NMI_SHARE) ? WINDOW_NMI_DEPTH_MAX : 0; }
u32 window_nmi_enter(struct cpu *self) { return enter(self, nmi_share()); }
void window_nmi_leave(struct cpu *self, u32 depth_at_entry) { leave(self, nmi_share(), depth_at_entry, "NMI"); }

void window_init(struct cpu *self, struct window_stack *stack)
{
    self->windows = stack;
    self->window_base = WINDOW_BASE + self->index * WINDOW_SLOTS * PAGE_SIZE;
    self->window_depth_max = WINDOW_TASK_DEPTH_MAX;
}

void window_switch(const struct window_stack *from, struct window_stack *to)
{
    bool moves = rule_kept(RULE_SWITCH);
    for (u32 slot = 0; moves && slot < from->depth; slot++)
        slot_clear(slot_address(cpu_self(), slot));
    cpu_self()->windows = to;
    for (u32 slot = 0; moves && slot < to->depth; slot++)
        if ((u32)to->entries[slot].address == slot_address(cpu_self(), slot))
            slot_map(slot_address(cpu_self(), slot), to->entries[slot].frame);
}

void *window_map_for_dump(u32 frame)
{
    u32 address = slot_address(cpu_self(), WINDOW_DUMP_SLOT);
    slot_clear(address);
    slot_map(address, frame);
    return (void *)address;
}

void window_dump_stack(void)
{
    const struct window_stack *stack = cpu_self()->windows;
    if (!stack)
        return;
    u32 depth = min_u32(stack->depth, WINDOW_DEPTH_MAX);
    printk("windows held: %u\n", stack->depth);
    for (u32 i = 0; i < depth; i++)
        printk("  %u: frame %05x at %08x for \"%s\"\n", i, stack->entries[i].frame, (u32)stack->entries[i].address,
               stack->entries[i].why);
}
