/* One shared writable file.
 *
 *   disk page 0   superblock: magic, pages of the file, sum of the contents of those that have a block, blocks in use
 *             1   bitmap of the pages in use
 *             2   block map: for each page of the file the disk page that has it, 0 for none (a hole: zeros)
 *             3.. contents
 *
 * Jobs: 1. blocks, 2. the page cache, 3. write-out, 4. truncate, 5. sync.
 *
 * Story: a page gets its block when it is first written out, which is what file systems do to lay it well, and why reclaim
 * comes to want the file system's lock: the thread of 1999 begins here. Who reserves a block before that (file_reserve) allocates
 * under the lock, and is why there are scopes. The locks, and who may wait for them:
 *
 *   sb_lock        the bitmap and the block map; I/O and an allocation happen under it
 *   inode_lock     one write at a time; an allocation happens under it, and page-out does without
 *   truncate_lock  the file's length; held over everything that a truncation waits for, and alone: write-outs by reclaim, which
 *                  go on side by side, begin only while nobody has it, and whoever takes it waits for those to end
 *
 * Reclaim waits for sb_lock, but only for a task that holds neither (GFP_FS); it never waits for truncate_lock, and leaves the
 * page alone. Whoever holds one is in a scope without GFP_FS: the allocation under it then does not come back here.
 *
 * Locks: the kernel's, but where it is lent; flags of pages change under LOCK_PAGES besides.
 *
 * Holds: INV-G-FILE-1: a page of the cache that is neither dirty nor mapped with D is what the disk has. INV-G-FILE-2: no page
 * beyond the file's length is in the cache once a truncation is over, and no block is its. */
#include "file.h"

#include "audit.h"
#include "check.h"
#include "console.h"
#include "locks.h"
#include "lru.h"
#include "mutex.h"
#include "reclaim.h"
#include "rmap.h"
#include "rule.h"
#include "string.h"
#include "swap.h"
#include "window.h"

#define MAGIC 0x53464d55 /* "UMFS" */
#define SUPERBLOCK 0
#define BITMAP 1
#define BLOCK_MAP 2
#define FIRST_BLOCK 3
#define BLOCKS_MAX (PAGE_SIZE * 8)

struct superblock {
    u32 magic, pages, sum, blocks_used;
    u32 zeros[PAGE_SIZE / 4 - 4];
};

static struct blk *disk;
static u32 length; /* in pages */
static u32 cached[FILE_PAGES_MAX];
static u32 block_map[FILE_PAGES_MAX] __attribute__((aligned(PAGE_SIZE)));
static u8 bitmap[PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));
static u32 block_count, blocks_used, next_block;
static struct mutex sb_lock = {.name = "superblock"}, truncate_lock = {.name = "truncate lock"}, inode_lock = {.name = "inode"};
static u32 write_outs; /* by reclaim, under way */
static u32 spare;      /* a frame for the bitmap's copy, where none can be had; of whoever has sb_lock */
struct file_counts file_counts;

static bool write_low(u32 page, const void *low)
{
    u32 frame = low_physical(low) >> PAGE_SHIFT;
    return blk_transfer_kernel(disk, BLK_WRITE, page, frame);
}

/* Job 1: blocks. sb_lock is held, in a scope without GFP_FS. The twin forgets the scope, and always reclaims. */
#ifdef FILE_TWIN
#define SCOPE_OF_SB_LOCK 0
#define ROOM_OF_COPY (frames_free() + 1)
#else
#define SCOPE_OF_SB_LOCK GFP_FS
#define ROOM_OF_COPY 1
#endif

static bool in_use(u32 block) { return bitmap[block / 8] & 1u << block % 8; }
static void flip(u32 block) { bitmap[block / 8] ^= (u8)(1u << block % 8); }

static u32 find_block(void)
{
    for (u32 step = 0; step < block_count - FIRST_BLOCK; step++) {
        u32 block = FIRST_BLOCK + (next_block + step) % (block_count - FIRST_BLOCK);
        if (!in_use(block))
            return block;
    }
    return 0;
}

static enum file_cure cure;
void file_choose_cure(enum file_cure chosen) { cure = chosen; }

/* What a task was before it took sb_lock. */
struct before {
    u32 gfp;
    bool makes_room, nested;
};

static struct before sb_take(void)
{
    struct before before = {reclaim_scope(0), current->makes_room, mutex_is_mine(&sb_lock) && cure == CURE_RECURSIVE};
    if (cure == CURE_NO_IO && rule_kept(RULE_SB_SCOPE))
        reclaim_scope(SCOPE_OF_SB_LOCK);
    if (cure == CURE_RESERVE)
        current->makes_room = true;
    file_counts.nested += before.nested;
    if (!before.nested)
        mutex_lock(&sb_lock);
    while (cure == CURE_RETRY && !room_is_there(1)) {
        u32 free = frames_free();
        mutex_unlock(&sb_lock);
        file_counts.retries++;
        try_room(1);
        mutex_lock(&sb_lock);
        if (frames_free() <= free)
            break;
    }
    place_pass(PLACE_SB_HELD);
    return before;
}

