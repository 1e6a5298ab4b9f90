/* Tasks: kernel threads and user processes, their life and their scheduling. */
#ifndef TASK_H
#define TASK_H

#include "cpus.h"
#include "fpu.h"
#include "space.h"
#include "trap.h"
#include "window.h"

enum task_state {
    TASK_FREE,
    TASK_RUNNABLE,
    TASK_WAITING,  /* until task_wake(channel) */
    TASK_SLEEPING, /* until ticks reaches wake_tick */
    TASK_ZOMBIE,   /* its status waits for the parent */
};

struct mutex;

struct task {
    struct space space; /* only if is_process */
    struct window_stack windows;
    struct fpu fpu; /* only if is_process */
    enum task_state state;
    bool is_process;
    u32 pid;
    const char *name;
    u32 children_met; /* of its children, or ended */
    bool has_met;     /* and is counted */
    struct task *parent; /* NULL: nobody will ask for the status */
    u32 status;
    u32 esp;       /* while switched away */
    u32 irq_depth; /* while switched away */
    struct cpu *cpu; /* where it runs, or ran last */
    bool stays;      /* there and nowhere else */
    u32 kernel_depth; /* how often it has taken the kernel's lock */
    u32 preemptions;
    bool makes_room; /* it is reclaiming: may take the last frames, and does not reclaim for itself */
    u32 gfp_denied;  /* what reclaim may not do for it: GFP_* (reclaim.h) */
    const volatile void *channel;
    const char *waits_for; /* what the channel stands for, where who waits has said so */
    struct mutex *mutexes; /* that it has */
    bool has_batch; /* pages off the lists, to make frames of them */
    u32 turns;   /* times that it was given a CPU */
    u32 wake_tick;
};

/* A status tells how a process ended: its own exit value 0..255, or this plus the vector that killed it. */
#define STATUS_KILLED 0x100
/* Killed because memory ran out, whatever the vector. */
#define STATUS_NO_MEMORY 0x200
/* Killed because a page could not be read back, or was not what had been written. */
#define STATUS_LOST_PAGE 0x300

/* Makes the running code task 1, and its window stack the current one. */
void task_init(void);
/* Gives a CPU that is to be started the task that it starts as; returns the top of its stack. 0 when there is none. */
u32 task_for_cpu(struct cpu *starting);

/* What a new process finds in EAX, EBX and ECX. */
struct arguments {
    u32 seed, scale, flags;
};

struct program;

/* Both return NULL when there is no free task or no memory. The caller is the parent. */
struct task *task_spawn(const struct program *program, const struct arguments *arguments);
struct task *task_start_thread(const char *name, void (*run)(u32), u32 argument);
/* The same, and it stays on this CPU. */
struct task *task_start_thread_here(const char *name, void (*run)(u32), u32 argument);

/* A copy of the current process that resumes at `frame` with 0 in EAX. Returns its pid, or 0. */
u32 task_fork(const struct trap_frame *frame);

void task_exit(u32 status) __attribute__((noreturn));

/* Counts the current task among those of its parent's children that have met, if it `meets`; how many these are. */
u32 task_meet(bool meets);
/* Waits for any child to end; returns its pid, or 0 if there is none. */
u32 task_wait_child(u32 *status);

/* Sleeps until task_wake with the same channel. The caller checks its condition again, which changes under the kernel's lock. */
void task_wait_on(const volatile void *channel);
/* The same, with a name for what is waited for; NULL: none. */
void task_wait_for(const char *what, const volatile void *channel);
/* For conditions that change without it: between these two whoever wakes the channel finds the task. schedule() then sleeps, unless it
 * has been woken already. */
void task_will_wait(const volatile void *channel);
void task_will_not_wait(void);
/* Sleeps while `condition` holds; whoever ends it wakes the channel after. */
#define task_wait_while(condition, on) \
    do {                               \
        while (condition) {            \
            task_will_wait(on);        \
            if (!(condition)) {        \
                task_will_not_wait();  \
                break;                 \
            }                          \
            schedule();                \
        }                              \
    } while (0)
void task_wake(const volatile void *channel);
/* Says that an interrupt will wake somebody: while one is to come, everybody may wait. Then that it has come, for who waits
 * on the channel, if anybody does. */
void task_expect(void);
void task_expected_came(const volatile void *channel);
void task_sleep(u32 for_ticks);

/* What a process left user mode with. */
const struct trap_frame *task_user_frame(const struct task *task);

/* Lets others run. */
void schedule(void);

#endif
