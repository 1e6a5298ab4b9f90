/* The Multiboot1 structures that this kernel reads (Multiboot specification 0.6.96, section 3). */
#ifndef MULTIBOOT_H
#define MULTIBOOT_H

#define MULTIBOOT_HEADER_MAGIC 0x1badb002
#define MULTIBOOT_PAGE_ALIGN (1 << 0)
#define MULTIBOOT_MEMORY_INFO (1 << 1)
#define MULTIBOOT_HEADER_FLAGS (MULTIBOOT_PAGE_ALIGN | MULTIBOOT_MEMORY_INFO)
#define MULTIBOOT_LOADER_MAGIC 0x2badb002

#ifndef __ASSEMBLER__
#include "types.h"

#define MULTIBOOT_HAS_MEMORY (1u << 0)
#define MULTIBOOT_HAS_CMDLINE (1u << 2)
#define MULTIBOOT_HAS_MMAP (1u << 6)
#define MULTIBOOT_RAM 1

struct multiboot_info {
    u32 flags;
    u32 mem_lower; /* KiB from 0 */
    u32 mem_upper; /* KiB from 1 MiB */
    u32 boot_device;
    u32 cmdline;
    u32 mods_count;
    u32 mods_addr;
    u32 syms[4];
    u32 mmap_length;
    u32 mmap_addr;
};

struct multiboot_mmap {
    u32 size; /* of what follows */
    u64 base;
    u64 length;
    u32 type;
} __attribute__((packed));
#endif

#endif
