/* A sampler: interrupts that nothing holds off, each of which walks the user stack of whatever it interrupted. */
#ifndef NMI_H
#define NMI_H

#include "cpus.h"
#include "trap.h"

/* Begins with `hz` samples a second, from the PIT; 0: none. */
void nmi_start(u32 hz);
/* Ends it. False if it went on long enough for many samples, and there was none, or of many not one whole stack. */
bool nmi_stop(void);

/* What a scene does in an NMI of its own, if it has one. */
extern void (*nmi_also)(struct cpu *self);

/* True if the NMI was a sample's, or a scene's. */
bool nmi_sample(const struct trap_frame *frame);

struct nmi_counts {
    u32 arrived; /* NMIs, one of a few of which is a sample */
    u32 samples, user, kernel, threads; /* of these: in user code, in the kernel on a process's behalf, in a thread */
    u32 frames;                         /* of user stacks, found in all */
    /* Walks that came to the outermost frame, to a page that is away, to the most frames that are walked, to nonsense. */
    u32 whole, absent, cut, broken;
};
/* Of all CPUs. */
struct nmi_counts nmi_total(void);

#endif
