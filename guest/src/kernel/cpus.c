/* The CPUs, and the kernel's lock. See cpus.h.
 *
 * Holds: INV-G-CPU-1: a task has the kernel's lock, on whatever CPU it is, while its kernel_depth is not 0 and it neither sleeps nor
 * has lent it. */
#include "cpus.h"

#include "locks.h"
#include "task.h"

struct cpu cpus[CPUS_MAX] = {{.irq_depth = 1}}; /* boot.S left interrupts off */
struct cpu *cpus_end READ_MOSTLY = &cpus[1];
bool smp READ_MOSTLY;

static struct lock kernel_lock;

void kernel_spin(void) { lock_spin(&kernel_lock, LOCK_KERNEL); }
void kernel_release(void) { lock_release(&kernel_lock, LOCK_KERNEL); }

void kernel_take_by_task(void)
{
    if (current->kernel_depth++ == 0)
        kernel_spin();
}

void kernel_give_by_task(void)
{
    if (--current->kernel_depth == 0)
        kernel_release();
}

bool has_kernel(void) { return current->kernel_depth; }

void kernel_become_smp(void)
{
    smp = true;
    kernel_take();
}
