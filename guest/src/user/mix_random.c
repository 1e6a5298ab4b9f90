/* Numbers that look random: xorshift, 32 bits of state, never 0. */
#include "mix.h"

u32 random_next(u32 *state)
{
    u32 x = *state ? *state : 0x9e3779b9u;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return *state = x;
}
