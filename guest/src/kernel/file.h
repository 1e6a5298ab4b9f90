/* One shared writable file, on a disk of its own: pages in memory, blocks on the disk, and a file system of the smallest kind. */
#ifndef FILE_H
#define FILE_H

#include "blk.h"
#include "space.h"
#include "syscalls.h"

struct file_counts {
    u32 faults, waits, reads, writes, pages_written;
    u32 blocks_allocated, blocks_freed, truncations;
    u32 left_alone; /* pages that reclaim did not take because of that */
    u32 least_free; /* frames, when there was one for the bitmap's copy */
    u32 retries, nested; /* of the cures below: times that the lock was dropped, and that it was taken by who had it */
};
extern struct file_counts file_counts;

/* What keeps an allocation under the superblock's lock from coming back for that lock: a scope without GFP_FS, as the kernel has it;
 * and what else was thought of in 1999, for the scenes that compare. */
enum file_cure { CURE_NO_IO, CURE_RESERVE, CURE_RECURSIVE, CURE_RETRY, CURE_COUNT };
void file_choose_cure(enum file_cure cure);

/* Makes an empty file system on the disk, with a file without pages; false if it cannot be. */
bool file_mount(struct blk *disk);
/* A region that maps the file from `start` on, shared. False where there is one: a page of the file has one place in a space. */
bool file_map(struct space *space, u32 start);

/* A fault in a region of the file. May sleep. */
enum fault_result file_fault(struct space *space, const struct region *region, u32 page);
/* Where the space has a page of the file; false if nowhere. */
bool file_address(struct space *space, u32 index, u32 *va);
/* A frame that a mapping with D had is let go of. */
void file_note_dirty(u32 frame);

/* The file's cache has the frame; and takes it out, which must be unmapped and clean, for who has LOCK_PAGES as well. */
bool file_has(u32 frame);
void file_forget_held(u32 frame);
/* The page has its place on the disk. */
bool file_has_block(u32 index);
/* False while the file is being cut off or synced: its pages are not to be taken then, and reclaim does not wait. */
bool file_may_write_out(void);
/* Writes those that are dirty; sleeps. They are unmapped; one that could not be written stays dirty. For reclaim. */
void file_write_out(const u32 *frames, u32 count);

/* The file has `pages` pages; what lies beyond is gone, and reads as zeros when the file has become longer again. Sleeps. */
bool file_truncate(u32 pages);
/* Gives a page its block before it is written. False beyond the file's length, or when the disk is full or fails. Sleeps. */
bool file_reserve(u32 index);
/* A write of `count` pages from `first` on, one word of each, with the lock of the inode. Sleeps. */
bool file_write(u32 first, u32 count, u32 value);
/* The first word of a page. Sleeps. */
bool file_read(u32 index, u32 *value);
/* Pages in memory, of those from `first` to `end`. */
u32 file_count_cached(u32 first, u32 end);
/* Everything is on the disk: contents, block map, superblock. Sleeps. False after an I/O error. */
bool file_sync(void);

#endif
