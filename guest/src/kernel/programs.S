/* The user programs, built separately, as bytes. */
    .section .rodata
    .macro program name
    .align 16
    .globl program_\name\()_elf, program_\name\()_elf_end
program_\name\()_elf:
    .incbin "\name\().user"
program_\name\()_elf_end:
    .endm

    program hello
    program mm
    program access
    program spin
    program sweep
    program storm
    program mix
    program fpu
    program fpu_fresh
    program reclaim
    program shoot
    program age
