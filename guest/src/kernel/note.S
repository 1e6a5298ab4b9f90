/* What the image says about itself: ELF notes. Layout: src/abi.rs. */
#include "layout.h"
#include "umbra_abi.h"

    .macro note type
    .align 4
    .long 2f - 1f, 4f - 3f, \type
1:  .asciz NOTE_NAME
2:  .align 4
3:
    .endm

    .section .note.umbra, "a", @note
    note NOTE_TYPE_KERNEL
    .long NOTE_VERSION, NOTE_FLAG_CLEAN
4:
    note NOTE_TYPE_WITNESS
    .long witness_table - KERNEL_BASE
4:
