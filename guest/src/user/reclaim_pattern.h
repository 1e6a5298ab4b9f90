/* In which order a process touches its pages. */
#ifndef RECLAIM_PATTERN_H
#define RECLAIM_PATTERN_H

#include "types.h"

enum pattern { SEQUENTIAL, RANDOM, ZIPF, STRIDE, SHIFT, PATTERNS };

struct walk {
    enum pattern pattern;
    u32 pages, state, step;
    u32 shift_after; /* so many steps the working set moves on */
};

/* Times that the working set moves in all. */
#define SHIFTS 16

/* A walk of `steps` steps. */
struct walk walk_begin(enum pattern pattern, u32 pages, u32 steps, u32 seed);
/* The working set has moved to where it has nothing of what it began with. */
bool walk_has_shifted(const struct walk *walk);
/* The next page, below `pages`. */
u32 walk_next(struct walk *walk);
/* Something drawn from the same source. */
u32 walk_draw(struct walk *walk);

#endif
