/* In which order a process touches its pages.
 *
 *   sequential   one after the other, round and round: the worst for LRU
 *   random       each as likely as any other
 *   zipf         page n as often as 1 / n, nearly: what most programs do
 *   stride       every 17th: neighbours in swap are of no use
 *   shift        random in a window of an eighth, which moves on by half of itself from time to time,
 *                once over all pages: a working set that changes */
#include "reclaim_pattern.h"

#define STRIDE_PAGES 17

struct walk walk_begin(enum pattern pattern, u32 pages, u32 steps, u32 seed)
{
    u32 shift_after = steps / SHIFTS ? steps / SHIFTS : 1;
    return (struct walk){.pattern = pattern, .pages = pages, .state = seed * 0x9e3779b9u | 1, .shift_after = shift_after};
}

bool walk_has_shifted(const struct walk *walk) { return walk->step / walk->shift_after >= 2; }

/* xorshift32 (Marsaglia 2003). */
u32 walk_draw(struct walk *walk)
{
    u32 x = walk->state;
    x ^= x << 13;
    x ^= x >> 17;
    return walk->state = x ^ x << 5;
}

/* A power of two at random, and a page below it: each octave is as likely as the next. */
static u32 zipf(struct walk *walk)
{
    u32 octaves = 1;
    while (octaves < 31 && 1u << octaves < walk->pages)
        octaves++;
    u32 octave = walk_draw(walk) % (octaves + 1);
    return (walk_draw(walk) & ((1u << octave) - 1)) % walk->pages;
}

static u32 shift(struct walk *walk)
{
    u32 window = walk->pages / 8 + 1, base = walk->step / walk->shift_after * (window / 2);
    return (base + walk_draw(walk) % window) % walk->pages;
}

u32 walk_next(struct walk *walk)
{
    u32 step = walk->step++;
    switch (walk->pattern) {
    case SEQUENTIAL: return step % walk->pages;
    case RANDOM: return walk_draw(walk) % walk->pages;
    case ZIPF: return zipf(walk);
    case STRIDE: return step * STRIDE_PAGES % walk->pages;
    default: return shift(walk);
    }
}
