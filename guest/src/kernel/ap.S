/* Where another CPU begins: real mode, at AP_TRAMPOLINE, to which smp.c has copied this.
 *
 *   1. Protected mode, by a table of this page, with the selectors that the kernel's own table has.
 *   2. The control registers of the CPU that started it; the tables in CR3 map this page where it is, and all of the kernel.
 *   3. Up, to the stack and the function in struct ap_parameters. */
#include "layout.h"

#define CR0_PE (1 << 0)
#define MSR_EFER 0xc0000080

/* An address in this page, by itself and from the start of the page. */
#define HERE(label) (label - ap_trampoline + AP_TRAMPOLINE)
#define OFFSET(label) (label - ap_trampoline)

    .section .rodata
    .align 16
    .globl ap_trampoline, ap_trampoline_end
ap_trampoline:
    .code16
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    lgdtl OFFSET(table_register)
    movl %cr0, %eax
    orl $CR0_PE, %eax
    movl %eax, %cr0
    ljmpl $KERNEL_CS, $HERE(protected)

    .code32
protected:
    movl $KERNEL_DS, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl AP_PARAMETERS + 4, %eax
    movl %eax, %cr3
    movl AP_PARAMETERS + 8, %eax
    movl %eax, %cr4
    movl AP_PARAMETERS + 12, %eax
    testl %eax, %eax            /* 0 where there is no such register */
    jz 1f
    movl $MSR_EFER, %ecx
    xorl %edx, %edx
    wrmsr
1:  movl AP_PARAMETERS, %eax
    movl %eax, %cr0
    movl AP_PARAMETERS + 16, %esp
    xorl %ebp, %ebp
    jmp *AP_PARAMETERS + 20

    .align 8
table:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
table_register:
    .word table_register - table - 1
    .long HERE(table)
ap_trampoline_end:
