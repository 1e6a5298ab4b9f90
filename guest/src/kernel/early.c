/* Before paging: read what the loader left, build the first page tables.
 *
 * Story: called once by boot.S. The loader's structures may lie anywhere below 4 GiB, also where the kernel will not map
 * anything; with paging off they can all be read, so this is where they are copied.
 * Holds: this file, cmdline.c and topology.c are linked at their physical addresses; they call only each other and touch the
 * rest of the kernel's data through PHYSICAL(). */
#include "boot.h"
#include "layout.h"
#include "multiboot.h"
#include "paging.h"
#include "topology.h"

#define PHYSICAL(symbol) ((__typeof__(&(symbol)))((u32) & (symbol)-KERNEL_BASE))

u64 early_main(u32 magic, const struct multiboot_info *info);

static void add_range(struct boot *boot, u64 base, u64 length)
{
    u64 start = (base + PAGE_SIZE - 1) >> PAGE_SHIFT, end = (base + length) >> PAGE_SHIFT;
    if (boot->range_count == MEMORY_RANGES_MAX || start >= FRAMES_MAX)
        return;
    if (end > FRAMES_MAX)
        end = FRAMES_MAX;
    if (start >= end)
        return;
    boot->ranges[boot->range_count].start = (u32)start;
    boot->ranges[boot->range_count].end = (u32)end;
    boot->range_count++;
}

static void copy_memory_map(struct boot *boot, const struct multiboot_info *info)
{
    if (info->flags & MULTIBOOT_HAS_MMAP) {
        u32 at = info->mmap_addr, end = info->mmap_addr + info->mmap_length;
        while (at < end) {
            const struct multiboot_mmap *entry = (const struct multiboot_mmap *)at;
            if (entry->type == MULTIBOOT_RAM)
                add_range(boot, entry->base, entry->length);
            at += entry->size + sizeof(entry->size);
        }
    } else if (info->flags & MULTIBOOT_HAS_MEMORY) {
        add_range(boot, MIB, (u64)info->mem_upper * 1024);
    }
}

/* One CPU, at least: the one that runs this, whether a table knows of it or not. */
static void count_cpus(struct boot *boot)
{
    u32 most = boot->options.cpus ? boot->options.cpus : CPUS_MAX;
    boot->cpu_count = most > 1 ? topology_find(boot->apic_ids, most) : 1;
    if (boot->cpu_count == 0)
        boot->cpu_count = 1;
}

/* Low memory at 0 and at 3 GiB. In PAE both come from one directory, entered twice. */
static u32 build_pae(u32 lowmem)
{
    u64 *pdpt = *PHYSICAL(kernel_pdpt);
    u64 *directory = (u64 *)*PHYSICAL(kernel_directory);
    for (u32 i = 0; i < lowmem / 2; i++)
        directory[i] = (u64)i * 2 * MIB | PTE_PS | PTE_W | PTE_P;
    pdpt[0] = (u32)directory | PTE_P;
    pdpt[KERNEL_BASE >> 30] = (u32)directory | PTE_P;
    return (u32)pdpt;
}

static u32 build_legacy(u32 lowmem)
{
    u32 *directory = *PHYSICAL(kernel_directory);
    for (u32 i = 0; i < lowmem / 4; i++) {
        directory[i] = i * 4 * MIB | PTE_PS | PTE_W | PTE_P;
        directory[(KERNEL_BASE >> 22) + i] = directory[i];
    }
    return (u32)directory;
}

/* Returns what CR3 (low half) and CR4 (high half) are to hold: EAX and EDX for boot.S. */
u64 early_main(u32 magic, const struct multiboot_info *info)
{
    struct boot *left = PHYSICAL(boot);
    left->multiboot = magic == MULTIBOOT_LOADER_MAGIC;
    const char *line = "";
    if (left->multiboot) {
        copy_memory_map(left, info);
        if (info->flags & MULTIBOOT_HAS_CMDLINE)
            line = (const char *)info->cmdline;
    }
    if (!command_line_parse(line, &left->options, left->bad_word, sizeof(left->bad_word)))
        left->options.lowmem = LOWMEM_DEFAULT; /* enough to say what was wrong */
    count_cpus(left);
    if (left->options.legacy)
        return build_legacy(left->options.lowmem) | (u64)CR4_PSE << 32;
    return build_pae(left->options.lowmem) | (u64)CR4_PAE << 32;
}
