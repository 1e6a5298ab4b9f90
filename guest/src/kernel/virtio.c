/* virtio over MMIO.
 *
 * Story: the board has a row of transports, each empty or with a device behind it. Their interrupt lines go to the second
 * IOAPIC where there is one, as on QEMU's microvm with ACPI; all share one vector, and each is asked by its status register.
 * Limits: version 2 transports alone (QEMU: -global virtio-mmio.force-legacy=false); no indirect descriptors, no event index.
 * Locks: a ring is touched with devices_take alone.
 * See: virtio 1.2, 2.7 (split virtqueues) and 4.2 (MMIO). */
#include "virtio.h"

#include "apic.h"
#include "balloon.h"
#include "blk.h"
#include "check.h"
#include "console.h"
#include "frames.h"
#include "irq.h"
#include "kpt.h"
#include "locks.h"

#define TRANSPORT_PHYSICAL 0xfeb00000
#define TRANSPORT_BYTES 0x200
#define TRANSPORTS 24

#define REG_MAGIC 0x000
#define REG_VERSION 0x004
#define REG_DEVICE_ID 0x008
#define REG_DEVICE_FEATURES 0x010
#define REG_DEVICE_FEATURES_SELECT 0x014
#define REG_DRIVER_FEATURES 0x020
#define REG_DRIVER_FEATURES_SELECT 0x024
#define REG_QUEUE_SELECT 0x030
#define REG_QUEUE_SIZE_MAX 0x034
#define REG_QUEUE_SIZE 0x038
#define REG_QUEUE_READY 0x044
#define REG_QUEUE_NOTIFY 0x050
#define REG_INTERRUPT_STATUS 0x060
#define REG_INTERRUPT_ACK 0x064
#define REG_STATUS 0x070
#define REG_QUEUE_DESC 0x080
#define REG_QUEUE_AVAIL 0x090
#define REG_QUEUE_USED 0x0a0
#define REG_CONFIG_GENERATION 0x0fc
#define REG_CONFIG 0x100

#define MAGIC 0x74726976 /* "virt" */
#define VERSION 2

#define STATUS_ACKNOWLEDGE 1
#define STATUS_DRIVER 2
#define STATUS_DRIVER_OK 4
#define STATUS_FEATURES_OK 8
#define STATUS_FAILED 128

#define FEATURE_VERSION_1_HIGH 1 /* bit 32 */
#define INTERRUPT_CONFIG 2

#define DESC_NEXT 1
#define DESC_WRITE 2
#define USED_NO_NOTIFY 1

struct virtq_desc {
    u64 address;
    u32 bytes;
    u16 flags, next;
};

struct virtq_avail {
    u16 flags, index;
    u16 ring[VIRTQ_SIZE_MAX];
};

struct virtq_used {
    u16 flags, index;
    struct {
        u32 head, bytes;
    } ring[VIRTQ_SIZE_MAX];
};

static struct virtio_device devices[TRANSPORTS];
static struct lock lock;

void devices_take(void)
{
    irq_off();
    lock_take(&lock, LOCK_DEVICES);
}

void devices_give(void)
{
    lock_give(&lock, LOCK_DEVICES);
    irq_on();
}

static u32 get(const struct virtio_device *device, u32 reg)
{
    return *(const volatile u32 *)(device->registers + reg);
}

static void set(const struct virtio_device *device, u32 reg, u32 value)
{
    *(volatile u32 *)(device->registers + reg) = value;
}

static void add_status(const struct virtio_device *device, u32 bit) { set(device, REG_STATUS, get(device, REG_STATUS) | bit); }

static void attach(struct virtio_device *device, u32 slot)
{
    bool taken = false;
    if (device->id == VIRTIO_ID_BLOCK)
        taken = blk_attach(device);
    else if (device->id == VIRTIO_ID_BALLOON)
        taken = balloon_attach(device);
    if (taken)
        apic_unmask_virtio(slot);
}

void virtio_init(void)
{
    for (u32 at = 0; at < TRANSPORTS * TRANSPORT_BYTES; at += PAGE_SIZE)
        kpt_map_device(VIRTIO_BASE + at, TRANSPORT_PHYSICAL + at);
    for (u32 slot = 0; slot < TRANSPORTS; slot++) {
        struct virtio_device *device = &devices[slot];
        device->registers = (volatile u8 *)VIRTIO_BASE + slot * TRANSPORT_BYTES;
        if (get(device, REG_MAGIC) != MAGIC || get(device, REG_DEVICE_ID) == 0)
            continue;
        if (get(device, REG_VERSION) != VERSION) {
            printk("pager: virtio slot %u is legacy; not used\n", slot);
            continue;
        }
        device->id = get(device, REG_DEVICE_ID);
        attach(device, slot);
    }
}

void virtio_interrupt(void)
{
    for (struct virtio_device *device = devices; device < devices + TRANSPORTS; device++) {
        u32 status = device->interrupt ? get(device, REG_INTERRUPT_STATUS) : 0;
        if (!status)
            continue;
        set(device, REG_INTERRUPT_ACK, status);
        if (status & INTERRUPT_CONFIG)
            device->config_changes++;
        devices_take();
        device->interrupt(device);
        devices_give();
    }
}

