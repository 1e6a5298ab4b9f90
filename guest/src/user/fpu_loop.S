/* Registers full of numbers, and steps that keep all of them moving. */
#include "fpu_loop.h"

    .section .rodata
    .align 16
ones:
    .double 1, 1
factors:
    .double 3.875, 3.875
single_ones:
    .float 1, 1, 1, 1
single_factors:
    .float 3.875, 3.875, 3.875, 3.875
integer_factors:
    .quad FPU_FACTOR, FPU_FACTOR
integer_terms:
    .quad FPU_TERM, FPU_TERM

    .text

/* ST(0..4) = x, y, w and the two that stay. */
    .globl fpu_load
fpu_load:
    movl 4(%esp), %eax
    fninit
    fldcw FPU_CONTROL(%eax)
    ldmxcsr FPU_MXCSR(%eax)
    .irp place, 4, 3, 2, 1, 0
    fldt FPU_X87 + 16 * \place(%eax)
    .endr
    .irp place, 0, 1, 2, 3, 4, 5
    movaps FPU_XMM + 16 * \place(%eax), %xmm\place
    .endr
    ret

    .globl fpu_steps
fpu_steps:
    movl 4(%esp), %ecx
1:
    fld1
    fsub %st(1), %st
    fmulp %st, %st(1)
    fmuls single_factors                /* x */
    fld %st(1)
    fadd %st(1), %st
    fdivrs single_ones
    fstp %st(2)                         /* y */
    fld %st(2)
    fadd %st(2), %st
    fsqrt
    fstp %st(3)                         /* w */

    movapd ones, %xmm6
    subpd %xmm0, %xmm6
    mulpd %xmm6, %xmm0
    mulpd factors, %xmm0                /* x */
    addpd %xmm0, %xmm1
    movapd ones, %xmm6
    divpd %xmm1, %xmm6
    movapd %xmm6, %xmm1                 /* y */
    addpd %xmm1, %xmm2
    sqrtpd %xmm2, %xmm2                 /* w */

    movaps single_ones, %xmm7
    subps %xmm3, %xmm7
    mulps %xmm7, %xmm3
    mulps single_factors, %xmm3         /* s */

    pmuludq integer_factors, %xmm4
    paddq integer_terms, %xmm4          /* i */
    decl %ecx
    jnz 1b
    ret

    .globl fpu_store
fpu_store:
    movl 4(%esp), %eax
    fnstcw FPU_CONTROL(%eax)
    fnstsw FPU_STATUS(%eax)
    stmxcsr FPU_MXCSR(%eax)
    .irp place, 0, 1, 2, 3, 4
    fstpt FPU_X87 + 16 * \place(%eax)
    .endr
    .irp place, 0, 1, 2, 3, 4, 5
    movaps %xmm\place, FPU_XMM + 16 * \place(%eax)
    .endr
    ret
