/* The four kinds of access, from ring 0. u32 access_touch(u32 kind, u32 address, u32 value): 1 if it did not fault;
 * access_value then holds what was read. access_fault (access.c) knows the labels. */
#include "syscalls.h"

    .text
    .globl access_touch
access_touch:
    xchgl %ecx, %edx            /* from C: kind in EAX, address in EDX, value in ECX */
    cmpl $PROBE_READ, %eax
    je access_at_read
    cmpl $PROBE_WRITE, %eax
    je access_at_write
    cmpl $PROBE_MODIFY, %eax
    je access_at_modify
    call *%ecx
    jmp 1f
    .globl access_at_read, access_at_write, access_at_modify
access_at_read:
    movl (%ecx), %edx
    jmp 1f
access_at_write:
    movl %edx, (%ecx)
    jmp 1f
access_at_modify:
    incl (%ecx)
1:  movl %edx, access_value
    movl $1, %eax
    ret
    .globl access_failed_call, access_failed
access_failed_call:
    addl $4, %esp               /* the return address that the call pushed */
access_failed:
    xorl %eax, %eax
    ret
