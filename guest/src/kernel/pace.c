/* Whether the CPU is one that can be given much to do.
 *
 * Story: a CPU, an interpreter and a translator need some tens of counts for an instruction at most, a KVM that emulates each some
 * thousands. The least of a few measurements counts, since anything may come between. */
#include "pace.h"

#include "boot.h"
#include "cpu.h"

#define TRIES 4
#define INSTRUCTIONS 64
#define SLOW_COUNTS 300 /* for an instruction */

static u32 measure(void)
{
    u64 start = read_time_stamp();
    for (u32 left = INSTRUCTIONS / 2; left; left--)
        barrier();
    return (u32)(read_time_stamp() - start);
}

bool pace_is_fast(void)
{
    if (boot.options.pace == PACE_AUTO) {
        u32 least = measure();
        for (u32 i = 1; i < TRIES; i++)
            least = min_u32(least, measure());
        boot.options.pace = least > INSTRUCTIONS * SLOW_COUNTS ? PACE_SLOW : PACE_FAST;
    }
    return boot.options.pace == PACE_FAST;
}