static void sb_give(struct before before)
{
    if (!before.nested)
        mutex_unlock(&sb_lock);
    current->makes_room = before.makes_room;
    reclaim_restore(before.gfp);
}

/* A frame for the bitmap's copy. */
static u32 frame_of_copy(void)
{
    if (!rule_kept(RULE_SB_RESERVE))
        reclaim_await(1);
    u32 copy = try_room(ROOM_OF_COPY) ? frame_alloc(ZONE_HIGH) : FRAME_NONE;
    file_counts.least_free = min_u32(file_counts.least_free, frames_free());
    if (copy == FRAME_NONE)
        frame_get(copy = spare);
    return copy;
}

/* What is on the disk is a copy, as a journal would have it: the bitmap may change while it is written. */
static bool write_bitmap(u32 copy)
{
    void *to = kmap_local(copy, "bitmap");
    copy_page(to, bitmap);
    kunmap_local(to);
    bool ok = blk_transfer(disk, BLK_WRITE, BITMAP, &copy, 1);
    frame_put(copy);
    return ok;
}

static bool is_cut_off(u32 index) { return index >= length && rule_kept(RULE_TRUNCATE); }

/* The block of a page, a new one if it has none; 0 when the disk is full or fails, or the page has been cut off. */
static u32 block_for(u32 index)
{
    if (block_map[index])
        return block_map[index];
    struct before before = sb_take();
    u32 block = block_map[index] || is_cut_off(index) ? 0 : find_block();
    if (block) {
        u32 copy = rule_kept(RULE_SB_WHOLE) ? FRAME_NONE : frame_of_copy();
        flip(block);
        next_block = block + 1 - FIRST_BLOCK;
        blocks_used++;
        file_counts.blocks_allocated++;
        block_map[index] = block;
        if (!write_bitmap(copy == FRAME_NONE ? frame_of_copy() : copy))
            tally.errors++;
    }
    block = block_map[index];
    sb_give(before);
    return block;
}

static void free_blocks(u32 first, u32 end)
{
    struct before before = sb_take();
    for (u32 index = first; index < end; index++) {
        if (!block_map[index])
            continue;
        flip(block_map[index]);
        if (!blk_discard(disk, block_map[index], 1))
            tally.errors++;
        block_map[index] = 0;
        blocks_used--;
        file_counts.blocks_freed++;
    }
    if (!write_bitmap(frame_of_copy()))
        tally.errors++;
    sb_give(before);
}

bool file_mount(struct blk *on)
{
    u32 blocks = min_u32(blk_pages(on), BLOCKS_MAX);
    if (blk_read_only(on) || blocks <= FIRST_BLOCK)
        return false;
    spare = frame_alloc(ZONE_HIGH);
    if (spare == FRAME_NONE)
        return false;
    disk = on;
    block_count = blocks;
    for (u32 block = 0; block < FIRST_BLOCK; block++)
        flip(block);
    return file_sync();
}

/* Job 2: the page cache. */

static bool is_mapped(const struct space *space)
{
    for (u32 i = 0; i < space->region_count; i++)
        if (space->regions[i].flags & REGION_FILE)
            return true;
    return false;
}

bool file_map(struct space *space, u32 start)
{
    struct region region = {.start = start, .end = start + FILE_PAGES_MAX * PAGE_SIZE, .flags = REGION_WRITE | REGION_FILE};
    return disk && !is_mapped(space) && space_map(space, region);
}

bool file_address(struct space *space, u32 index, u32 *va)
{
    for (u32 i = 0; i < space->region_count; i++) {
        const struct region *region = &space->regions[i];
        *va = region->start + (index << PAGE_SHIFT);
        if (region->flags & REGION_FILE && *va < region->end)
            return true;
    }
    return false;
}

bool file_has(u32 frame)
{
    const struct frame *page = frame_of(frame);
    return page->flags & FRAME_FILE && cached[page->index] == frame;
}

void file_forget_held(u32 frame)
{
    ASSERT(file_has(frame));
    cached[frame_of(frame)->index] = FRAME_NONE;
    frame_put_held(frame);
}

static void forget(u32 frame)
{
    pages_take();
    file_forget_held(frame);
    pages_give();
}

void file_note_dirty(u32 frame)
{
    if (frame_of(frame)->flags & FRAME_FILE)
        frame_mark(frame, FRAME_DIRTY, 0);
}

