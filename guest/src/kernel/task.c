/* Tasks: kernel threads and user processes, their life and their scheduling.
 *
 * Story: round robin over a fixed table, by each CPU from the task that it has. The timer only asks for a switch; it happens on the
 * way back to user mode. Kernel code runs until it waits or yields. When nobody can run, schedule() halts on the stack of whoever
 * called it; who is made runnable then has such a CPU called, by an interrupt.
 *
 *   a new task's stack      | struct trap_frame | edi esi ebx ebp | trap_return_first |  <- esp grows to the left
 *
 * Holds: a task's stack pages stay mapped for ever, so a slot's next task finds them; the lowest word of each stack holds
 * a mark that every switch checks. INV-G-TASK-1: a CPU is on the stack of its `task` (cpus.h), and no other is; a task that has a
 * CPU, holds windows or has to stay goes on there and nowhere else, and its slot is nobody else's before the CPU is off its stack.
 * Limits: a stack that overflows past its mark meets an absent page, and then there is no stack to report it on. */
#include "task.h"

#include "apic.h"
#include "check.h"
#include "desc.h"
#include "frames.h"
#include "image.h"
#include "irq.h"
#include "kpt.h"
#include "locks.h"
#include "tlb.h"

#define STACK_MARK 0x5ac7f00d
#define EFLAGS_FIXED (1u << 1)
#define EFLAGS_IF (1u << 9)

static struct task tasks[TASKS_MAX];
static struct lock tasks_lock;
/* Beyond the last that was ever in use. */
static struct task *tasks_end = tasks + 1;
static u32 last_pid;

/* For who has interrupts off; and for all. */
static inline void tasks_lock_take(void) { lock_take(&tasks_lock, LOCK_TASKS); }
static void send_calls(struct cpu *self);
static inline void tasks_lock_give(void)
{
    lock_give(&tasks_lock, LOCK_TASKS);
    if (cpu_self()->to_call)
        send_calls(cpu_self());
}

static inline void tasks_take(void)
{
    if (smp) {
        irq_off();
        tasks_lock_take();
    }
}

static inline void tasks_give(void)
{
    if (smp) {
        tasks_lock_give();
        irq_on();
    }
}

void switch_stacks(u32 *save_esp, u32 esp);
void task_first_run(void);

/* Stacks. Task 0 keeps the one that boot.S gave it. */

extern u32 boot_stack[];

static u32 *stack_bottom(const struct task *task)
{
    u32 index = (u32)(task - tasks);
    return index == 0 ? boot_stack : (u32 *)(STACKS_BASE + (index + 1) * STACK_STRIDE - STACK_PAGES * PAGE_SIZE);
}

static u32 stack_top(const struct task *task) { return (u32)stack_bottom(task) + STACK_PAGES * PAGE_SIZE; }

/* From now on its stack is that CPU's. */
static void put_on(struct task *task, struct cpu *on)
{
    task->cpu = on;
    stack_bottom(task)[STACK_WORD_CPU] = (u32)on;
}

static void back_stack(const struct task *task)
{
    u32 bottom = (u32)stack_bottom(task);
    for (u32 page = 0; page < STACK_PAGES; page++) {
        u32 va = bottom + page * PAGE_SIZE;
        if (!(kpt_get(va) & PTE_P))
            kpt_set(va, pte_make(frame_alloc_untracked(), kpt_data_bits()));
    }
}

/* Birth. */

void task_init(void)
{
    cpu_self()->task = &tasks[0];
    current->cpu = cpu_self();
    current->state = TASK_RUNNABLE;
    current->pid = ++last_pid;
    current->name = "main";
    own_stack()[STACK_WORD_MARK] = STACK_MARK;
    window_init(cpu_self(), &current->windows);
}

static bool has_a_cpu(const struct task *task) { return task->cpu && task->cpu->task == task; }

/* The kernel is held: others may free tasks meanwhile, but none claims one. */
static struct task *find_unused(void)
{
    struct task *found = NULL;
    tasks_take();
    for (struct task *task = tasks; task < tasks + TASKS_MAX && !found; task++)
        if (task->state == TASK_FREE && !has_a_cpu(task))
            found = task;
    if (found && found >= tasks_end)
        tasks_end = found + 1;
    tasks_give();
    return found;
}

