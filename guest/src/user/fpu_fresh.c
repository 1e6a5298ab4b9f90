/* Program `fpu_fresh`: the registers that a new process finds are those after FNINIT, and zeros, whatever others left. */
#include "user.h"

#define CONTROL_RESET 0x37f
#define MXCSR_RESET 0x1f80

/* What FXSAVE writes, as far as a 32-bit program is concerned. */
struct image {
    u16 control, status;
    u8 tags; /* a bit for each register that holds something */
    u8 unused;
    u16 opcode;
    u32 pointers[4];
    u32 mxcsr, mxcsr_mask;
    u32 x87[8][4], xmm[8][4];
    u32 reserved[56];
} __attribute__((aligned(16)));

_Static_assert(sizeof(struct image) == 512, "");

u32 program_main(u32 seed, u32 scale, u32 flags)
{
    (void)seed, (void)scale, (void)flags;
    struct image image;
    __asm__ volatile("fxsave %0" : "=m"(image));
    expect(image.control == CONTROL_RESET, "the control word is FNINIT's");
    expect(image.status == 0 && image.tags == 0, "the x87 registers are empty and nothing is pending");
    expect(image.mxcsr == MXCSR_RESET, "MXCSR is what a reset leaves");
    u32 left = 0;
    for (u32 i = 0; i < 8; i++)
        for (u32 word = 0; word < 4; word++)
            left |= image.x87[i][word] | image.xmm[i][word];
    expect(left == 0, "the registers hold zeros");
    tally_report();
    return 0;
}
