/* Physical frames: two zones, and a table of frames that exists only as far as frames were handed out.
 *
 * Story: a machine may have gigabytes that a run never touches, so nothing here is proportional to memory. Each zone has a
 * frontier; frames beyond it have no entry in the table and were never touched. An allocation takes the free list's
 * head, else that of the frames that the host has been told are free, else moves the frontier one frame and makes the frame's
 * entry, backing the table's page first if need be.
 *
 *   low    [end of kernel image, lowmem)        high   [lowmem, end of RAM)
 *
 * Holds: an entry is readable if and only if its frame is, or ever was, in use. The frames behind the table itself, and the
 * kernel's page tables, have no entry and are never freed.
 * Locks: LOCK_PAGES, but for looks at how many are free. Interrupt handlers allocate nothing. */
#include "frames.h"

#include "boot.h"
#include "check.h"
#include "kpt.h"
#include "locks.h"
#include "lru.h"
#include "pace.h"
#include "rule.h"
#include "string.h"

struct frontier {
    u32 first, end;  /* the zone's bounds */
    u32 range, next; /* where the frontier is: a memory range and a frame in it */
    u32 free;        /* head of the free list */
    u32 told;        /* of that of free frames which the host knows of, and may have taken what was behind them */
    u32 in_use;
    u32 available;   /* beyond the frontier, and on the free list */
};

static struct frontier zones[ZONES];
static struct frame *const table = (struct frame *)FRAME_TABLE_BASE;

extern const char kernel_end[];

u32 frames_low_end READ_MOSTLY;

static u32 zone_of(u32 frame) { return frame_is_low(frame) ? ZONE_LOW : ZONE_HIGH; }


/* The next frame beyond the frontier that is RAM, or none. */
static u32 frontier_advance(struct frontier *zone)
{
    for (; zone->range < boot.range_count; zone->range++, zone->next = 0) {
        const struct memory_range *range = &boot.ranges[zone->range];
        u32 frame = max_u32(max_u32(range->start, zone->first), zone->next);
        if (frame < min_u32(range->end, zone->end)) {
            zone->next = frame + 1;
            zone->available--;
            return frame;
        }
    }
    return FRAME_NONE;
}

static u32 alloc_untracked_held(void)
{
    u32 frame = frontier_advance(&zones[ZONE_LOW]);
    if (frame == FRAME_NONE)
        panic("no low memory left for a kernel page table: raise lowmem=");
    clear_page(low_address(frame));
    return frame;
}

u32 frame_alloc_untracked(void)
{
    pages_take();
    u32 frame = alloc_untracked_held();
    pages_give();
    return frame;
}

static void back_entry(u32 frame)
{
    u32 va = (u32)&table[frame] & PAGE_MASK;
    if (!(kpt_get(va) & PTE_P))
        kpt_set(va, pte_make(alloc_untracked_held(), kpt_data_bits()));
}

static u32 count_ram(const struct frontier *zone)
{
    u32 count = 0;
    for (u32 i = 0; i < boot.range_count; i++) {
        u32 start = max_u32(boot.ranges[i].start, zone->first), end = min_u32(boot.ranges[i].end, zone->end);
        count += end > start ? end - start : 0;
    }
    return count;
}

void frames_init(void)
{
    u32 end = 0, limit = paging.pae ? FRAMES_MAX : 1u << 20;
    u32 ram = boot.options.ram;
    if (!ram && scene_looks_on)
        ram = RAM_OF_RECLAIM_SLOW;
    if (!ram && boot.options.workload == WORKLOAD_RECLAIM)
        ram = pace_is_fast() ? RAM_OF_RECLAIM_FAST : RAM_OF_RECLAIM_SLOW;
    if (ram)
        limit = min_u32(limit, ram * (MIB / PAGE_SIZE));
    for (u32 i = 0; i < boot.range_count; i++)
        end = max_u32(end, boot.ranges[i].end);
    end = min_u32(end, limit);
    u32 low_end = min_u32(boot.options.lowmem * (MIB / PAGE_SIZE), end);
    zones[ZONE_LOW].first = low_physical(kernel_end) >> PAGE_SHIFT;
    zones[ZONE_LOW].end = frames_low_end = low_end;
    zones[ZONE_HIGH].first = low_end;
    zones[ZONE_HIGH].end = end;
    zones[ZONE_LOW].available = count_ram(&zones[ZONE_LOW]);
    zones[ZONE_HIGH].available = count_ram(&zones[ZONE_HIGH]);
    kpt_cover(FRAME_TABLE_BASE, (u32)&table[end]);
}