static struct task *claim(const char *name)
{
    struct task *task = find_unused();
    if (task) {
        back_stack(task);
        stack_bottom(task)[STACK_WORD_MARK] = STACK_MARK;
        task->name = name;
        put_on(task, cpu_self());
        task->parent = current;
        task->is_process = false;
        task->stays = false;
        task->kernel_depth = 0;
        task->children_met = 0;
        task->has_met = false;
        task->preemptions = 0;
        task->makes_room = false;
        task->gfp_denied = 0;
        task->windows.depth = 0;
        task->waits_for = NULL;
        task->mutexes = NULL;
        task->has_batch = false;
        fpu_reset(&task->fpu);
    }
    return task;
}

static struct task *new_task(const char *name)
{
    struct task *task = claim(name);
    if (task)
        task->pid = ++last_pid;
    return task;
}

/* It has no number, and waits for nothing until it runs; the first that it does is to end (smp.c). */
u32 task_for_cpu(struct cpu *starting)
{
    struct task *task = claim("cpu");
    if (!task)
        return 0;
    task->pid = 0;
    task->parent = NULL;
    task->state = TASK_WAITING;
    task->channel = NULL;
    put_on(task, starting);
    starting->task = task;
    starting->irq_depth = 1;
    window_init(starting, &task->windows);
    return stack_top(task);
}

static struct trap_frame *first_frame(const struct task *task)
{
    return (struct trap_frame *)(stack_top(task) - sizeof(struct trap_frame));
}

const struct trap_frame *task_user_frame(const struct task *task) { return first_frame(task); }

/* Who goes on on one CPU alone. */
static bool must_stay(const struct task *task) { return has_a_cpu(task) || task->windows.depth || task->stays; }

/* LOCK_TASKS is held, here and below. A CPU that halts and may run the task: this one if it is such (an interrupt has come), else the one that ran it last. */
static struct cpu *find_idle_for(const struct task *task)
{
    struct cpu *self = cpu_self();
    if (must_stay(task) || (task->cpu->idle && !self->idle))
        return task->cpu->idle ? task->cpu : NULL;
    if (self->idle)
        return self;
    for (struct cpu *other = cpus; other < cpus_end; other++)
        if (other->idle)
            return other;
    return NULL;
}

/* Has an idle CPU look for something to do, if there is one. Those that are busy look when they are done. */
static void call_for(const struct task *task)
{
    struct cpu *found = find_idle_for(task);
    if (!found)
        return;
    found->idle = false;
    if (found != cpu_self())
        cpu_self()->to_call |= 1u << found->index;
}

static __attribute__((noinline)) void send_calls(struct cpu *self)
{
    u32 who = self->to_call;
    self->to_call = 0;
    for (const struct cpu *other = cpus; other < cpus_end; other++)
        if (who & 1u << other->index)
            apic_send(other->apic_id, VECTOR_LOOK);
}

static void make_runnable(struct task *task)
{
    task->state = TASK_RUNNABLE;
    if (smp)
        call_for(task);
}

/* Puts what switch_stacks expects below the task's first frame, and lets it run. */
static void start(struct task *task)
{
    u32 *stack = (u32 *)first_frame(task);
    *--stack = (u32)trap_return_first;
    for (u32 saved = 0; saved < 4; saved++)
        *--stack = 0;
    task->esp = (u32)stack;
    task->irq_depth = 1;
    tasks_take();
    make_runnable(task);
    tasks_give();
}

/* traps.S comes here on a task's first switch, before it leaves through its frame. */
void task_first_run(void)
{
    tasks_lock_give();
    if (smp && current->kernel_depth)
        kernel_spin();
    cpu_self()->irq_depth--;
}

