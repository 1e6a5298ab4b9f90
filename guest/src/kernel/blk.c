/* Disks: virtio block devices.
 *
 * Story: a request has one of a few places of its disk, in low memory, which hold the header and the status that the device
 * reads and writes. Whoever waits for it sleeps on that place; the interrupt handler wakes it.
 * Holds: a place belongs to one caller from blk_start to blk_wait; its frames have a reference each for as long.
 * Locks: LOCK_DEVICES for rings, places and counts. May sleep; needs no memory.
 * See: virtio 1.2, 5.2. */
#include "blk.h"

#include "check.h"
#include "console.h"
#include "frames.h"
#include "locks.h"
#include "string.h"
#include "task.h"
#include "virtio.h"

#define DISKS_MAX 4
#define PLACES 8
#define PARTS_MAX (BLK_PAGES_MAX + 2)

#define FEATURE_RO (1u << 5)
#define FEATURE_FLUSH (1u << 9)
#define FEATURE_DISCARD (1u << 13)
#define FEATURE_WRITE_ZEROES (1u << 14)

/* Of a range: its room on the medium may be given back. */
#define RANGE_UNMAP 1u

#define STATUS_OK 0
#define STATUS_PENDING 0xff

/* What the device reads first, and what it may read instead of pages. */
struct header {
    u32 type, reserved;
    u64 sector;
    struct {
        u64 sector;
        u32 sectors, flags;
    } range;
};

static const u32 types[BLK_OPERATIONS] = {
    [BLK_READ] = 0, [BLK_WRITE] = 1, [BLK_FLUSH] = 4, [BLK_IDENTIFY] = 8, [BLK_DISCARD] = 11,
    [BLK_WRITE_ZEROES] = 13,
};

struct blk_request {
    struct blk *disk; /* NULL: free */
    volatile bool done;
    bool awaited; /* by a task that sleeps */
    volatile u8 status;
    enum blk_operation operation;
    u32 pages; /* that it is about */
    u32 count; /* of frames that it holds */
    u32 frames[BLK_PAGES_MAX];
    struct header header;
    char name[BLK_NAME_BYTES];
};

struct blk {
    struct virtio_device *device;
    struct virtq queue;
    u32 features, pages;
    char name[BLK_NAME_BYTES + 1];
    struct blk_counts counts;
    struct blk_request places[PLACES];
    u32 claimed; /* places whose request is still to be offered: descriptors are kept for them */
    bool wanted; /* somebody found no place */
};

static struct blk disks[DISKS_MAX];
static u32 disk_count;
static volatile u32 under_way, waiters; /* requests that devices have; tasks in blk_wait_any */

/* What the device has done; the lock of devices is held. */
static void take_done(struct blk *disk)
{
    u32 bytes;
    struct blk_request *request;
    while ((request = virtq_take(&disk->queue, &bytes))) {
        request->done = true;
        under_way--;
        task_expected_came(request->awaited ? request : NULL);
    }
    if (waiters)
        task_wake(&under_way);
}

static void interrupt(struct virtio_device *device)
{
    for (struct blk *disk = disks; disk < disks + disk_count; disk++)
        if (disk->device == device)
            take_done(disk);
}

/* A place, and descriptors for the longest request; NULL when there is none. */
static struct blk_request *try_claim(struct blk *disk)
{
    struct blk_request *found = NULL;
    devices_take();
    if (disk->queue.free_count >= (disk->claimed + 1) * PARTS_MAX)
        for (struct blk_request *request = disk->places; request < disk->places + PLACES && !found; request++)
            if (!request->disk)
                found = request;
    if (found) {
        found->disk = disk;
        disk->claimed++;
    }
    disk->wanted |= !found;
    devices_give();
    return found;
}

static struct blk_request *claim(struct blk *disk)
{
    struct blk_request *request;
    task_wait_while(!(request = try_claim(disk)), disk);
    return request;
}

static struct virtq_part part_of(const volatile void *low, u32 bytes)
{
    return (struct virtq_part){low_physical((const void *)low), bytes};
}

/* Offers a claimed request: header, what the device reads, what it writes, status. */
static struct blk_request *offer(struct blk_request *request, const struct virtq_part *middle, u32 count, bool device_writes)
{
    struct virtq_part parts[PARTS_MAX];
    struct blk *disk = request->disk;
    parts[0] = part_of(&request->header, 16);
    for (u32 i = 0; i < count; i++)
        parts[1 + i] = middle[i];
    parts[1 + count] = part_of(&request->status, 1);
    request->done = request->awaited = false;
    request->status = STATUS_PENDING;
    devices_take();
    disk->claimed--;
    disk->counts.requests[request->operation]++;
    disk->counts.pages[request->operation] += request->pages;
    bool offered = virtq_add(&disk->queue, parts, device_writes ? 1 : 1 + count, device_writes ? count + 1 : 1, request);
    ASSERT(offered);
    under_way++;
    task_expect();
    devices_give();
    virtq_kick(disk->device, &disk->queue);
    return request;
}

static struct blk_request *fill_in(struct blk_request *request, enum blk_operation operation, u32 page, u32 pages)
{
    request->count = 0;
    request->header = (struct header){.type = types[operation], .sector = (u64)page * SECTORS_PER_PAGE};
    request->operation = operation;
    request->pages = pages;
    return request;
}

static struct blk_request *prepare(struct blk *disk, enum blk_operation operation, u32 page, u32 pages)
{
    return fill_in(claim(disk), operation, page, pages);
}

