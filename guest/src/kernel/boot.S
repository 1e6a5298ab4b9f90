/* Entry from a Multiboot1 loader.
 *
 * Story: the loader jumps to multiboot_entry in flat 32-bit protected mode, paging off, EAX = magic, EBX = info. The
 * code in .boot is linked at its physical address; all else is linked 3 GiB higher.
 *   1. early_main (early.c, .boot too) reads the command line and builds the first page tables.
 *   2. Paging goes on; the tables map low memory twice, at 0 and at 3 GiB, so the next instruction is still there.
 *   3. Jump up, take the stack of the first task, call kernel_main; kpt.c drops the mapping at 0. */
#include "layout.h"
#include "multiboot.h"

#define CR0_PE (1 << 0)
#define CR0_EM (1 << 2)
#define CR0_ET (1 << 4)
#define CR0_NE (1 << 5)
#define CR0_WP (1 << 16)
#define CR0_PG (1 << 31)

    .section .boot.header, "a"
    .align 4
    .long MULTIBOOT_HEADER_MAGIC
    .long MULTIBOOT_HEADER_FLAGS
    .long -(MULTIBOOT_HEADER_MAGIC + MULTIBOOT_HEADER_FLAGS)

    .section .boot.text, "ax"
    .globl multiboot_entry
multiboot_entry:
    cli
    cld
    movl $(boot_stack_top - KERNEL_BASE), %esp
    movl %ebx, %edx
    call early_main             /* EAX = value for CR3, EDX = value for CR4 */
    movl %edx, %cr4
    movl %eax, %cr3
    /* EM: x87 in user code is #NM, until fpu.c is asked to keep its state. */
    movl $(CR0_PG | CR0_WP | CR0_NE | CR0_ET | CR0_EM | CR0_PE), %eax
    movl %eax, %cr0
    movl $high, %eax
    jmp *%eax

    .text
high:
    movl $boot_stack_top, %esp
    movl $cpus, boot_stack + 4 * STACK_WORD_CPU
    xorl %ebp, %ebp
    call kernel_main
1:  cli
    hlt
    jmp 1b

    .bss
    /* Placed as all stacks are: the last pages of its stride. */
    .align STACK_STRIDE
    .skip STACK_STRIDE - STACK_PAGES * 4096
    .globl boot_stack
boot_stack:
    .skip STACK_PAGES * 4096
boot_stack_top:
