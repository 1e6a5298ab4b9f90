/* The CPUs, and who has the kernel.
 *
 * Kernel code runs on one CPU at a time. `cpu` is both the lock and the way to what belongs to the CPU that has it: NULL while
 * nobody has. A trap takes the kernel unless it interrupts kernel code that has it, and gives it back on the way out; a CPU that
 * has nothing to do gives it back while it halts. */
#ifndef CPUS_H
#define CPUS_H

#include "layout.h"
#include "types.h"

struct task;
struct fpu;
struct window_stack;

/* Translations that a CPU is to forget; tlb.c has the protocol. */
#define FLUSH_PAGES_MAX 8
struct flush_request {
    volatile bool wanted;
    u32 count; /* more than FLUSH_PAGES_MAX: all that are not global */
    u32 pages[FLUSH_PAGES_MAX];
};

/* Changed by the CPU itself while it has the kernel, if nothing else is said. */
struct cpu {
    u32 index, apic_id;
    struct task *task;            /* on whose stack it is: `current` */
    u32 irq_depth;                /* irq.h */
    bool need_resched;            /* the next return to user mode switches */
    struct window_stack *windows; /* of its task */
    u32 window_base;              /* of its slots */
    u32 window_depth_max;         /* how deep who runs now may go; an NMI changes it and puts it back */
    u32 loaded_root;              /* what CR3 holds */
    bool halted;                  /* it does nothing, and takes the kernel before it does anything */
    bool stale;                   /* forgets what is not global when it next takes the kernel; by whoever has the kernel */
    struct flush_request flush;   /* by whoever has the kernel, but `wanted`, which this CPU clears without */
    u32 flushes;                  /* requests served; without the kernel */
    bool fpu_on, fpu_closed;      /* its FPU is set up; its CR0.TS is set */
    struct fpu *fpu_owner;        /* whose registers it has */
    volatile bool idle;           /* halted, and nobody has called it; cleared by who calls */
    volatile bool up, admitted;   /* it runs kernel code; it may go on (smp.c) */
};

extern struct cpu cpus[CPUS_MAX];
extern struct cpu *cpu;
/* Beyond the last that runs. */
extern struct cpu *cpus_end;
/* There is more than one: nothing that this is about is done where there is not. */
extern bool smp;

#define current (cpu->task)

/* Which CPU this is, by its stack: for code that does not have the kernel. */
struct cpu *cpu_self(void);

/* Takes the kernel; false if this CPU has it. While it waits it serves flush requests: interrupts may be off. */
bool kernel_take(void);
void kernel_give_back(void);

/* Around long work on the contents of a page that nobody else may come to now; others may have the kernel meanwhile. Whoever does it
 * reaches the page by a window of this CPU, looks at nothing else that others change, and does not sleep. */
static inline void kernel_lend(void)
{
    if (smp)
        kernel_give_back();
}

static inline void kernel_regain(void)
{
    if (smp)
        kernel_take();
}

static inline void pause(void) { __asm__ volatile("pause" : : : "memory"); }

#endif