struct task *task_spawn(const struct program *program, const struct arguments *arguments)
{
    struct task *task = new_task(program->name);
    if (!task || !space_create(&task->space))
        return NULL;
    u32 entry;
    struct region stack = {.start = USER_STACK_TOP - PAGE_SIZE,
                           .end = USER_STACK_TOP,
                           .flags = REGION_WRITE | REGION_GROWS_DOWN};
    if (!image_map(&task->space, program, &entry) || !space_map(&task->space, stack)) {
        space_destroy(&task->space);
        return NULL;
    }
    task->is_process = true;
    *first_frame(task) = (struct trap_frame){.eax = arguments->seed,
                                             .ebx = arguments->scale,
                                             .ecx = arguments->flags,
                                             .ds = USER_DS,
                                             .es = USER_DS,
                                             .eip = entry,
                                             .cs = USER_CS,
                                             .eflags = EFLAGS_IF | EFLAGS_FIXED,
                                             .user_esp = USER_STACK_TOP,
                                             .user_ss = USER_DS};
    start(task);
    return task;
}

static void thread_end(void) { task_exit(0); }

/* IRET within ring 0 leaves the frame's last two words on the stack: the first is a return address there. */
static struct task *start_thread(const char *name, void (*run)(u32), u32 argument, bool stays)
{
    struct task *task = new_task(name);
    if (!task)
        return NULL;
    task->stays = stays;
    *first_frame(task) = (struct trap_frame){.eax = argument,
                                             .ds = KERNEL_DS,
                                             .es = KERNEL_DS,
                                             .eip = (u32)run,
                                             .cs = KERNEL_CS,
                                             .eflags = EFLAGS_IF | EFLAGS_FIXED,
                                             .user_esp = (u32)thread_end};
    task->kernel_depth = 1;
    start(task);
    return task;
}

struct task *task_start_thread(const char *name, void (*run)(u32), u32 argument)
{
    return start_thread(name, run, argument, false);
}

struct task *task_start_thread_here(const char *name, void (*run)(u32), u32 argument)
{
    return start_thread(name, run, argument, true);
}

u32 task_fork(const struct trap_frame *frame)
{
    struct task *child = new_task(current->name);
    if (!child || !space_create(&child->space))
        return 0;
    if (!space_fork(&current->space, &child->space)) {
        space_destroy(&child->space);
        return 0;
    }
    child->is_process = true;
    fpu_fork(&child->fpu);
    *first_frame(child) = *frame;
    first_frame(child)->eax = 0;
    start(child);
    return child->pid;
}

/* Death. */

static void set_state(struct task *task, enum task_state state)
{
    tasks_take();
    task->state = state;
    tasks_give();
}

static void abandon_children(void)
{
    for (struct task *task = tasks; task < tasks_end; task++) {
        if (task->state == TASK_FREE || task->parent != current)
            continue;
        task->parent = NULL;
        if (task->state == TASK_ZOMBIE)
            set_state(task, TASK_FREE);
    }
}

u32 task_meet(bool meets)
{
    struct task *task = current;
    if (!task->parent)
        return 0;
    task->parent->children_met += meets && !task->has_met;
    task->has_met |= meets;
    return task->parent->children_met;
}

void task_exit(u32 status)
{
    irq_off();
    kernel_take();
    tlb_load(kpt_root());
    if (current->is_process)
        space_destroy(&current->space);
    fpu_drop();
    abandon_children();
    task_meet(true);
    current->status = status;
    set_state(current, current->parent ? TASK_ZOMBIE : TASK_FREE);
    if (current->parent)
        task_wake(current->parent);
    schedule();
    panic("a task that had ended ran again");
}

/* Any child, preferring one that has ended. */
static struct task *find_child(void)
{
    struct task *child = NULL;
    for (struct task *task = tasks; task < tasks_end; task++) {
        if (task->state == TASK_FREE || task->parent != current)
            continue;
        child = task;
        if (task->state == TASK_ZOMBIE)
            break;
    }
    return child;
}

u32 task_wait_child(u32 *status)
{
    struct task *child;
    while ((child = find_child())) {
        if (child->state == TASK_ZOMBIE) {
            *status = child->status;
            u32 pid = child->pid;
            set_state(child, TASK_FREE);
            return pid;
        }
        task_wait_on(current);
    }
    return 0;
}

/* Scheduling. */

void task_will_wait(const volatile void *channel)
{
    tasks_take();
    current->channel = channel;
    current->state = TASK_WAITING;
    tasks_give();
}

void task_will_not_wait(void) { set_state(current, TASK_RUNNABLE); }

