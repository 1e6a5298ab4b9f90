/* Starting the other CPUs. */
#ifndef SMP_H
#define SMP_H

/* Starts those that boot.cpu_count allows. Needs task_init and apic_init, and the LAPIC's timer for itself. */
void smp_start(void);
/* What they did, where there are any. */
void smp_print_counts(void);

#endif
