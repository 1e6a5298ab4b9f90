/* Interrupts on and off, without ever reading IF.
 *
 * Story: traps arrive with interrupts off and run to their end that way; only kernel threads run with them on. A depth
 * counts the reasons why they are off; it belongs to the task and is switched with it.
 * Holds: IF is set if and only if the CPU's depth is 0 and it runs kernel code (but for the instruction between the two changes,
 * where an interrupt does no harm: it leaves the depth as it found it), and where it halts. */
#ifndef IRQ_H
#define IRQ_H

#include "cpus.h"

static inline void irq_off(void)
{
    if (cpu_self()->irq_depth++ == 0)
        __asm__ volatile("cli" : : : "memory");
}

static inline void irq_on(void)
{
    barrier();
    if (--cpu_self()->irq_depth == 0)
        __asm__ volatile("sti" : : : "memory");
}

#endif
