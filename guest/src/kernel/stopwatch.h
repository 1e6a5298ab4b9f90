/* Lines around what is timed, for whoever measures from outside; user/user.h has the same for programs. */
#ifndef STOPWATCH_H
#define STOPWATCH_H

#include "types.h"

/* "time: begin PHASE UNIT=COUNT", then "time: end PHASE tsc1024=N": N in 1024 counts of the time-stamp counter. */
void stopwatch_start(const char *phase, const char *unit, u32 count);
void stopwatch_stop(const char *phase);

#endif
