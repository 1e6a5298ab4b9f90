/* In which order a process touches its pages. */
#ifndef RECLAIM_PATTERN_H
#define RECLAIM_PATTERN_H

#include "types.h"

enum pattern { SEQUENTIAL, RANDOM, ZIPF, STRIDE, SHIFT, PATTERNS };

struct walk {
    enum pattern pattern;
    u32 pages, state, step;
};

struct walk walk_begin(enum pattern pattern, u32 pages, u32 seed);
/* The next page, below `pages`. */
u32 walk_next(struct walk *walk);
/* Something drawn from the same source. */
u32 walk_draw(struct walk *walk);

#endif
