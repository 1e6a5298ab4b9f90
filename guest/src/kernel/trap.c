/* Traps: where each goes.
 *
 *   timer          tick, end of interrupt
 *   NMI            a sample, if the sampler is on (nmi.c)
 *   virtio         the devices are asked, end of interrupt
 *   look, flush    from another CPU: end of interrupt
 *   int 0x80       system call
 *   page fault     one that the access workload provoked: noted there
 *                  at a user address, from user code or user_copy: the address space may repair it
 *   no FPU         from user code: the registers may be lent to it
 *   the rest       from user code: kills the process; from kernel code: stops the guest
 *
 * Then, on the way back to user code only: switch if the timer asked for it. At last, among several CPUs, what is stale is
 * forgotten. Whoever needs a lock takes it: system calls the kernel's, but for a few; a fault mostly only that of its address space. */
#include "trap.h"

#include "access.h"
#include "apic.h"
#include "check.h"
#include "console.h"
#include "cpu.h"
#include "dump.h"
#include "fpu.h"
#include "irq.h"
#include "nmi.h"
#include "syscall.h"
#include "task.h"
#include "tick.h"
#include "tlb.h"
#include "virtio.h"

static const char *const names[] = {
    "divide error", "debug", "NMI", "breakpoint", "overflow", "bound range", "invalid opcode", "no coprocessor",
    "double fault", "coprocessor overrun", "invalid TSS", "segment not present", "stack fault",
    "general protection", "page fault", "reserved 15", "x87 error", "alignment check", "machine check",
    "SIMD error",
};

const char *trap_name(u32 vector) { return vector < ARRAY_SIZE(names) ? names[vector] : "unknown exception"; }

static void timer_interrupt(void)
{
    if (cpu_self()->index == 0) {
        u32 depth = window_irq_enter();
        tick();
        window_irq_leave(depth);
    }
    cpu_self()->need_resched = true;
    apic_end_of_interrupt();
}

static void device_interrupt(void)
{
    u32 depth = window_irq_enter();
    virtio_interrupt();
    window_irq_leave(depth);
    apic_end_of_interrupt();
}

/* What another CPU wants of this one, whatever it is doing. A CPU that is called to look has halted, and looks
 * when it goes on. */
static bool answer(u32 vector)
{
    if (vector != VECTOR_LOOK && vector != VECTOR_FLUSH)
        return false;
    if (vector == VECTOR_FLUSH)
        tlb_serve(cpu_self());
    apic_end_of_interrupt();
    return true;
}

static const char *status_text(u32 status, u32 vector)
{
    switch (status) {
    case STATUS_NO_MEMORY: return "out of memory";
    case STATUS_LOST_PAGE: return "its page is lost";
    default: return trap_name(vector);
    }
}

/* The process cannot go on. The line says nothing that differs between machines. */
static void kill(const struct trap_frame *frame, u32 cr2, u32 status)
{
    kernel_take();
    printk("pager: process %u (%s) killed: %s", current->pid, current->name, status_text(status, frame->vector));
    if (frame->vector == TRAP_PAGE_FAULT)
        printk(", %s of %08x, %s", fault_access_text(frame->error), cr2, fault_reason_text(frame->error));
    printk("\n");
    task_exit(status);
}

static u32 killed_by(enum fault_result result)
{
    switch (result) {
    case FAULT_OUT_OF_MEMORY: return STATUS_NO_MEMORY;
    case FAULT_LOST: return STATUS_LOST_PAGE;
    default: return STATUS_KILLED + TRAP_PAGE_FAULT;
    }
}

static void page_fault(struct trap_frame *frame)
{
    u32 cr2 = read_cr2();
    if (access_armed && access_fault(frame, cr2))
        return;
    bool user = trap_from_user(frame), copying = frame->eip == (u32)user_copy_access;
    if (!(user || copying) || !current->is_process)
        die(frame, cr2);
    enum fault_result result = space_fault(&current->space, cr2, frame->error);
    if (result == FAULT_FIXED)
        return;
    if (copying && !user)
        frame->eip = (u32)user_copy_failed;
    else
        kill(frame, cr2, killed_by(result));
}

static void exception(struct trap_frame *frame)
{
    bool users_own = trap_from_user(frame) && frame->vector != TRAP_NMI && frame->vector != TRAP_DOUBLE_FAULT;
    if (!users_own)
        die(frame, read_cr2());
    kill(frame, 0, STATUS_KILLED + frame->vector);
}

static void no_fpu(struct trap_frame *frame)
{
    if (!trap_from_user(frame) || !fpu_take())
        exception(frame);
}

static void preempt(void)
{
    current->preemptions++;
    schedule();
}

/* Inline, since a machine of one CPU does nothing else. */
static inline __attribute__((always_inline)) void handle(struct trap_frame *frame)
{
    cpu_self()->irq_depth++;
    switch (frame->vector) {
    case VECTOR_TIMER: timer_interrupt(); break;
    case VECTOR_VIRTIO: device_interrupt(); break;
    case VECTOR_SYSCALL: syscall_dispatch(frame); break;
    case TRAP_PAGE_FAULT: page_fault(frame); break;
    case TRAP_NO_FPU: no_fpu(frame); break;
    default: exception(frame); break;
    }
    if (trap_from_user(frame)) {
        ASSERT(window_depth() == 0);
        if (cpu_self()->need_resched)
            preempt();
    }
    cpu_self()->irq_depth--;
}

static __attribute__((noinline)) void handle_among_others(struct trap_frame *frame)
{
    if (!answer(frame->vector))
        handle(frame);
    /* A look has ended a halt, which has a refresh of its own. */
    if (frame->vector != VECTOR_LOOK)
        tlb_refresh(FLUSH_REFRESH_TRAP);
}

void trap_dispatch(struct trap_frame *frame)
{
    /* It may have come anywhere, also to the code below: nothing of that may be done for it. */
    if (frame->vector == TRAP_NMI && nmi_sample(frame))
        return;
    if (smp)
        handle_among_others(frame);
    else
        handle(frame);
}
