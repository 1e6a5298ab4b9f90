/* The FPU: x87, MMX and SSE registers, lent to one process at a time.
 *
 * Only workload `fpu` turns it on; without fpu_init CR0.EM stays set, and x87 in user code is #NM. */
#ifndef FPU_H
#define FPU_H

#include "types.h"

#define FPU_IMAGE_BYTES 512

/* A process's registers while another one's are in the CPU, as FXSAVE writes them. Part of its task. */
struct fpu {
    u8 image[FPU_IMAGE_BYTES] __attribute__((aligned(16)));
    bool used; /* the image says something */
};

/* How often registers went to another process than the last that took some. */
extern u32 fpu_takes;

/* False, and nothing changes, when the CPU has no FXSR or no SSE2. */
bool fpu_init(void);

/* #NM from user code: the registers become the current process's. False if the FPU is not on. */
bool fpu_take(void);

/* `to` runs next. */
void fpu_switch(const struct fpu *to);

/* Registers as FNINIT leaves them, for a new process. */
void fpu_reset(struct fpu *fpu);
/* A copy of the current process's registers, for its child. */
void fpu_fork(struct fpu *child);
/* The current process ends. */
void fpu_drop(void);

#endif
