/* The loop of program `spin`, and how many instructions it has. Also read by the assembler. */
#ifndef SPIN_LOOP_H
#define SPIN_LOOP_H

/* Instructions of one turn, whichever way its branch goes, and of a call without its turns. */
#define SPIN_TURN 16
#define SPIN_CALL 18

#ifndef __ASSEMBLER__
#include "types.h"

struct spin {
    u32 a, d, s, t;
};

/* `turns` turns, at least one, on `state`. */
void spin_loop(u32 turns, struct spin *state);
#endif

#endif
