/* Regions of memory whose contents somebody outside shall confirm. */
#ifndef WITNESS_H
#define WITNESS_H

#include "types.h"
#include "umbra_abi.h"

/* Computes the CRC of the frames in order, enters them in the witness table and takes a reference to each, so that they
 * keep their contents until the run ends. `name` has WITNESS_NAME_BYTES. False if the table is full. */
bool witness_publish(const char *name, const u32 *frames, u32 count);

/* Frames that the table holds: what a workload that publishes leaves in use. */
u32 witness_frames(void);

/* After the last check of the guest's own. */
void witness_seal(void);

#endif
