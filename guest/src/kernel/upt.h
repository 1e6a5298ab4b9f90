/* User page tables: in high memory, reached through the window only.
 *
 * upt_open maps the page table that covers an address and takes one window slot, and the lock of the space's tables, until
 * upt_close. */
#ifndef UPT_H
#define UPT_H

#include "frames.h"
#include "locks.h"
#include "paging.h"
#include "rule.h"
#include "window.h"

/* The tables of one address space. CR3 points at `pdpt` in PAE and at frame `root` in the legacy format. */
struct upt {
    u64 pdpt[4] __attribute__((aligned(32)));
    u32 root;
    u32 cr3;
    struct lock lock; /* LOCK_SPACE: the tables, and what follows here */
    u32 taken_as; /* LOCK_CHILD by its parent's fork, which has the parent's too */
    /* The table that was found last, and an address that it covers; FRAME_NONE for none. */
    u32 recent, recent_va;
};

/* An open page table, and the entry in it of the address that it was opened for. */
struct leaf {
    void *table, *entry;
    u32 frame; /* of the table */
    struct upt *upt;
};

/* False when out of memory. */
bool upt_create(struct upt *upt);
/* Frees the directories; the tables below must be gone (upt_unlink). The tables must not be loaded. */
void upt_destroy(struct upt *upt);

/* Instead of the window, as it once was: see upt.c. The lock of the tables is let go of for as long as a slot is waited for. */
void upt_map_by_pool(struct leaf *leaf, u32 va);
void upt_unmap_by_pool(struct leaf *leaf);

/* Makes the table for `va` the recent one; none, where there is none and `create` is not set, or memory has run out. */
void upt_find_recent(struct upt *upt, u32 va, bool create);

static inline void upt_take_as(struct upt *upt, enum lock_level level)
{
    if (smp)
        lock_spin(&upt->lock, level);
    upt->taken_as = level;
}
static inline void upt_take(struct upt *upt) { upt_take_as(upt, LOCK_SPACE); }
static inline void upt_give(struct upt *upt) { lock_give(&upt->lock, upt->taken_as); }

/* One table covers both. */
static inline bool upt_reaches(u32 va, u32 other) { return !((va ^ other) >> paging.directory_shift); }

/* To the entry of an address that the table covers. */
static inline void upt_move(struct leaf *leaf, u32 va) { leaf->entry = (u8 *)leaf->table + table_index(va) * paging.entry_bytes; }

/* False if there is no table for `va` and `create` is not set, or memory has run out. What is touched next is near: most of
 * the time the directory need not be looked at again. */
static inline bool upt_open_held(struct upt *upt, u32 va, bool create, struct leaf *leaf)
{
    if (upt->recent == FRAME_NONE || !upt_reaches(upt->recent_va, va))
        upt_find_recent(upt, va, create);
    leaf->upt = upt;
    leaf->frame = upt->recent;
    if (leaf->frame == FRAME_NONE)
        return false;
    if (rule_kept(RULE_TABLE_WINDOW))
        leaf->table = kmap_local(leaf->frame, "user page table");
    else
        upt_map_by_pool(leaf, va);
    upt_move(leaf, va);
    return true;
}

static inline bool upt_open_as(struct upt *upt, u32 va, bool create, struct leaf *leaf, enum lock_level level)
{
    upt_take_as(upt, level);
    bool open = upt_open_held(upt, va, create, leaf);
    if (!open)
        upt_give(upt);
    return open;
}

static inline bool upt_open(struct upt *upt, u32 va, bool create, struct leaf *leaf)
{
    return upt_open_as(upt, va, create, leaf, LOCK_SPACE);
}

/* On to the entry of the next page. */
static inline void upt_next(struct leaf *leaf) { leaf->entry = (u8 *)leaf->entry + paging.entry_bytes; }

static inline void upt_close_held(struct leaf *leaf)
{
    if (rule_kept(RULE_TABLE_WINDOW))
        kunmap_local(leaf->table);
    else
        upt_unmap_by_pool(leaf);
}

static inline void upt_close(struct leaf *leaf)
{
    upt_close_held(leaf);
    upt_give(leaf->upt);
}

static inline pte_t upt_get(const struct leaf *leaf) { return table_get(leaf->entry, 0); }

/* Entries in use in this table. */
static inline u32 upt_count(const struct leaf *leaf) { return frame_of(leaf->frame)->link; }

/* For an entry that is not in use, for one that is and stays so, and for one that is no longer to be. They keep count, and
 * flush nothing. */
static inline void upt_enter(struct leaf *leaf, pte_t entry)
{
    frame_of(leaf->frame)->link++;
    table_enter(paging.pae, leaf->entry, 0, entry);
}

static inline void upt_change(struct leaf *leaf, pte_t entry) { table_set(leaf->entry, 0, entry); }

/* The same where the space's task may be running on another CPU, which sets A and D meanwhile: what a present entry was, which is 0
 * now but still counts; then what is to stand in its place, or 0 for nothing, which does not count. */
static inline pte_t upt_steal(struct leaf *leaf) { return table_take(leaf->entry, 0); }

static inline void upt_put(struct leaf *leaf, pte_t entry)
{
    if (entry)
        table_enter(paging.pae, leaf->entry, 0, entry);
    else
        frame_of(leaf->frame)->link--;
}

/* Takes A from a present entry. */
static inline void upt_age(struct leaf *leaf) { table_age(leaf->entry, 0); }

static inline void upt_clear(struct leaf *leaf)
{
    frame_of(leaf->frame)->link--;
    table_clear(paging.pae, leaf->entry, 0);
}

/* Takes an empty table out of its directory. Returns its frame, to be put after the flush; FRAME_NONE if there was none. */
u32 upt_unlink(struct upt *upt, u32 va);

/* The frame mapped at `va`, or FRAME_NONE. */
u32 upt_frame_at(struct upt *upt, u32 va);

#endif
