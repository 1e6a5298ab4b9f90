/* The CPUs, and who has the kernel. See cpus.h.
 *
 * Holds: INV-G-CPU-1: kernel data is touched only by the CPU that `cpu` names, but for what NMIs read (nmi.c), what cpus.h says of
 * single fields, and the contents of pages that are marked as being worked on. INV-G-CPU-2: a CPU that has the kernel waits for no
 * other but in tlb_finish, and one that waits for the kernel serves what that one waits for.
 * Limits: whoever comes first gets it, in no order; a CPU that a host has put aside delays only itself then. */
#include "cpus.h"

#include "cpu.h"
#include "task.h"
#include "tlb.h"

struct cpu cpus[CPUS_MAX] = {{.irq_depth = 1}}; /* boot.S left interrupts off */
struct cpu *cpu = &cpus[0];
struct cpu *cpus_end = &cpus[1];
bool smp;

static bool try_to_take(struct cpu *self) { return __sync_bool_compare_and_swap(&cpu, NULL, self); }

bool kernel_take(void)
{
    struct cpu *self = cpu_self();
    if (*(struct cpu *volatile *)&cpu == self)
        return false;
    while (!try_to_take(self))
        while (*(struct cpu *volatile *)&cpu) {
            tlb_serve(self);
            pause();
        }
    tlb_refresh();
    return true;
}

void kernel_give_back(void)
{
    barrier();
    *(struct cpu *volatile *)&cpu = NULL;
}