bool virtio_negotiate(struct virtio_device *device, u32 wanted, u32 *got)
{
    set(device, REG_STATUS, 0);
    while (get(device, REG_STATUS) != 0)
        barrier();
    add_status(device, STATUS_ACKNOWLEDGE);
    add_status(device, STATUS_DRIVER);
    set(device, REG_DEVICE_FEATURES_SELECT, 1);
    u32 high = get(device, REG_DEVICE_FEATURES) & FEATURE_VERSION_1_HIGH;
    set(device, REG_DEVICE_FEATURES_SELECT, 0);
    *got = get(device, REG_DEVICE_FEATURES) & wanted;
    set(device, REG_DRIVER_FEATURES_SELECT, 0);
    set(device, REG_DRIVER_FEATURES, *got);
    set(device, REG_DRIVER_FEATURES_SELECT, 1);
    set(device, REG_DRIVER_FEATURES, high);
    add_status(device, STATUS_FEATURES_OK);
    if (high && get(device, REG_STATUS) & STATUS_FEATURES_OK)
        return true;
    add_status(device, STATUS_FAILED);
    return false;
}

void virtio_ready(struct virtio_device *device) { add_status(device, STATUS_DRIVER_OK); }

/* A low frame for a part of a queue; tells the device where it is. */
static void *queue_page(struct virtio_device *device, u32 reg)
{
    u32 frame = frame_alloc_untracked();
    set(device, reg, frame << PAGE_SHIFT);
    set(device, reg + 4, 0);
    return low_address(frame);
}

bool virtq_init(struct virtio_device *device, u32 index, struct virtq *queue)
{
    set(device, REG_QUEUE_SELECT, index);
    u32 most = get(device, REG_QUEUE_SIZE_MAX);
    if (most == 0 || get(device, REG_QUEUE_READY))
        return false;
    queue->index = index;
    queue->size = min_u32(most, VIRTQ_SIZE_MAX);
    set(device, REG_QUEUE_SIZE, queue->size);
    queue->desc = queue_page(device, REG_QUEUE_DESC);
    queue->avail = queue_page(device, REG_QUEUE_AVAIL);
    queue->used = queue_page(device, REG_QUEUE_USED);
    for (u32 i = 0; i < queue->size; i++)
        queue->desc[i].next = (u16)(i + 1);
    queue->free_head = 0;
    queue->free_count = (u16)queue->size;
    queue->used_seen = 0;
    set(device, REG_QUEUE_READY, 1);
    return true;
}

bool virtq_add(struct virtq *queue, const struct virtq_part *parts, u32 out, u32 in, void *owner)
{
    u32 count = out + in;
    ASSERT(count > 0);
    if (count > queue->free_count)
        return false;
    u16 head = queue->free_head, at = head;
    for (u32 i = 0; i < count; i++) {
        volatile struct virtq_desc *desc = &queue->desc[at];
        desc->address = parts[i].address;
        desc->bytes = parts[i].bytes;
        desc->flags = (u16)((i >= out ? DESC_WRITE : 0) | (i + 1 < count ? DESC_NEXT : 0));
        at = desc->next;
    }
    queue->free_head = at;
    queue->free_count -= (u16)count;
    queue->owners[head] = owner;
    queue->avail->ring[queue->avail->index % queue->size] = head;
    barrier();
    queue->avail->index++;
    return true;
}

void virtq_kick(struct virtio_device *device, struct virtq *queue)
{
    /* The index must be out before it is asked whether the device looks by itself. */
    __asm__ volatile("lock addl $0, (%%esp)" : : : "memory");
    if (!(queue->used->flags & USED_NO_NOTIFY))
        set(device, REG_QUEUE_NOTIFY, queue->index);
}

void *virtq_take(struct virtq *queue, u32 *bytes)
{
    if (queue->used_seen == queue->used->index)
        return NULL;
    barrier();
    u32 head = queue->used->ring[queue->used_seen % queue->size].head;
    *bytes = queue->used->ring[queue->used_seen % queue->size].bytes;
    queue->used_seen++;
    if (head >= queue->size || !queue->owners[head])
        panic("virtio device answers descriptor %u, which was not offered", head);
    u32 last = head, count = 1;
    for (; queue->desc[last].flags & DESC_NEXT; count++)
        last = queue->desc[last].next;
    queue->desc[last].next = queue->free_head;
    queue->free_head = (u16)head;
    queue->free_count += (u16)count;
    void *owner = queue->owners[head];
    queue->owners[head] = NULL;
    return owner;
}

u32 virtio_config32(const struct virtio_device *device, u32 offset) { return get(device, REG_CONFIG + offset); }

u64 virtio_config64(const struct virtio_device *device, u32 offset)
{
    u32 generation, low, high;
    do {
        generation = get(device, REG_CONFIG_GENERATION);
        low = virtio_config32(device, offset);
        high = virtio_config32(device, offset + 4);
    } while (get(device, REG_CONFIG_GENERATION) != generation);
    return (u64)high << 32 | low;
}

void virtio_set_config32(struct virtio_device *device, u32 offset, u32 value) { set(device, REG_CONFIG + offset, value); }
