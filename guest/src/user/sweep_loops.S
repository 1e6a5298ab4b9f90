/* The loops of program `sweep`.
 *
 * Holds: a turn of a loop makes four accesses to the swept memory, and none to any other. */
#include "sweep_loops.h"

    .text

    .globl store_sequential
store_sequential:
    pushl %edi
    movl 8(%esp), %edi
    movl 12(%esp), %ecx
    movl 16(%esp), %eax
1:
    .irp displacement, 0, 4, 8, 12
    movl %eax, \displacement(%edi)
    addl $SWEEP_STEP, %eax
    .endr
    addl $16, %edi
    decl %ecx
    jnz 1b
    popl %edi
    ret

    .globl load_sequential
load_sequential:
    movl 4(%esp), %edx
    movl 8(%esp), %ecx
    xorl %eax, %eax
1:
    .irp displacement, 0, 4, 8, 12
    addl \displacement(%edx), %eax
    .endr
    addl $16, %edx
    decl %ecx
    jnz 1b
    ret

    .globl store_strided
store_strided:
    pushl %esi
    pushl %edi
    movl 12(%esp), %edi
    movl 16(%esp), %ecx
    movl 20(%esp), %eax
    movl 24(%esp), %edx
    movl 28(%esp), %esi
1:
    .rept 4
    movl %eax, (%edi, %edx)
    addl $SWEEP_STEP, %eax
    addl $SWEEP_STRIDE, %edx
    andl %esi, %edx
    .endr
    decl %ecx
    jnz 1b
    popl %edi
    popl %esi
    ret

    .globl load_strided
load_strided:
    pushl %esi
    pushl %edi
    movl 12(%esp), %edi
    movl 16(%esp), %ecx
    movl 20(%esp), %edx
    movl 24(%esp), %esi
    xorl %eax, %eax
1:
    .rept 4
    addl (%edi, %edx), %eax
    addl $SWEEP_STRIDE, %edx
    andl %esi, %edx
    .endr
    decl %ecx
    jnz 1b
    popl %edi
    popl %esi
    ret
