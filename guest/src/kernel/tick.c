/* The clock interrupt's work: count, and stamp the count into a page of high memory.
 *
 * Story: the stamp makes every tick take a window slot on top of whatever the interrupted code holds, which is what an
 * interrupt handler of a kernel with high memory does. */
#include "tick.h"

#include "apic.h"
#include "balloon.h"
#include "check.h"
#include "frames.h"
#include "irq.h"
#include "window.h"

static u32 stamp_frame;
void (*tick_also)(void);

void tick_init(void)
{
    stamp_frame = frame_alloc(ZONE_HIGH);
    ASSERT(stamp_frame != FRAME_NONE);
}

void tick(void)
{
    /* Stamped, then counted: another CPU may look in between. */
    u32 next = ticks + 1;
    u32 *page = kmap_local(stamp_frame, "tick");
    page[next % (PAGE_SIZE / 4)] = next;
    kunmap_local(page);
    if (tick_also)
        tick_also();
    barrier();
    ticks = next;
    balloon_tick();
}

bool tick_stamp_holds(void)
{
    irq_off();
    u32 *page = kmap_local(stamp_frame, "tick check");
    bool holds = ticks == 0 || page[ticks % (PAGE_SIZE / 4)] == ticks;
    kunmap_local(page);
    irq_on();
    return holds;
}
