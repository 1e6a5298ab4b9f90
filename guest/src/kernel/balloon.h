/* virtio-balloon: memory that the host asks for, statistics, and pages that are free anyway. */
#ifndef BALLOON_H
#define BALLOON_H

#include "types.h"

struct virtio_device;

/* From virtio.c: takes a device, if it can be driven. */
bool balloon_attach(struct virtio_device *device);
/* Starts the thread that does what the host asks, where there is a balloon. */
void balloon_start(void);

/* Frames in the balloon: in use, and nobody's leak. */
u32 balloon_held(void);
/* Takes frames back against the host's wish, as many as are wanted and there are; returns how many. Sleeps. */
u32 balloon_give_back(u32 frames);
/* From the clock interrupt. */
void balloon_tick(void);

struct balloon_counts {
    u32 inflated, deflated, deflated_for_want, reported;
};
extern struct balloon_counts balloon_counts;

#endif
