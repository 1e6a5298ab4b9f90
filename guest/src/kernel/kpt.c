/* Page tables of the kernel itself.
 *
 * Story: early.c left low memory in large pages, writable and executable, at 0 and at 3 GiB. kpt_init makes that the kernel's
 * address space of layout.h. All these tables lie in low memory and are read and written where they lie; user page
 * tables lie in high memory and are upt.c's. Keeping the two apart means that the window, which needs a kernel page table
 * to map anything, never needs itself.
 *
 * Holds: no page of the kernel is both writable and executable (with NX); every kernel directory entry is final after
 * kpt_cover has run for the last time, in frames_init, but for those of the arena, which no process has. */
#include "kpt.h"

#include "boot.h"
#include "check.h"
#include "frames.h"
#include "tlb.h"

u64 kernel_pdpt[4] __attribute__((aligned(32)));
u32 kernel_directory[1024] __attribute__((aligned(PAGE_SIZE)));

/* Tables that are needed before frames can be had: the first large page's, cut up, and the top 4 MiB's. */
static u32 image_table[1024] __attribute__((aligned(PAGE_SIZE)));
u32 top_tables[2048] __attribute__((aligned(PAGE_SIZE)));

extern const char kernel_text[], kernel_rodata[], kernel_data[], kernel_end[];

u32 kpt_root(void) { return low_physical(paging.pae ? (void *)kernel_pdpt : (void *)kernel_directory); }

static void set_directory(u32 va, pte_t entry) { table_set(kernel_directory, directory_index(va), entry); }

void *kpt_table(u32 va)
{
    pte_t entry = table_get(kernel_directory, directory_index(va));
    ASSERT((entry & PTE_P) && !(entry & PTE_PS));
    return low_address(pte_frame(entry));
}

pte_t kpt_get(u32 va) { return table_get(kpt_table(va), table_index(va)); }

void kpt_set(u32 va, pte_t entry) { table_set(kpt_table(va), table_index(va), entry); }

void kpt_cover(u32 start, u32 end)
{
    for (u32 va = ALIGN_DOWN(start, table_reach()); va < end; va += table_reach())
        set_directory(va, pte_make(frame_alloc_untracked(), PTE_A | PTE_W | PTE_P));
}

u32 arena_map(u32 most)
{
    if (KERNEL_BASE + boot.options.lowmem * MIB > ARENA_BASE)
        return 0;
    u32 bytes, frame = frames_take_top(ALIGN_DOWN(most, table_reach()), table_reach(), &bytes);
    for (u32 at = 0; at < bytes; at += table_reach())
        set_directory(ARENA_BASE + at, pte_make(frame + (at >> PAGE_SHIFT), kpt_data_bits() | PTE_PS));
    return bytes;
}

void kpt_map_device(u32 va, u32 physical)
{
    kpt_set(va, pte_make(physical >> PAGE_SHIFT, kpt_data_bits() | PTE_PCD | PTE_PWT));
}

static pte_t image_bits(u32 va)
{
    pte_t data = kpt_data_bits();
    if (va < (u32)kernel_text || va >= (u32)kernel_data)
        return data;
    data &= ~(pte_t)PTE_W;
    return va < (u32)kernel_rodata ? data & ~PTE_NX : data;
}

/* The first large page holds the image: it is cut into small pages, so that text can be read-only and data not executable. */
static void cut_image(void)
{
    for (u32 i = 0; i < paging.entries; i++) {
        u32 physical = i << PAGE_SHIFT;
        table_set(image_table, i, pte_make(i, image_bits(KERNEL_BASE + physical)));
    }
    set_directory(KERNEL_BASE, pte_make(low_physical(image_table) >> PAGE_SHIFT, PTE_A | PTE_W | PTE_P));
}

static void finish_low_memory(void)
{
    u32 end = KERNEL_BASE + boot.options.lowmem * MIB;
    for (u32 va = KERNEL_BASE + table_reach(); va < end; va += table_reach())
        set_directory(va, pte_make((va - KERNEL_BASE) >> PAGE_SHIFT, kpt_data_bits() | PTE_PS));
}

static void drop_identity(void)
{
    kernel_pdpt[0] = 0;
    if (!paging.pae)
        for (u32 va = 0; va < boot.options.lowmem * MIB; va += table_reach())
            set_directory(va, 0);
}

/* Its first entry alone is its own; what the kernel's directory gets later is not there. */
static u32 below_directory[1024] __attribute__((aligned(PAGE_SIZE)));
static u64 below_pdpt[4] __attribute__((aligned(32)));

u32 kpt_root_from_below(void)
{
    const pte_t read_only = pte_make(0, PTE_PS | PTE_A | PTE_P);
    if (paging.pae) {
        table_set(below_directory, 0, read_only);
        below_pdpt[0] = low_physical(below_directory) | PTE_P;
        below_pdpt[3] = kernel_pdpt[3];
        return low_physical(below_pdpt);
    }
    for (u32 i = 1; i < paging.entries; i++)
        below_directory[i] = kernel_directory[i];
    table_set(below_directory, 0, read_only);
    return low_physical(below_directory);
}

void kpt_init(void)
{
    cut_image();
    finish_low_memory();
    drop_identity();
    u32 frame = low_physical(top_tables) >> PAGE_SHIFT;
    for (u32 va = TOP_BASE; va >= TOP_BASE; va += table_reach())
        set_directory(va, pte_make(frame++, PTE_A | PTE_W | PTE_P));
    tlb_load(kpt_root());
}
