/* What scenes need of memory. See scene_memory.h.
 *
 * Locks: the kernel's, as in any thread. */
#include "scene_memory.h"

#include "cpu.h"
#include "file.h"
#include "irq.h"
#include "kpt.h"
#include "scene.h"
#include "tlb.h"
#include "trap.h"

#define HOARD_MAX 512

void scene_space(struct space *space, u32 pages)
{
    const struct region region = {.start = SCENE_BASE, .end = SCENE_BASE + pages * PAGE_SIZE, .flags = REGION_WRITE};
    scene_want(space_create(space) && space_map(space, region), "there is an address space");
}

void scene_file_space(struct space *space)
{
    scene_want(space_create(space) && file_map(space, SCENE_BASE), "the file is mapped");
}

static bool allows(struct space *space, u32 va, bool write)
{
    struct leaf leaf;
    if (!upt_open_held(&space->upt, va, false, &leaf))
        return false;
    pte_t entry = upt_get(&leaf);
    upt_close_held(&leaf);
    return entry & PTE_P && (entry & PTE_W || !write);
}

/* Whoever unmaps the page takes the lock of the tables first. Where the tables are reached through the pool, which may sleep, the
 * fault is all that there is of the access. */
static bool touch(struct space *space, u32 va, u32 *value, bool write)
{
    if (!rule_kept(RULE_TABLE_WINDOW))
        return true;
    irq_off();
    upt_take(&space->upt);
    bool there = allows(space, va, write);
    if (there) {
        tlb_load(space->upt.cr3);
        volatile u32 *word = (volatile u32 *)va;
        if (write)
            *word = *value;
        else
            *value = *word;
        tlb_load(kpt_root());
    }
    upt_give(&space->upt);
    irq_on();
    return there;
}

static bool access(struct space *space, u32 page, u32 *value, bool write)
{
    u32 va = SCENE_BASE + page * PAGE_SIZE;
    do
        if (space_fault(space, va, write ? FAULT_U | FAULT_W : FAULT_U) != FAULT_FIXED)
            return false;
    while (!touch(space, va, value, write));
    return true;
}

bool scene_store(struct space *space, u32 page, u32 value) { return access(space, page, &value, true); }
bool scene_load(struct space *space, u32 page, u32 *value) { return access(space, page, value, false); }

static u32 hoard[HOARD_MAX];
static u32 hoarded;

void scene_leave_at_most(u32 frames)
{
    while (frames_free() > frames && hoarded < HOARD_MAX) {
        u32 frame = frame_alloc_high();
        scene_want(frame != FRAME_NONE, "there is a frame to take");
        hoard[hoarded++] = frame;
    }
}

void scene_leave_free(u32 frames)
{
    scene_leave_at_most(frames);
    scene_want(frames_free() == frames, "as many frames are free as the case wants");
}

void scene_give_back(void)
{
    while (hoarded)
        frame_put(hoard[--hoarded]);
}
