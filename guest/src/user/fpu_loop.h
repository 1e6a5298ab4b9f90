/* Registers full of numbers, and steps that keep all of them moving. Also read by the assembler. */
#ifndef FPU_LOOP_H
#define FPU_LOOP_H

/* Offsets in struct fpu_numbers. */
#define FPU_CONTROL 0
#define FPU_MXCSR 4
#define FPU_STATUS 8
#define FPU_X87 16
#define FPU_XMM 96

/* Of the integer lanes: lane = low half of lane * FACTOR + TERM. */
#define FPU_FACTOR 0x9e3779b1
#define FPU_TERM 0x01234567

#ifndef __ASSEMBLER__
#include "types.h"

/* A register of ten bytes in room for sixteen. */
struct extended {
    u64 mantissa;
    u16 exponent; /* sign on top */
    u16 zero[3];
};

/* Each x87 register and each lane of xmm.x, y, w:   x = 3.875 x (1 - x)   y = 1 / (y + x)   w = sqrt(w + y)
 * Each lane of xmm.s, single precision:             s = 3.875 s (1 - s)
 * Each lane of xmm.i:                               an integer
 * The others stay as they are. */
struct fpu_numbers {
    u32 control, mxcsr;
    u32 status; /* x87 status, out only */
    u32 zero;
    struct {
        struct extended x, y, w, still[2];
    } x87;
    struct {
        u64 x[2], y[2], w[2];
        u32 s[4];
        u64 i[2], still[2];
    } xmm;
} __attribute__((aligned(16)));

_Static_assert(offsetof(struct fpu_numbers, x87) == FPU_X87 && offsetof(struct fpu_numbers, xmm) == FPU_XMM, "");

/* Between these calls the numbers are in the registers alone: code in C here uses none of them. */
void fpu_load(const struct fpu_numbers *numbers);
void fpu_steps(u32 steps);
void fpu_store(struct fpu_numbers *numbers);
#endif

#endif
