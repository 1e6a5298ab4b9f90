/* The loop of program `spin`.
 *
 * Holds: a turn has SPIN_TURN instructions on both ways, a call SPIN_CALL more, the RET among them: guest/tests/spin.rs
 * counts them in the program. */
#include "spin_loop.h"

    .text
    .globl spin_loop
spin_loop:
    pushl %ebx                          /* 9 before the loop */
    pushl %esi
    pushl %edi
    movl 16(%esp), %ecx
    movl 20(%esp), %ebx
    movl (%ebx), %eax
    movl 4(%ebx), %edx
    movl 8(%ebx), %esi
    movl 12(%ebx), %edi
turn:
    imull $1664525, %eax, %eax          /* 1 */
    addl $1013904223, %eax
    movl %eax, %ebx
    shrl $13, %ebx
    xorl %ebx, %edx                     /* 5 */
    leal 1(%edx, %esi, 2), %edx
    cmpl %eax, %edx
    adcl $0, %esi
    testb $7, %cl
    jz eighth                           /* 10 */
    addl %edx, %esi                     /* 11, 12 */
    jmp join
eighth:
    xorl %eax, %esi                     /* 11, 12 */
    roll $7, %esi
join:
    subl %esi, %edi
    rorl $3, %edi
    decl %ecx                           /* 15 */
    jnz turn                            /* 16 */
    movl 20(%esp), %ebx                 /* 9 after it */
    movl %eax, (%ebx)
    movl %edx, 4(%ebx)
    movl %esi, 8(%ebx)
    movl %edi, 12(%ebx)
    popl %edi
    popl %esi
    popl %ebx
    ret