static void clear_frame(u32 frame)
{
    void *page = kmap_local(frame, "hole");
    kernel_lend();
    clear_page(page);
    kernel_regain();
    kunmap_local(page);
}

/* Has the cache have the page. False when it cannot be read. */
static bool fill(u32 index)
{
    u32 frame = frame_alloc(ZONE_HIGH), block = block_map[index];
    if (frame == FRAME_NONE)
        return true;
    struct frame *page = frame_of(frame);
    page->flags = FRAME_FILE | FRAME_READING;
    page->index = index;
    cached[index] = frame;
    bool ok = true;
    if (block) {
        file_counts.reads++;
        ok = blk_transfer(disk, BLK_READ, block, &frame, 1);
    } else {
        clear_frame(frame);
    }
    frame_arrived(frame, 0, FRAME_READING);
    if (ok)
        lru_add(frame, LRU_INACTIVE);
    else
        forget(frame);
    return ok;
}

/* The page, with a reference; FRAME_NONE with the reason in `why`. */
static u32 get_page(u32 index, enum fault_result *why)
{
    while (index < length) {
        u32 frame = cached[index];
        if (frame == FRAME_NONE) {
            *why = FAULT_OUT_OF_MEMORY;
            if (!make_room(1))
                return FRAME_NONE;
            *why = FAULT_LOST;
            if (cached[index] == FRAME_NONE && index < length && !fill(index))
                return FRAME_NONE;
            continue;
        }
        frame_get(frame);
        frame_wait_while(frame, FRAME_READING);
        if (cached[index] == frame)
            return frame;
        frame_put(frame);
    }
    *why = FAULT_BAD_ACCESS;
    return FRAME_NONE;
}

/* A fault on the page waits for the disk. */
static bool is_to_be_read(u32 index)
{
    u32 frame = cached[index];
    return frame == FRAME_NONE ? file_has_block(index) : frame_of(frame)->flags & FRAME_READING;
}

/* Every mapping may be written through: D tells whether it was. */
enum fault_result file_fault(struct space *space, const struct region *region, u32 page)
{
    u32 index = (page - region->start) >> PAGE_SHIFT;
    enum fault_result why = FAULT_FIXED;
    struct leaf leaf;
    file_counts.faults++;
    file_counts.waits += is_to_be_read(index);
    u32 frame = get_page(index, &why);
    if (frame == FRAME_NONE)
        return why;
    if (!upt_open(&space->upt, page, true, &leaf)) {
        frame_put(frame);
        return FAULT_NO_FRAME;
    }
    if (upt_get(&leaf) || space->doomed)
        frame_put(frame);
    else
        upt_enter(&leaf, pte_make(frame, PTE_P | PTE_U | PTE_W | PTE_A | paging.nx));
    upt_close(&leaf);
    return FAULT_FIXED;
}

/* Job 3: write-out. */

static void write_one(u32 frame)
{
    struct frame *page = frame_of(frame);
    frame_mark(frame, FRAME_WRITING, FRAME_DIRTY);
    place_pass(PLACE_PAGE_OUT);
    u32 block = block_for(page->index);
    bool written = block && blk_transfer(disk, BLK_WRITE, block, &frame, 1);
    file_counts.writes++;
    file_counts.pages_written += written;
    frame_arrived(frame, written ? 0 : FRAME_DIRTY, FRAME_WRITING);
}

bool file_has_block(u32 index) { return block_map[index]; }

bool file_may_write_out(void)
{
    if (!rule_kept(RULE_TRUNCATE))
        return true;
    file_counts.left_alone += truncate_lock.owner != NULL;
    return !truncate_lock.owner;
}

/* Page-out had the inode's lock for as long as there was no truncate_lock; one of a task's batch after the other. */
static void begin_page_out(void)
{
    write_outs += rule_kept(RULE_TRUNCATE);
    if (!rule_kept(RULE_INODE))
        mutex_lock(&inode_lock);
}

static void end_page_out(void)
{
    if (!rule_kept(RULE_INODE))
        mutex_unlock(&inode_lock);
    if (rule_kept(RULE_TRUNCATE) && --write_outs == 0)
        task_wake(&write_outs);
}

/* The length may be locked since the pages were picked: other write-outs have slept meanwhile. */
void file_write_out(const u32 *frames, u32 count)
{
    for (u32 i = 0; i < count; i++) {
        if (!(frame_of(frames[i])->flags & FRAME_DIRTY))
            continue;
        if (!file_has(frames[i]) || !file_may_write_out())
            continue;
        begin_page_out();
        write_one(frames[i]);
        end_page_out();
    }
}

