/* Whether the CPU is one that can be given much to do. */
#ifndef PACE_H
#define PACE_H

#include "types.h"

/* True unless each instruction takes a thousand counts of the time-stamp counter, as under a KVM that emulates them; or as `pace=`
 * says. The same at each call. */
bool pace_is_fast(void);

#endif
