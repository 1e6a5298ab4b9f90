/* Disks: virtio block devices, in whole pages. */
#ifndef BLK_H
#define BLK_H

#include "types.h"

struct virtio_device;

#define BLK_NAME_BYTES 20
/* Pages of one request. */
#define BLK_PAGES_MAX 32
#define SECTORS_PER_PAGE 8

enum blk_operation { BLK_READ, BLK_WRITE, BLK_FLUSH, BLK_IDENTIFY, BLK_DISCARD, BLK_WRITE_ZEROES, BLK_OPERATIONS };

/* What went over a disk, as the disk itself should have it. */
struct blk_counts {
    u32 requests[BLK_OPERATIONS];
    u32 pages[BLK_OPERATIONS];
    u32 errors;
};

struct blk;
struct blk_request;

/* From virtio.c: takes a device, if it can be driven. */
bool blk_attach(struct virtio_device *device);

/* The disk of that name (what the device says of itself), or NULL. */
struct blk *blk_find(const char *name);
u32 blk_pages(const struct blk *disk);
bool blk_read_only(const struct blk *disk);
const struct blk_counts *blk_counts(const struct blk *disk);

/* Begins to read or write `count` frames, 1..=BLK_PAGES_MAX, from or to the disk's page `page` on. The frames are held until
 * blk_wait. While too many requests are under way it sleeps, or returns NULL where it may not: whoever has a request under way
 * must not wait for a second, or two such wait for each other. */
struct blk_request *blk_start(struct blk *disk, enum blk_operation operation, u32 page, const u32 *frames, u32 count,
                              bool may_wait);
/* Sleeps until it is done; true if it went well. The request is gone then. */
bool blk_wait(struct blk_request *request);
/* Sleeps until some request of any disk has ended, whoever waits for it; false if none is under way. */
bool blk_wait_any(void);

/* Both at once. */
bool blk_transfer(struct blk *disk, enum blk_operation operation, u32 page, const u32 *frames, u32 count);
/* The same of one page of the kernel's image, which has no entry in the frame table. */
bool blk_transfer_kernel(struct blk *disk, enum blk_operation operation, u32 page, u32 frame);
/* What was written before is on the medium. */
bool blk_flush(struct blk *disk);
/* `pages` pages from `page` on are not wanted any more. A hint: true where the disk does not take it. */
bool blk_discard(struct blk *disk, u32 page, u32 pages);
/* `pages` pages from `page` on are zeros; false where the disk cannot do that by itself. */
bool blk_write_zeroes(struct blk *disk, u32 page, u32 pages);

#endif
