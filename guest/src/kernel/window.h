/* The temporary window: kmap_local, a stack of mappings for every execution context.
 *
 * kmap_local(frame, why) maps a frame until kunmap_local of the same address. Mappings nest and are released strictly in
 * reverse; they never sleep; a task may be switched away while it holds some. `why` is for diagnostics only. */
#ifndef WINDOW_H
#define WINDOW_H

#include "cpus.h"
#include "layout.h"
#include "types.h"

struct window_entry {
    u32 frame;
    void *address;
    const char *why;
};

/* The mappings that a context holds; part of its task. An interrupt uses the stack of whom it interrupts. */
struct window_stack {
    u32 depth;
    struct window_entry entries[WINDOW_DEPTH_MAX];
};

enum window_error { WINDOW_OK, WINDOW_EMPTY, WINDOW_OUT_OF_ORDER, WINDOW_WRONG_TYPE };

static inline void *kmap_local(u32 frame, const char *why);
/* A wrong release is a bug of the kernel's: the stack is printed and the guest stops. */
static inline void kunmap_local(const void *address);
/* The same, but a wrong release changes nothing and is reported: for whoever tests the rule. */
enum window_error window_release(const void *address);

/* What callers said before the stack, when each type had a slot of its own; here beyond those of the stack. Now a tag. */
enum window_type { TYPE_USER0, TYPE_USER1, TYPE_COUNT };
void *window_map_typed(u32 frame, enum window_type type);
enum window_error window_release_typed(const void *address, enum window_type type);
bool window_is_mapped(const void *address);

/* Those of the context that runs now. */
static inline u32 window_depth(void) { return cpu_self()->windows->depth; }
/* The deepest any task has been since boot, or since the last call of window_reset_high_water. */
u32 window_high_water(void);
void window_reset_high_water(void);
/* From now on the tags of mappings are collected, and how deep each class of context goes beyond what it interrupts. */
enum window_class { CLASS_TASK, CLASS_IRQ, CLASS_NMI, CLASS_COUNT };
void window_collect_tags(void);
/* How many different tags there were. */
u32 window_tags(void);
u32 window_deepest(enum window_class class);

/* Around an interrupt handler: allows it its share of depth, and checks that it released what it mapped. */
u32 window_irq_enter(void);
void window_irq_leave(u32 depth_at_entry);

/* The same around an NMI's, on top of either; the CPU need not have the kernel. */
u32 window_nmi_enter(struct cpu *self);
void window_nmi_leave(struct cpu *self, u32 depth_at_entry);

/* Names the first context of a CPU. */
void window_init(struct cpu *self, struct window_stack *stack);
/* Moves the CPU's slots from one context's mappings to another's. */
void window_switch(const struct window_stack *from, struct window_stack *to);

/* Maps any frame in the slot reserved for crash dumps, whatever state the stack is in. */
void *window_map_for_dump(u32 frame);
void window_dump_stack(void);

/* By the CPU that runs this, whether or not it has the kernel. */
void *window_map(struct cpu *self, u32 frame, const char *why);
void window_unmap(struct cpu *self, const void *address);

static inline void *kmap_local(u32 frame, const char *why) { return window_map(cpu_self(), frame, why); }
static inline void kunmap_local(const void *address) { window_unmap(cpu_self(), address); }

#endif