static void lock_length(void)
{
    mutex_lock(&truncate_lock);
    while (write_outs)
        task_wait_for("a page-out", &write_outs);
}

/* Job 4: truncate. */

static void drop(u32 index)
{
    u32 frame = cached[index];
    if (frame == FRAME_NONE)
        return;
    frame_get(frame);
    rmap_unmap(frame);
    frame_wait_while(frame, rule_kept(RULE_TRUNCATE) ? FRAME_READING | FRAME_WRITING : FRAME_READING);
    rmap_unmap(frame);
    frame_mark(frame, 0, FRAME_DIRTY);
    if (file_has(frame))
        forget(frame);
    frame_put(frame);
}

bool file_truncate(u32 pages)
{
    if (!disk || pages > FILE_PAGES_MAX || pages + FIRST_BLOCK > block_count)
        return false;
    u32 before = reclaim_scope(GFP_FS);
    lock_length();
    u32 end = length;
    length = pages;
    for (u32 index = pages; index < end; index++)
        drop(index);
    if (pages < end)
        free_blocks(pages, end);
    file_counts.truncations++;
    mutex_unlock(&truncate_lock);
    reclaim_restore(before);
    return true;
}

bool file_reserve(u32 index) { return index < length && block_for(index); }

/* Reading and writing without a mapping. */

static bool store(u32 index, u32 value)
{
    enum fault_result why;
    u32 frame = get_page(index, &why);
    if (frame == FRAME_NONE)
        return false;
    u32 *words = kmap_local(frame, "file, write");
    words[0] = value;
    kunmap_local(words);
    frame_mark(frame, FRAME_DIRTY, 0);
    frame_put(frame);
    return true;
}

bool file_write(u32 first, u32 count, u32 value)
{
    bool ok = true;
    mutex_lock(&inode_lock);
    for (u32 index = first; index < first + count && ok; index++)
        ok = store(index, value + index);
    mutex_unlock(&inode_lock);
    return ok;
}

bool file_read(u32 index, u32 *value)
{
    enum fault_result why;
    u32 frame = get_page(index, &why);
    if (frame == FRAME_NONE)
        return false;
    const u32 *words = kmap_local(frame, "file, read");
    *value = words[0];
    kunmap_local(words);
    frame_put(frame);
    return true;
}

u32 file_count_cached(u32 first, u32 end)
{
    u32 count = 0;
    for (u32 index = first; index < end; index++)
        count += cached[index] != FRAME_NONE;
    return count;
}

/* Job 5: sync. */

/* Writes the page if it is dirty, and adds it to the sum. */
static bool sync_page(u32 index, u32 *sum)
{
    enum fault_result why;
    u32 frame = get_page(index, &why);
    if (frame == FRAME_NONE)
        return false;
    if (rmap_unmap(frame))
        frame_mark(frame, FRAME_DIRTY, 0);
    frame_wait_while(frame, FRAME_WRITING);
    if (frame_of(frame)->flags & FRAME_DIRTY)
        write_one(frame);
    bool ok = !(frame_of(frame)->flags & FRAME_DIRTY);
    if (block_map[index]) {
        const u32 *words = kmap_local(frame, "sync");
        *sum = sum_page(*sum, words);
        kunmap_local(words);
    }
    /* Nobody maps it: it need not wait for reclaim. */
    if (ok && frame_of(frame)->refs == 2)
        forget(frame);
    frame_put(frame);
    return ok;
}

static struct superblock superblock __attribute__((aligned(PAGE_SIZE)));

bool file_sync(void)
{
    bool ok = true;
    u32 sum = 0, before = reclaim_scope(GFP_FS);
    lock_length();
    for (u32 index = 0; index < length; index++)
        if (cached[index] || block_map[index])
            ok &= sync_page(index, &sum);
    superblock.magic = MAGIC;
    superblock.pages = length;
    superblock.sum = sum;
    superblock.blocks_used = blocks_used;
    ok &= write_low(BITMAP, bitmap) && write_low(BLOCK_MAP, block_map) && write_low(SUPERBLOCK, &superblock);
    ok &= blk_flush(disk);
    mutex_unlock(&truncate_lock);
    reclaim_restore(before);
    return ok;
}

bool file_audit(void)
{
    u32 blocks = 0;
    for (u32 index = 0; index < FILE_PAGES_MAX; index++) {
        u32 frame = cached[index];
        blocks += block_map[index] != 0;
        if (frame != FRAME_NONE && (frame_of(frame)->index != index || !frame_of(frame)->refs || !file_has(frame)))
            return false;
        /* While it is being cut off pages are still to be dropped. */
        if (frame != FRAME_NONE && index >= length && !truncate_lock.owner)
            return false;
    }
    return blocks == blocks_used;
}
