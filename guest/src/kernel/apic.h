/* Interrupt controllers: everything masked but the LAPIC's timer and what drivers ask for. */
#ifndef APIC_H
#define APIC_H

#include "types.h"

/* Timer interrupts since boot. */
extern volatile u32 ticks;

/* Masks the 8259s and the IOAPICs, enables the LAPIC. Needs kpt_init. */
void apic_init(void);
/* Starts the periodic timer: `hz` interrupts a second. */
void apic_timer_start(u32 hz);
void apic_end_of_interrupt(void);
/* Has the PIT's channel 0 give NMIs, or nothing. */
void apic_pit_as_nmi(bool on);
/* Lets the interrupts of a virtio transport come, by VECTOR_VIRTIO. */
void apic_unmask_virtio(u32 slot);

#endif