static u32 alloc_from(struct frontier *zone)
{
    u32 *list = zone->free != FRAME_NONE ? &zone->free : &zone->told;
    u32 frame = *list;
    if (frame != FRAME_NONE) {
        *list = table[frame].link;
        zone->available--;
    } else {
        frame = frontier_advance(zone);
        if (frame == FRAME_NONE)
            return FRAME_NONE;
        back_entry(frame);
    }
    table[frame] = (struct frame){.refs = 1};
    zone->in_use++;
    return frame;
}

u32 frame_alloc_held(enum zone which)
{
    u32 frame = alloc_from(&zones[which]);
    return frame == FRAME_NONE && which == ZONE_HIGH ? alloc_from(&zones[ZONE_LOW]) : frame;
}

u32 frame_alloc_high(void)
{
    pages_take();
    u32 frame = alloc_from(&zones[ZONE_HIGH]);
    pages_give();
    return frame;
}

u32 frame_alloc(enum zone which)
{
    pages_take();
    u32 frame = frame_alloc_held(which);
    pages_give();
    return frame;
}

/* Nobody holds it any more. */
static void free_frame(u32 frame)
{
    if (table[frame].flags & FRAME_LISTED)
        lru_remove_held(frame);
    struct frontier *zone = &zones[zone_of(frame)];
    table[frame].link = zone->free;
    zone->free = frame;
    zone->in_use--;
    zone->available++;
}

void frame_put_held(u32 frame)
{
    ASSERT(table[frame].refs);
    if (--table[frame].refs == 0)
        free_frame(frame);
}

void frame_get(u32 frame)
{
    pages_take();
    frame_get_held(frame);
    pages_give();
}

void frame_put(u32 frame)
{
    pages_take();
    frame_put_held(frame);
    pages_give();
}

u32 frames_take_unreported(u32 *frames, u32 most)
{
    u32 count = 0;
    struct frontier *zone = &zones[ZONE_HIGH];
    pages_take();
    while (count < most && zone->free != FRAME_NONE)
        frames[count++] = alloc_from(zone);
    pages_give();
    return count;
}

void frames_put_reported(const u32 *frames, u32 count)
{
    struct frontier *zone = &zones[ZONE_HIGH];
    for (u32 i = 0; i < count; i++) {
        pages_take();
        frame_put_held(frames[i]);
        ASSERT(zone->free == frames[i]);
        zone->free = table[frames[i]].link;
        table[frames[i]].link = zone->told;
        zone->told = frames[i];
        pages_give();
    }
}

/* Left to the frontier, so that there is something for everybody else. */
#define TOP_SPARE 512

u32 frames_take_top(u32 most, u32 align, u32 *bytes)
{
    struct frontier *zone = &zones[ZONE_HIGH];
    u32 first = 0, size = 0, unit = align >> PAGE_SHIFT;
    pages_take();
    for (u32 i = zone->range; i < boot.range_count; i++) {
        const struct memory_range *range = &boot.ranges[i];
        u32 start = max_u32(max_u32(range->start, zone->first), i == zone->range ? zone->next : 0) + TOP_SPARE;
        u32 end = ALIGN_DOWN(min_u32(range->end, zone->end), unit);
        start = ALIGN_DOWN(start + unit - 1, unit);
        /* The last of the ranges that are there: the zone ends before it. */
        if (i + 1 == boot.range_count && end > start) {
            size = min_u32(end - start, most >> PAGE_SHIFT) << PAGE_SHIFT;
            first = end - (size >> PAGE_SHIFT);
        }
    }
    if (size) {
        u32 before = count_ram(zone);
        zone->end = first;
        zone->available -= before - count_ram(zone);
    }
    pages_give();
    *bytes = size;
    return first;
}

u32 frames_in_use(void) { return zones[ZONE_LOW].in_use + zones[ZONE_HIGH].in_use; }
/* Low memory is for the kernel, unless there is next to nothing else. */
#define HIGH_MIN 256

static u32 ever(enum zone zone) { return zones[zone].available + zones[zone].in_use; }
static bool high_alone(void) { return ever(ZONE_HIGH) >= HIGH_MIN; }

u32 frames_free(void) { return zones[ZONE_HIGH].available + (high_alone() ? 0 : zones[ZONE_LOW].available); }
u32 frames_total(void) { return ever(ZONE_HIGH) + (high_alone() ? 0 : ever(ZONE_LOW)); }
