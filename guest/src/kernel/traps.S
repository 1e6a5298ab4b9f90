/* Entry and exit of every trap, and the switch of stacks. C passes arguments in EAX, EDX and ECX (build.rs).
 *
 * Story: a stub makes the frame uniform (an error code, real or 0, and the vector) and falls into trap_common, which
 * builds struct trap_frame and calls trap_dispatch. The way out is one IRET.
 * Holds: interrupts are off from the gate to the IRET. */
#include "layout.h"

#define TRAP_STUBS 36 /* trap.h */

    .text

/* Exceptions that push an error code: #DF #TS #NP #SS #GP #PF #AC #CP. */
#define HAS_ERROR(n) ((n) == 8 || ((n) >= 10 && (n) <= 14) || (n) == 17 || (n) == 21)

    .altmacro
    .macro stub n
    .align 8
stub_\n:
    .if !(HAS_ERROR(\n))
    pushl $0
    .endif
    pushl $\n
    jmp trap_common
    .endm

    .set n, 0
    .rept TRAP_STUBS
    stub %n
    .set n, n + 1
    .endr

    .globl trap_syscall_stub
trap_syscall_stub:
    pushl $0
    pushl $VECTOR_SYSCALL
    jmp trap_common

/* A spurious interrupt wants no end-of-interrupt and nothing else. */
    .globl trap_spurious_stub
trap_spurious_stub:
    iret

trap_common:
    pushl %ds
    pushl %es
    pushal
    movl $KERNEL_DS, %eax
    movl %eax, %ds
    movl %eax, %es
    cld
    movl %esp, %eax
    call trap_dispatch
trap_return:
    popal
    popl %es
    popl %ds
    addl $8, %esp               /* vector, error code */
    iret

/* A task's first switch "returns" here, with its frame above. */
    .globl trap_return_first
trap_return_first:
    call task_first_run
    jmp trap_return

/* void switch_stacks(u32 *save_esp, u32 esp): the registers that C keeps across calls go on the stacks. */
    .globl switch_stacks
switch_stacks:
    pushl %ebp
    pushl %ebx
    pushl %esi
    pushl %edi
    movl %esp, (%eax)
    movl %edx, %esp
    popl %edi
    popl %esi
    popl %ebx
    popl %ebp
    ret

/* bool user_copy(void *to, const void *from, u32 bytes): the one place where the kernel touches user addresses by
 * itself. A fault that cannot be repaired resumes at user_copy_failed (trap.c); false then. Byte by byte, and ECX, ESI and
 * EDI always say how far it came, so a repaired fault resumes in the middle. */
    .globl user_copy
user_copy:
    pushl %esi
    pushl %edi
    movl %eax, %edi
    movl %edx, %esi
    .globl user_copy_access
user_copy_access:
    rep movsb
    movl $1, %eax
user_copy_done:
    popl %edi
    popl %esi
    ret
    .globl user_copy_failed
user_copy_failed:
    xorl %eax, %eax
    jmp user_copy_done

    .section .rodata
    .align 4
    .globl trap_stubs
trap_stubs:
    .macro stub_address n
    .long stub_\n
    .endm
    .set n, 0
    .rept TRAP_STUBS
    stub_address %n
    .set n, n + 1
    .endr
