/* Program `sweep`: loads and stores over a working set that a TLB holds, and over one that it does not.
 *
 * Story: a chunk of dwords is stored, then loaded: one after the other, or with a stride that goes to another page each time. The
 * next chunk begins where the last one ended, round and round the set. Before the clock starts, each page is touched, so
 * that no page fault is timed.
 * Holds: what was stored is an arithmetic progression, so its sum is known without adding it up; that each value stands in
 * its own place is looked up for some of them. */
#include "sweep_loops.h"
#include "user.h"

#define BASE 0x40000000u
#define SMALL_PAGES 32u
#define LARGE_PAGES 1024u
#define CHUNK 16384u /* dwords; a set holds a whole number of chunks */
#define CHUNKS_PER_PERCENT 4
#define LOOKED_UP 16

struct sweep {
    u32 *base;
    u32 bytes; /* a power of two */
    u32 chunks;
    u32 key; /* the first value of the first chunk */
    u32 wrong;
};

static u32 first_of(const struct sweep *sweep, u32 chunk) { return sweep->key + chunk * 0x85ebca6bu; }

/* first + (first + STEP) + ... over a chunk, modulo 2^32. */
static u32 expected_sum(u32 first) { return CHUNK * first + SWEEP_STEP * (CHUNK / 2 * (CHUNK - 1)); }

static void look_up(struct sweep *sweep, u32 first, u32 offset, u32 stride)
{
    for (u32 i = 0; i < CHUNK; i += CHUNK / LOOKED_UP) {
        u32 at = (offset + i * stride) & (sweep->bytes - 1);
        sweep->wrong += sweep->base[at / 4] != first + i * SWEEP_STEP;
    }
}

static void sequential(struct sweep *sweep)
{
    for (u32 chunk = 0; chunk < sweep->chunks; chunk++) {
        u32 first = first_of(sweep, chunk), offset = chunk * CHUNK * 4 & (sweep->bytes - 1);
        store_sequential(sweep->base + offset / 4, CHUNK / 4, first);
        sweep->wrong += load_sequential(sweep->base + offset / 4, CHUNK / 4) != expected_sum(first);
        look_up(sweep, first, offset, 4);
    }
}

static void strided(struct sweep *sweep)
{
    u32 mask = sweep->bytes - 1;
    for (u32 chunk = 0; chunk < sweep->chunks; chunk++) {
        u32 first = first_of(sweep, chunk), offset = chunk * CHUNK * SWEEP_STRIDE & mask;
        store_strided(sweep->base, CHUNK / 4, first, offset, mask);
        sweep->wrong += load_strided(sweep->base, CHUNK / 4, offset, mask) != expected_sum(first);
        look_up(sweep, first, offset, SWEEP_STRIDE);
    }
}

static void run(const char *phase, void (*way)(struct sweep *), u32 pages, u32 seed, u32 scale)
{
    struct sweep sweep = {
        .base = (u32 *)BASE, .bytes = pages * PAGE_SIZE, .chunks = scale * CHUNKS_PER_PERCENT, .key = seed * 0x2c1b3c6du};
    u32 accesses = sweep.chunks * CHUNK * 2;
    stopwatch_start(phase, "accesses", accesses);
    way(&sweep);
    stopwatch_stop(phase);
    expect(sweep.wrong == 0, "swept memory holds what was stored");
    say("pager: sweep pages=", pages, " accesses=", accesses, " wrong=", sweep.wrong, NULL);
}

u32 program_main(u32 seed, u32 scale, u32 flags)
{
    (void)flags;
    expect(map(BASE, LARGE_PAGES * PAGE_SIZE) == 0, "memory is mapped");
    for (u32 page = 0; page < LARGE_PAGES; page++)
        *(volatile u32 *)(BASE + page * PAGE_SIZE) = page;
    run("sweep.small.sequential", sequential, SMALL_PAGES, seed, scale);
    run("sweep.small.strided", strided, SMALL_PAGES, seed + 1, scale);
    run("sweep.large.sequential", sequential, LARGE_PAGES, seed + 2, scale);
    run("sweep.large.strided", strided, LARGE_PAGES, seed + 3, scale);
    tally_report();
    return 0;
}
