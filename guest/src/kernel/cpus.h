/* The CPUs, and the kernel's lock.
 *
 * Which CPU code runs on, its stack tells: the second word of each stack names the CPU that is on it. Kernel code is not preempted, so
 * this changes only where it sleeps. What a CPU and a task have of their own needs no lock; locks.h has those for the rest. */
#ifndef CPUS_H
#define CPUS_H

#include "layout.h"
#include "types.h"

struct task;
struct fpu;
struct window_stack;

/* locks.h */
struct lock {
    struct cpu *volatile owner;
};

/* Translations that one CPU wants another to forget; tlb.c has the protocol. */
#define FLUSH_PAGES_MAX 8
struct flush_request {
    volatile bool wanted;
    u32 count; /* more than FLUSH_PAGES_MAX: all that are not global */
    u32 pages[FLUSH_PAGES_MAX];
};

/* Changed by the CPU itself, if nothing else is said. What it changes all the time is in other lines of the caches than what others look
 * at all the time. */
struct cpu {
    struct task *task;            /* on whose stack it is: `current` */
    u32 irq_depth;                /* irq.h */
    bool need_resched;            /* the next return to user mode switches */
    struct window_stack *windows; /* of its task */
    u32 window_base;              /* of its slots */
    u32 window_depth_max;         /* how deep who runs now may go; an NMI changes it and puts it back */
    u32 locks;                    /* that it has, a bit for each level (locks.h) */
    u32 flushes_sent, flushes;    /* requests to others, and served */
    u32 faults;                   /* at user addresses that were somebody's to mend */
    u32 to_call;                  /* those that an interrupt is to have look for something to do, once LOCK_TASKS is let go of */
    bool fpu_on, fpu_closed;      /* its FPU is set up; its CR0.TS is set */
    struct fpu *fpu_owner;        /* whose registers it has */
    u32 index OWN_LINE;
    u32 apic_id;
    volatile u32 loaded_root;     /* what CR3 holds */
    volatile bool halted;         /* it uses no translation of user memory before it has looked at `stale` */
    volatile bool stale;          /* it forgets what is not global before its next trap ends, or when it goes on; set by others */
    volatile bool called;         /* somebody's request for it is wanted; set by others */
    volatile bool idle;           /* halted, and nobody has called it; LOCK_TASKS */
    volatile bool up, admitted;   /* it runs kernel code; it may go on, which another says (smp.c) */
    struct flush_request flush[CPUS_MAX] OWN_LINE; /* of each other one; `wanted` is cleared by that one */
};

extern struct cpu cpus[CPUS_MAX];
/* Beyond the last that runs. */
extern struct cpu *cpus_end;
/* There is more than one: nothing that this is about is done where there is not. */
extern bool smp;

/* The stack that this runs on: the lowest of its pages. */
static inline u32 *own_stack(void)
{
    u32 esp;
    __asm__("mov %%esp, %0" : "=r"(esp));
    return (u32 *)(ALIGN_DOWN(esp, STACK_STRIDE) + STACK_STRIDE - STACK_PAGES * PAGE_SIZE);
}

/* The CPU that this runs on. */
static inline struct cpu *cpu_self(void) { return (struct cpu *)own_stack()[STACK_WORD_CPU]; }

#define current (cpu_self()->task)

/* The kernel's lock, which belongs to a task: it may be taken once more by who has it, and schedule() lets go of it for as long as the
 * task sleeps. */
void kernel_spin(void);
void kernel_release(void);
void kernel_take_by_task(void);
void kernel_give_by_task(void);
bool has_kernel(void);

static inline void kernel_take(void)
{
    if (smp)
        kernel_take_by_task();
}

static inline void kernel_give_back(void)
{
    if (smp)
        kernel_give_by_task();
}

/* Around long work on the contents of a page that nobody else may come to now: whoever has the kernel lets others have it. Who does
 * not have it does nothing here. */
static inline void kernel_lend(void)
{
    if (smp && has_kernel())
        kernel_release();
}

static inline void kernel_regain(void)
{
    if (smp && has_kernel())
        kernel_spin();
}

/* From here on there is more than one CPU, and this one has the kernel. */
void kernel_become_smp(void);

/* What was written before is seen by others before what is read after is read. */
static inline void fence(void) { __asm__ volatile("lock addl $0, (%%esp)" : : : "memory", "cc"); }

static inline void pause(void) { __asm__ volatile("pause" : : : "memory"); }

#endif
