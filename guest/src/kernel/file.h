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
};
extern struct file_counts file_counts;

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
/* Everything is on the disk: contents, block map, superblock. Sleeps. False after an I/O error. */
bool file_sync(void);

#endif