/* Who has what the channel stands for changed under the kernel's lock, or this CPU's interrupts, comes between no look and this. */
void task_wait_on(const volatile void *channel)
{
    task_will_wait(channel);
    schedule();
}

void task_wait_for(const char *what, const volatile void *channel)
{
    current->waits_for = what;
    task_wait_on(channel);
    current->waits_for = NULL;
}

void task_wake(const volatile void *channel)
{
    tasks_take();
    for (struct task *task = tasks; task < tasks_end; task++)
        if (task->state == TASK_WAITING && task->channel == channel)
            make_runnable(task);
    tasks_give();
}

static volatile u32 expected;

void task_expect(void) { __sync_fetch_and_add(&expected, 1); }

void task_expected_came(const volatile void *channel)
{
    if (channel) {
        task_wake(channel);
        cpu_self()->need_resched = true;
    }
    __sync_fetch_and_sub(&expected, 1);
}

void task_sleep(u32 for_ticks)
{
    current->wake_tick = ticks + for_ticks;
    set_state(current, TASK_SLEEPING);
    schedule();
}

static bool may_run_here(const struct task *task) { return task->cpu == cpu_self() || !must_stay(task); }

static bool can_run(struct task *task)
{
    if (task->state == TASK_SLEEPING && (int)(ticks - task->wake_tick) >= 0)
        task->state = TASK_RUNNABLE;
    return task->state == TASK_RUNNABLE && may_run_here(task);
}

/* The next in turn after the current one, which itself comes last. */
static struct task *find_next(void)
{
    struct task *task = current;
    do {
        if (++task == tasks_end)
            task = tasks;
        if (can_run(task))
            return task;
    } while (task != current);
    return NULL;
}

/* Somebody sleeps, or runs on another CPU, or may run on another alone. */
static bool anyone_goes_on(void)
{
    for (struct task *task = tasks; task < tasks_end; task++)
        if (task->state == TASK_SLEEPING || task->state == TASK_RUNNABLE)
            return true;
    for (const struct cpu *other = cpus; other < cpus_end; other++)
        if (other != cpu_self() && !other->halted)
            return true;
    return false;
}

static void halt(void) { __asm__ volatile("sti; hlt; cli" : : : "memory"); }

/* Who makes somebody runnable after this has let go of the lock finds it idle, and its interrupt ends the halt. */
static void halt_without_lock(void)
{
    struct cpu *self = cpu_self();
    self->halted = self->idle = true;
    tasks_lock_give();
    halt();
    self->halted = false;
    fence();
    tlb_refresh(FLUSH_REFRESH_HALT);
    tasks_lock_take();
    self->idle = false;
}

static struct task *wait_for_next(void)
{
    struct task *next;
    while (!(next = find_next())) {
        if (!anyone_goes_on() && !expected)
            panic("every task waits for another");
        if (smp)
            halt_without_lock();
        else
            halt();
    }
    return next;
}

static u32 root_of(const struct task *task) { return task->is_process ? task->space.upt.cr3 : kpt_root(); }

/* What comes after switch_stacks may run on another CPU. */
static void switch_to(struct task *next)
{
    struct cpu *self = cpu_self();
    struct task *previous = self->task;
    ASSERT(stack_bottom(previous)[STACK_WORD_MARK] == STACK_MARK);
    previous->irq_depth = self->irq_depth;
    self->irq_depth = next->irq_depth;
    window_switch(&previous->windows, &next->windows);
    tlb_load(root_of(next));
    fpu_switch(&next->fpu);
    tss_set_stack(stack_top(next));
    put_on(next, self);
    next->turns++;
    self->task = next;
    switch_stacks(&previous->esp, next->esp);
}

/* LOCK_TASKS goes with the CPU: who was switched to lets go of it. */
void schedule(void)
{
    irq_off();
    if (smp && current->kernel_depth)
        kernel_release();
    ASSERT(!cpu_self()->locks);
    tasks_lock_take();
    cpu_self()->need_resched = false;
    struct task *next = wait_for_next();
    if (next != current)
        switch_to(next);
    tasks_lock_give();
    if (smp && current->kernel_depth)
        kernel_spin();
    irq_on();
}