struct blk_request *blk_start(struct blk *disk, enum blk_operation operation, u32 page, const u32 *frames, u32 count,
                              bool may_wait)
{
    ASSERT(count > 0 && count <= BLK_PAGES_MAX && page + count <= disk->pages);
    struct virtq_part middle[BLK_PAGES_MAX];
    struct blk_request *request = may_wait ? claim(disk) : try_claim(disk);
    if (!request)
        return NULL;
    fill_in(request, operation, page, count);
    request->count = count;
    pages_take();
    for (u32 i = 0; i < count; i++) {
        frame_get_held(frames[i]);
        request->frames[i] = frames[i];
        middle[i] = (struct virtq_part){(u64)frames[i] << PAGE_SHIFT, PAGE_SIZE};
    }
    pages_give();
    return offer(request, middle, count, operation == BLK_READ);
}

/* Has the end of the request wake who waits; false where it is done. */
static bool await(struct blk_request *request)
{
    devices_take();
    /* The interrupt goes to the first CPU, which would have to call this one. */
    if (smp && !request->done)
        take_done(request->disk);
    bool away = request->awaited = !request->done;
    devices_give();
    return away;
}

bool blk_wait(struct blk_request *request)
{
    struct blk *disk = request->disk;
    /* Others are to have the kernel meanwhile, even where the request is done already. */
    if (smp && has_kernel())
        schedule();
    task_wait_while(await(request), request);
    bool ok = request->status == STATUS_OK;
    pages_take();
    for (u32 i = 0; i < request->count; i++)
        frame_put_held(request->frames[i]);
    pages_give();
    devices_take();
    disk->counts.errors += !ok;
    request->disk = NULL;
    bool wanted = disk->wanted;
    disk->wanted = false;
    devices_give();
    if (wanted)
        task_wake(disk);
    return ok;
}

bool blk_wait_any(void)
{
    task_will_wait(&under_way);
    devices_take();
    bool any = under_way;
    waiters += any;
    devices_give();
    if (!any) {
        task_will_not_wait();
        return false;
    }
    schedule();
    devices_take();
    waiters--;
    devices_give();
    return true;
}

bool blk_transfer(struct blk *disk, enum blk_operation operation, u32 page, const u32 *frames, u32 count)
{
    return blk_wait(blk_start(disk, operation, page, frames, count, true));
}

bool blk_transfer_kernel(struct blk *disk, enum blk_operation operation, u32 page, u32 frame)
{
    struct blk_request *request = prepare(disk, operation, page, 1);
    struct virtq_part part = {(u64)frame << PAGE_SHIFT, PAGE_SIZE};
    return blk_wait(offer(request, &part, 1, operation == BLK_READ));
}

bool blk_flush(struct blk *disk)
{
    if (!(disk->features & FEATURE_FLUSH))
        return true;
    return blk_wait(offer(prepare(disk, BLK_FLUSH, 0, 0), NULL, 0, false));
}

static bool over_range(struct blk *disk, enum blk_operation operation, u32 page, u32 pages, u32 flags)
{
    struct blk_request *request = prepare(disk, operation, 0, pages);
    request->header.range.sector = (u64)page * SECTORS_PER_PAGE;
    request->header.range.sectors = pages * SECTORS_PER_PAGE;
    request->header.range.flags = flags;
    struct virtq_part range = part_of(&request->header.range, sizeof(request->header.range));
    return blk_wait(offer(request, &range, 1, false));
}

bool blk_discard(struct blk *disk, u32 page, u32 pages)
{
    return !(disk->features & FEATURE_DISCARD) || over_range(disk, BLK_DISCARD, page, pages, 0);
}

bool blk_write_zeroes(struct blk *disk, u32 page, u32 pages)
{
    return disk->features & FEATURE_WRITE_ZEROES && over_range(disk, BLK_WRITE_ZEROES, page, pages, RANGE_UNMAP);
}

static bool identify(struct blk *disk)
{
    struct blk_request *request = prepare(disk, BLK_IDENTIFY, 0, 0);
    struct virtq_part name = part_of(request->name, BLK_NAME_BYTES);
    bool ok = blk_wait(offer(request, &name, 1, true));
    memcpy(disk->name, request->name, BLK_NAME_BYTES);
    return ok;
}

/* The name is asked for once interrupts can come: blk_find. */
bool blk_attach(struct virtio_device *device)
{
    if (disk_count == DISKS_MAX)
        return false;
    struct blk *disk = &disks[disk_count];
    disk->device = device;
    u32 wanted = FEATURE_RO | FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES;
    if (!virtio_negotiate(device, wanted, &disk->features) || !virtq_init(device, 0, &disk->queue))
        return false;
    if (disk->queue.size < PARTS_MAX) {
        printk("pager: a disk whose queue has %u descriptors, fewer than the %u of a request; not used\n", disk->queue.size, PARTS_MAX);
        return false;
    }
    disk->pages = (u32)(virtio_config64(device, 0) / SECTORS_PER_PAGE);
    device->interrupt = interrupt;
    virtio_ready(device);
    disk_count++;
    return true;
}

static bool is_named(struct blk *disk, const char *name)
{
    if (!disk->name[0] && !identify(disk))
        return false;
    u32 bytes = strlen(name);
    return memcmp(disk->name, name, bytes) == 0 && disk->name[bytes] == 0;
}

struct blk *blk_find(const char *name)
{
    for (struct blk *disk = disks; disk < disks + disk_count; disk++)
        if (is_named(disk, name))
            return disk;
    return NULL;
}

u32 blk_pages(const struct blk *disk) { return disk->pages; }
bool blk_read_only(const struct blk *disk) { return disk->features & FEATURE_RO; }
const struct blk_counts *blk_counts(const struct blk *disk) { return &disk->counts; }
