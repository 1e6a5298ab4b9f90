/* Program `spin`: integer arithmetic in registers.
 *
 * Story: the loop (spin_loop.S) runs in chunks, each from the same start. Its end is computed once more, by the few lines of
 * C below, and every chunk must come to it. So the check costs one chunk, however many are run.
 * Holds: what is counted is the instructions in the loop's own file; the calls around it are a few in each chunk. */
#include "spin_loop.h"
#include "user.h"

#define CHUNK_TURNS 4096u
#define CHUNKS_PER_PERCENT 16

static u32 rotate_left(u32 value, u32 by) { return value << by | value >> (32 - by); }

/* `left` is how many turns are left, this one included. */
static void expected_turn(struct spin *x, u32 left)
{
    x->a = x->a * 1664525 + 1013904223;
    x->d = (x->d ^ x->a >> 13) + 2 * x->s + 1;
    x->s += x->d < x->a;
    x->s = left % 8 == 0 ? rotate_left(x->s ^ x->a, 7) : x->s + x->d;
    x->t = rotate_left(x->t - x->s, 29);
}

static bool same(const struct spin *x, const struct spin *y)
{
    return x->a == y->a && x->d == y->d && x->s == y->s && x->t == y->t;
}

u32 program_main(u32 seed, u32 scale, u32 flags)
{
    (void)flags;
    const struct spin start = {seed, ~seed, seed << 16, 0x5eed};
    struct spin expected = start, state = start;
    u32 chunks = scale * CHUNKS_PER_PERCENT, wrong = 0;
    u32 instructions = chunks * (CHUNK_TURNS * SPIN_TURN + SPIN_CALL);
    for (u32 left = CHUNK_TURNS; left; left--)
        expected_turn(&expected, left);
    stopwatch_start("spin.loop", "instructions", instructions);
    for (u32 chunk = 0; chunk < chunks; chunk++) {
        state = start;
        spin_loop(CHUNK_TURNS, &state);
        wrong += !same(&state, &expected);
    }
    stopwatch_stop("spin.loop");
    expect(wrong == 0, "every chunk of the loop comes to the same end");
    say("pager: spin instructions=", instructions, " chunks=", chunks, " wrong=", wrong, " value=", state.t, NULL);
    tally_report();
    return 0;
}
