/* The clock interrupt's work. */
#ifndef TICK_H
#define TICK_H

#include "types.h"

/* Allocates the page that ticks are stamped into. */
void tick_init(void);
void tick(void);
/* What a scene does in the tick as well. */
extern void (*tick_also)(void);
/* Whether the stamp is that of the last tick. */
bool tick_stamp_holds(void);

#endif
