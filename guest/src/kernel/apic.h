/* Interrupt controllers: everything masked but the LAPIC's timer and what drivers ask for. */
#ifndef APIC_H
#define APIC_H

#include "types.h"

/* Timer interrupts since boot. */
extern volatile u32 ticks;

/* Masks the 8259s and the IOAPICs, enables the LAPIC. Needs kpt_init. */
void apic_init(void);
/* Enables the LAPIC of another CPU, which runs this itself. */
void apic_init_local(void);
u32 apic_id(void);
/* Interrupts another CPU. */
void apic_send(u32 id, u32 vector);
void apic_send_nmi(u32 id);
/* INIT, which makes a CPU wait for a startup; and a startup, in real mode at a page below 1 MiB. */
void apic_send_init(u32 id);
void apic_send_startup(u32 id, u32 page);
/* Waits, by the timer, which must not be running. */
void apic_delay(u32 microseconds);
/* Starts the periodic timer: `hz` interrupts a second. */
void apic_timer_start(u32 hz);
void apic_end_of_interrupt(void);
/* Has the PIT's channel 0 give NMIs, to every CPU, or nothing. */
void apic_pit_as_nmi(bool on);
/* Lets the interrupts of a virtio transport come, by VECTOR_VIRTIO. */
void apic_unmask_virtio(u32 slot);

#endif
