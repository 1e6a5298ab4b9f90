/* Which CPUs there are, as the firmware's tables tell. Runs with paging off: see early.c. */
#ifndef TOPOLOGY_H
#define TOPOLOGY_H

#include "types.h"

/* The local APIC ids of the CPUs that may be used, up to `most`; returns how many. 0 where no table tells. */
u32 topology_find(u8 *apic_ids, u32 most);

#endif
