/* The kernel's address space, and every limit of the kernel, in one place.
 *
 *   00000000 - bfffffff   user
 *   c0000000 - dfffffff   low memory, physical address + KERNEL_BASE, large pages; where there is less of it than 256 MiB,
 *   d0000000 - dfffffff   the arena: high memory in large pages, with workload=huge
 *   e0000000 - f7ffffff   frame table: 32 bytes a frame, backed only as far as frames were handed out
 *   f8000000 - fbffffff   swap map: 12 bytes a slot, as many as the swap disk has
 *   ffc00000 - ffc7ffff   kernel stacks: two absent guard pages, then two pages each
 *   ffd00000 - ffd02fff   LAPIC, two IOAPICs
 *   ffd08000 - ffd0afff   virtio-mmio transports
 *   ffe00000 - ffe7ffff   slots of the temporary window (kmap_local), 16 for each CPU
 *   ffe80000 - ffe9ffff   slots of the persistent pool (kmap)
 *   ffec0000 - ffedffff   slots of the storm workload
 *
 * Those from ffc00000 on share the top 4 MiB, whose page tables exist from boot on. So every kernel directory entry is final
 * before the first process is made, and a copy of one in a process's root never goes stale.
 *
 * Also read by the assembler: nothing but #define here. */
#ifndef LAYOUT_H
#define LAYOUT_H

#define KERNEL_BASE 0xc0000000
#define KERNEL_LOAD 0x00100000

#define ARENA_BASE 0xd0000000
#define FRAME_TABLE_BASE 0xe0000000
#define SWAP_MAP_BASE 0xf8000000
#define SWAP_MAP_END 0xfc000000
#define TOP_BASE 0xffc00000
#define STACKS_BASE 0xffc00000
#define LAPIC_BASE 0xffd00000
#define IOAPIC_BASE 0xffd01000
#define IOAPIC2_BASE 0xffd02000
#define VIRTIO_BASE 0xffd08000
#define WINDOW_BASE 0xffe00000
#define POOL_BASE 0xffe80000
#define STORM_BASE 0xffec0000

#define USER_END KERNEL_BASE
#define USER_MAP_BASE 0x40000000
#define USER_STACK_TOP 0xbfffe000
#define USER_STACK_PAGES_MAX 64

/* Low memory in MiB: a multiple of 4, since legacy large pages are that big. */
#define LOWMEM_DEFAULT 8
#define LOWMEM_MIN 4
#define LOWMEM_MAX 512

/* MiB that the kernel uses of what there is, with workload=reclaim: so that a slow CPU, or another one, fills it more than once in seconds. */
#define RAM_OF_RECLAIM_SLOW 9
#define RAM_OF_RECLAIM_FAST 10

/* Percent of the default work: so much that the count of what a timed workload does fits 32 bits. */
#define SCALE_MAX 4000
#define WORK_MAX 1000

#define TASKS_MAX 32
#define STACK_PAGES 2
/* From one stack to the next: a power of two, so that a CPU soon knows whose stack it is on. */
#define STACK_STRIDE 0x4000
/* Words of the lowest page of a stack. */
#define STACK_WORD_MARK 0
#define STACK_WORD_CPU 1

/* CPUs that are used: as many as the window has slots for. */
#define CPUS_MAX 8

/* Where the other CPUs begin, in real mode: a page of low memory that nothing else uses, as all below the kernel. */
#define AP_TRAMPOLINE 0x8000
/* In that page, struct ap_parameters (smp.c). */
#define AP_PARAMETERS (AP_TRAMPOLINE + 0xf00)
#define REGIONS_MAX 16

/* Window slots a context may hold: what the deepest kernel path needs, an interrupt on top of it, and an NMI on top of that. */
#define WINDOW_TASK_DEPTH_MAX 8
#define WINDOW_IRQ_DEPTH_MAX 4
#define WINDOW_NMI_DEPTH_MAX 1
#define WINDOW_DEPTH_MAX (WINDOW_TASK_DEPTH_MAX + WINDOW_IRQ_DEPTH_MAX + WINDOW_NMI_DEPTH_MAX)
/* One more slot, outside the stack, for the walk that a crash dump does. */
#define WINDOW_DUMP_SLOT WINDOW_DEPTH_MAX
#define WINDOW_SLOTS 16 /* of a CPU */

#define POOL_SLOTS 32
#define STORM_SLOTS 32

/* Selectors. */
#define KERNEL_CS 0x08
#define KERNEL_DS 0x10
#define USER_CS 0x1b
#define USER_DS 0x23
#define TSS_SELECTOR 0x28 /* of the first CPU; the others' follow */

/* Vectors above the exceptions. */
#define VECTOR_TIMER 0x20
#define VECTOR_VIRTIO 0x21
/* From CPU to CPU: look for a task; forget translations. */
#define VECTOR_LOOK 0x22
#define VECTOR_FLUSH 0x23
#define VECTOR_SYSCALL 0x80
#define VECTOR_SPURIOUS 0xff

/* Timer interrupts a second. */
#define TIMER_HZ_DEFAULT 100
#define TIMER_HZ_MAX 1000
/* Samples a second, with workload=reclaim. Not a part of the timer's, so that the two drift along each other. */
#define NMI_HZ_DEFAULT 11
#define NMI_HZ_MAX 1000

#endif
