/* User page tables: in high memory, reached through the window only.
 *
 *                 CR3 -> pdpt[0..2] -> directory -> table        PAE:    pdpt in the task (low memory), the rest high;
 *                        pdpt[3]    -> kernel_directory                  directories appear with their first table
 *                 CR3 -> root (directory) -> table               legacy: root is high, its top quarter a copy of the kernel's
 *
 * Holds: a table's frame counts its entries in use (frame.link), and a directory those it has below USER_END; an entry is in
 * use if it is not 0. A table or directory that is not linked has no entries in use. `recent` is linked. */
#include "upt.h"

#include "boot.h"
#include "check.h"
#include "frames.h"
#include "kmap.h"
#include "kpt.h"
#include "string.h"
#include "tlb.h"
#include "window.h"

static const pte_t link_bits = PTE_A | PTE_U | PTE_W | PTE_P;

/* As it was in 2002, for the scenes that switch the rules off: tables through the pool. The pool is the kernel's, whose lock comes
 * before that of the tables. */

static void clear_by_pool(u32 frame)
{
    kernel_take();
    void *table = kmap_of(SERIES_DEFAULT, frame);
    clear_page(table);
    kunmap(table);
    kernel_give_back();
}

/* The second table that a fork has open is a series' of its own. */
static enum series series_of(const struct upt *upt)
{
    return upt->taken_as == LOCK_CHILD ? SERIES_PAGETABLE2 : SERIES_PAGETABLE;
}

static void *wait_for_slot(struct upt *upt, u32 frame)
{
    enum lock_level level = upt->taken_as;
    enum series series = series_of(upt);
    if (!rule_kept(RULE_TABLE_SPIN))
        return kmap_of(series, frame);
    upt_give(upt);
    kernel_take();
    void *table = kmap_of(series, frame);
    kernel_give_back();
    upt_take_as(upt, level);
    return table;
}

/* The table may be another's after the wait. */
void upt_map_by_pool(struct leaf *leaf, u32 va)
{
    struct upt *upt = leaf->upt;
    while (1) {
        leaf->table = wait_for_slot(upt, leaf->frame);
        upt_find_recent(upt, va, false);
        if (upt->recent == leaf->frame)
            return;
        kunmap(leaf->table);
        leaf->frame = upt->recent;
        ASSERT(leaf->frame != FRAME_NONE);
    }
}

void upt_unmap_by_pool(struct leaf *leaf)
{
    enum lock_level level = leaf->upt->taken_as;
    upt_give(leaf->upt);
    kernel_take();
    kunmap(leaf->table);
    kernel_give_back();
    upt_take_as(leaf->upt, level);
}

/* A cleared frame for a table or directory. */
static u32 new_table(void)
{
    u32 frame = frame_alloc(ZONE_HIGH);
    if (frame == FRAME_NONE)
        return FRAME_NONE;
    if (rule_kept(RULE_TABLE_CLEAR)) {
        void *table = kmap_local(frame, "new page table");
        clear_page(table);
        kunmap_local(table);
    } else {
        clear_by_pool(frame);
    }
    return frame;
}

static void copy_kernel_directory(u32 frame)
{
    void *directory = kmap_local(frame, "new root");
    for (u32 i = directory_index(KERNEL_BASE); i < paging.entries; i++)
        table_set(directory, i, table_get(kernel_directory, i));
    kunmap_local(directory);
}

bool upt_create(struct upt *upt)
{
    for (u32 i = 0; i < ARRAY_SIZE(upt->pdpt); i++)
        upt->pdpt[i] = 0;
    upt->root = upt->recent = FRAME_NONE;
    if (paging.pae) {
        upt->pdpt[3] = kernel_pdpt[3];
        upt->cr3 = low_physical(upt->pdpt);
        return true;
    }
    upt->root = new_table();
    if (upt->root == FRAME_NONE)
        return false;
    copy_kernel_directory(upt->root);
    upt->cr3 = upt->root << PAGE_SHIFT;
    return true;
}

static void put_directory(u32 frame)
{
    ASSERT(frame_of(frame)->link == 0);
    frame_put(frame);
}

void upt_destroy(struct upt *upt)
{
    ASSERT(!tlb_is_loaded_anywhere(upt->cr3));
    if (!paging.pae) {
        put_directory(upt->root);
        return;
    }
    for (u32 i = 0; i < USER_END >> 30; i++)
        if (upt->pdpt[i])
            put_directory(pte_frame(upt->pdpt[i]));
}

/* The directory for `va`. In PAE the CPU has to be told of a new one: it read the PDPT at the last MOV CR3. */
static u32 directory_of(struct upt *upt, u32 va, bool create)
{
    if (!paging.pae)
        return upt->root;
    u64 *entry = &upt->pdpt[va >> 30];
    if (*entry || !create)
        return pte_frame(*entry);
    u32 frame = new_table();
    if (frame == FRAME_NONE)
        return FRAME_NONE;
    table_enter(true, upt->pdpt, va >> 30, pte_make(frame, PTE_P));
    if (tlb_is_loaded(upt->cr3))
        flush_not_global(FLUSH_POINTERS);
    return frame;
}

static u32 find_table(struct upt *upt, u32 va, bool create)
{
    u32 directory_frame = directory_of(upt, va, create);
    if (directory_frame == FRAME_NONE)
        return FRAME_NONE;
    void *directory = kmap_local(directory_frame, "user directory");
    u32 frame = pte_frame(table_get(directory, directory_index(va)));
    if (frame == FRAME_NONE && create) {
        frame = new_table();
        if (frame != FRAME_NONE) {
            table_set(directory, directory_index(va), pte_make(frame, link_bits));
            frame_of(directory_frame)->link++;
        }
    }
    kunmap_local(directory);
    return frame;
}

void upt_find_recent(struct upt *upt, u32 va, bool create)
{
    ASSERT(va < USER_END);
    upt->recent = find_table(upt, va, create);
    upt->recent_va = va;
}

u32 upt_unlink(struct upt *upt, u32 va)
{
    upt_take(upt);
    u32 directory_frame = directory_of(upt, va, false);
    if (directory_frame == FRAME_NONE) {
        upt_give(upt);
        return FRAME_NONE;
    }
    upt->recent = FRAME_NONE;
    void *directory = kmap_local(directory_frame, "user directory");
    u32 frame = pte_frame(table_get(directory, directory_index(va)));
    if (frame != FRAME_NONE) {
        ASSERT(frame_of(frame)->link == 0);
        table_set(directory, directory_index(va), 0);
        frame_of(directory_frame)->link--;
    }
    kunmap_local(directory);
    upt_give(upt);
    return frame;
}

u32 upt_frame_at(struct upt *upt, u32 va)
{
    struct leaf leaf;
    if (!upt_open(upt, va, false, &leaf))
        return FRAME_NONE;
    pte_t entry = upt_get(&leaf);
    upt_close(&leaf);
    return entry & PTE_P ? pte_frame(entry) : FRAME_NONE;
}
