/* Address spaces of processes: regions, and the pages behind them. */
#ifndef SPACE_H
#define SPACE_H

#include "layout.h"
#include "upt.h"

#define REGION_WRITE (1u << 0)
#define REGION_EXEC (1u << 1)
#define REGION_GROWS_DOWN (1u << 2)
#define REGION_FILE (1u << 3) /* the shared file's first pages, by all who map them together (file.h) */

/* [start, end), page aligned. Pages appear when they are touched: from the image as far as it reaches, then zeros. */
struct region {
    u32 start, end;
    u32 flags;
    const u8 *image; /* contents at `start`, or NULL */
    u32 image_bytes;
};

struct space {
    struct space *next, *previous; /* all there are: spaces */
    volatile bool live;                     /* one of them: spaces stand in the task table, so an old pointer can be asked */
    volatile bool doomed;          /* its memory was taken: no fault is mended any more */
    struct upt upt;
    u32 brk_start, brk;
    u32 region_count;
    struct region regions[REGIONS_MAX]; /* unsorted, disjoint */
};

/* All address spaces, for whoever looks for the mappings of a page; with the lock of the list. */
extern struct space *spaces;
void spaces_take(void);
void spaces_give(void);
/* True while it is one of them: of a pointer that may be old. It stays so for whoever has its tables' lock. */
static inline bool space_is_live(const struct space *space) { return space->live; }

/* Makes the zero page. */
void space_init(void);

bool space_create(struct space *space);
/* Frees everything; the space must not be loaded. */
void space_destroy(struct space *space);
/* Makes `child`, already created, a copy that shares every page; both sides copy a page when they write to it. On failure
 * (out of memory) the child is to be destroyed. */
bool space_fork(struct space *parent, struct space *child);

/* Where the part of [va, end) that is in one page table ends. */
static inline u32 table_end(u32 va, u32 end) { return min_u32(ALIGN_DOWN(va, table_reach()) + table_reach(), end); }

/* Pages of its own that it has, in memory and in swap. */
u32 space_pages(struct space *space);
/* Takes them all, wherever its task is, which must not come back to user mode with them. */
void space_reap(struct space *space);

/* False if the range is not user memory, overlaps a region, or there are too many regions. */
bool space_map(struct space *space, struct region region);
/* Takes the range out of whatever regions it meets, and frees its pages. False if a region would have to be split and there
 * are too many, or a part of the file's: a region of the file begins with its first page. */
bool space_unmap(struct space *space, u32 start, u32 end);
/* Moves the end of the heap; returns the new end, or the old one if that cannot be. */
u32 space_brk(struct space *space, u32 end);

struct region *space_find(struct space *space, u32 va);
/* Extends the stack's region down to the page of `va`, if it may grow that far; else NULL. */
struct region *space_grow_stack(struct space *space, u32 va);

enum fault_result {
    FAULT_FIXED,
    FAULT_BAD_ACCESS,    /* no region, or one that does not allow it */
    FAULT_OUT_OF_MEMORY,
    FAULT_NO_FRAME,      /* others have taken what room was made for: to be tried again */
    FAULT_LOST,          /* the page cannot be read back */
};

/* fault.c: a page fault at a user address, from user or kernel mode. May sleep, and holds nothing then. */
enum fault_result space_fault(struct space *space, u32 va, u32 error);

/* The page of zeros that untouched memory reads from; it is never freed. */
extern u32 zero_frame;

#endif
