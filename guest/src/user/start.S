/* Where a program starts: EAX, EBX and ECX hold the arguments of program_main; what it returns is the exit status. */
#include "syscalls.h"

    .section .text.start, "ax"
    .globl _start
_start:
    xorl %ebp, %ebp
    subl $4, %esp               /* a call finds the stack on a multiple of 16, as C expects */
    pushl %ecx
    pushl %ebx
    pushl %eax
    call program_main
    movl %eax, %ebx
    movl $SYS_EXIT, %eax
    int $0x80
