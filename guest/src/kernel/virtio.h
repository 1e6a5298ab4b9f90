/* virtio over MMIO: devices found, features agreed on, queues run. */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "types.h"

#define VIRTIO_ID_BLOCK 2
#define VIRTIO_ID_BALLOON 5

#define VIRTQ_SIZE_MAX 256

struct virtq_part {
    u64 address; /* guest-physical */
    u32 bytes;
};

struct virtq_desc;
struct virtq_avail;
struct virtq_used;

/* A split ring of its own, in three low frames. */
struct virtq {
    u32 index, size;
    volatile struct virtq_desc *desc;
    volatile struct virtq_avail *avail;
    volatile struct virtq_used *used;
    u16 free_head, free_count, used_seen;
    void *owners[VIRTQ_SIZE_MAX]; /* by the head of a chain */
};

struct virtio_device {
    u32 id;
    volatile u8 *registers;
    u32 config_changes; /* interrupts that said so */
    /* Called from the interrupt handler. */
    void (*interrupt)(struct virtio_device *device);
};

/* Looks for devices, and gives each to its driver. Needs apic_init. */
void virtio_init(void);
void virtio_interrupt(void);
/* Around everything that touches rings, or what their interrupts change: LOCK_DEVICES, with interrupts off. Handlers have it. */
void devices_take(void);
void devices_give(void);

/* Agrees on VERSION_1 and what of `wanted` the device offers, in `got`; false if the device will not have it. */
bool virtio_negotiate(struct virtio_device *device, u32 wanted, u32 *got);
/* Sets a queue up, of VIRTQ_SIZE_MAX descriptors or as many as the device takes; false if there is none. */
bool virtq_init(struct virtio_device *device, u32 index, struct virtq *queue);
/* After its queues: the device may work now. */
void virtio_ready(struct virtio_device *device);

/* Offers a chain: `out` parts that the device reads, then `in` parts that it writes. False when descriptors are short. */
bool virtq_add(struct virtq *queue, const struct virtq_part *parts, u32 out, u32 in, void *owner);
/* Tells the device, if it wants to be told. */
void virtq_kick(struct virtio_device *device, struct virtq *queue);
/* The owner of a chain that the device is done with, and the bytes that it wrote; NULL when there is none. */
void *virtq_take(struct virtq *queue, u32 *bytes);

/* Device-specific configuration. */
u32 virtio_config32(const struct virtio_device *device, u32 offset);
u64 virtio_config64(const struct virtio_device *device, u32 offset);
void virtio_set_config32(struct virtio_device *device, u32 offset, u32 value);

#endif
