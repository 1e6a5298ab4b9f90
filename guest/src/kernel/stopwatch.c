/* Lines around what is timed. One phase at a time. */
#include "stopwatch.h"

#include "console.h"
#include "cpu.h"

static u64 started;

void stopwatch_start(const char *phase, const char *unit, u32 count)
{
    printk("time: begin %s %s=%u\n", phase, unit, count);
    started = read_time_stamp();
}

void stopwatch_stop(const char *phase)
{
    u32 kilocounts = (u32)((read_time_stamp() - started) >> 10);
    printk("time: end %s tsc1024=%u\n", phase, kilocounts);
}
