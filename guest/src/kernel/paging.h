/* The two paging formats, behind one entry type.
 *
 *            levels                        entries   entry    large page
 *   PAE      PDPT 4, directory, table      512       8 bytes  2 MiB
 *   legacy   directory, table              1024      4 bytes  4 MiB
 *
 * Code above this file speaks of a *directory* (its entries cover a table or a large page) and of a *table* (its entries
 * are pages). Only PAE has the four-entry PDPT on top; the CPU reads that at MOV CR3 and not again. */
#ifndef PAGING_H
#define PAGING_H

#include "types.h"

#define PTE_P (1u << 0)
#define PTE_W (1u << 1)
#define PTE_U (1u << 2)
#define PTE_PWT (1u << 3)
#define PTE_PCD (1u << 4)
#define PTE_A (1u << 5)
#define PTE_D (1u << 6)
#define PTE_PS (1u << 7)
#define PTE_G (1u << 8)
#define PTE_NX (1ull << 63)
#define PTE_FRAME 0x0000000ffffff000ull

#define CR0_WP (1u << 16)

#define CR4_PSE (1u << 4)
#define CR4_PAE (1u << 5)
#define CR4_PGE (1u << 7)
#define CR4_SMEP (1u << 20)

/* Frames with numbers from here on are never used: the frame table has room for these, 48 GiB. */
#define FRAMES_MAX (12u << 20)

typedef u64 pte_t;

/* What the running format and CPU offer. */
struct paging {
    bool pae;
    u32 entries;         /* of a directory or table */
    u32 entry_bytes;
    u32 directory_shift; /* log2 of the bytes that a directory entry covers */
    pte_t nx;            /* PTE_NX, or 0 where there is none */
    pte_t global;        /* PTE_G, or 0 */
    pte_t data;          /* a writable, never executable, global page of the kernel's own, A and D set; see kpt.h */
    bool smep;
};

extern struct paging paging;

/* Chooses the format that boot.S switched on, then turns on what the CPU has of NX, global pages and SMEP. */
void paging_init(void);
/* What EFER is to hold on another CPU; 0 where it is not to be touched. */
u32 paging_efer(void);

/* The entry of `table` (mapped, either format). */
static inline pte_t table_get(const void *table, u32 index)
{
    const volatile u32 *words = table;
    if (!paging.pae)
        return words[index];
    return words[2 * index] | (pte_t)words[2 * index + 1] << 32;
}

/* Writes an entry so that no walk can meet a mix of an old and a new half. Flushes nothing.
 *
 * A PAE entry is written in two halves. The half with the present bit goes last when an entry appears, and first, as
 * zero, when the other half of a present entry changes. */
static inline void table_set(void *table, u32 index, pte_t entry)
{
    volatile u32 *words = table;
    if (!paging.pae) {
        words[index] = (u32)entry;
        return;
    }
    volatile u32 *low = &words[2 * index], *high = &words[2 * index + 1];
    if (*high != (u32)(entry >> 32)) {
        if (*low & PTE_P)
            *low = 0;
        *high = (u32)(entry >> 32);
    }
    *low = (u32)entry;
}

/* The same for an entry that is absent now, in a format that the caller knows. */
static inline void table_enter(bool pae, void *table, u32 index, pte_t entry)
{
    volatile u32 *words = table;
    if (!pae) {
        words[index] = (u32)entry;
        return;
    }
    words[2 * index + 1] = (u32)(entry >> 32);
    words[2 * index] = (u32)entry;
}

/* Makes an entry 0. */
static inline void table_clear(bool pae, void *table, u32 index)
{
    volatile u32 *words = table;
    if (!pae) {
        words[index] = 0;
        return;
    }
    words[2 * index] = 0;
    words[2 * index + 1] = 0;
}

/* Makes a present entry 0 and returns what it was. Another CPU may set A and D until then, and not after. */
static inline pte_t table_take(void *table, u32 index)
{
    u32 *words = table;
    if (!paging.pae)
        return __atomic_exchange_n(&words[index], 0, __ATOMIC_SEQ_CST);
    u32 low = __atomic_exchange_n(&words[2 * index], 0, __ATOMIC_SEQ_CST), high = words[2 * index + 1];
    words[2 * index + 1] = 0;
    return low | (pte_t)high << 32;
}

/* Takes A from a present entry, whatever another CPU sets in it meanwhile. */
static inline void table_age(void *table, u32 index)
{
    u32 *low = (u32 *)table + (paging.pae ? 2 * index : index);
    __atomic_and_fetch(low, ~PTE_A, __ATOMIC_SEQ_CST);
}

static inline u32 pte_frame(pte_t entry) { return (u32)((entry & PTE_FRAME) >> PAGE_SHIFT); }
static inline pte_t pte_make(u32 frame, pte_t bits) { return (pte_t)frame << PAGE_SHIFT | bits; }

static inline u32 directory_index(u32 va) { return va >> paging.directory_shift & (paging.entries - 1); }
static inline u32 table_index(u32 va) { return va >> PAGE_SHIFT & (paging.entries - 1); }

/* The bytes that one page table covers. */
static inline u32 table_reach(void) { return 1u << paging.directory_shift; }

#endif
