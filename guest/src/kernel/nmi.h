/* A sampler: interrupts that nothing holds off, each of which walks the user stack of whatever it interrupted. */
#ifndef NMI_H
#define NMI_H

#include "trap.h"

/* Begins with `hz` samples a second, from the PIT; 0: none. nmi_stop ends it. */
void nmi_start(u32 hz);
void nmi_stop(void);

/* True if the NMI was a sample's. */
bool nmi_sample(const struct trap_frame *frame);

struct nmi_counts {
    u32 samples, user, kernel, threads; /* of these: in user code, in the kernel on a process's behalf, in a thread */
    u32 frames;                         /* of user stacks, found in all */
    u32 whole, absent, broken;          /* walks that came to the outermost frame, to a page that is away, to nonsense */
};
/* Of all CPUs. */
struct nmi_counts nmi_total(void);

#endif
