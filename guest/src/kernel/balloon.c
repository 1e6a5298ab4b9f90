/* virtio-balloon.
 *
 * Jobs: 1. inflate and deflate, 2. statistics, 3. report free pages, 4. the thread.
 *
 * Story: the host writes how many pages it wants and interrupts. The thread allocates them like anybody, making room by reclaim
 * first, and tells the host their numbers; it is told of pages that go back before they are used. What cannot be had without
 * killing somebody is not given, and what was given is taken back before somebody is killed: it is tried again a second later.
 * Once a second the thread also names pages on the free list, those that it has not named since they came there.
 *
 *   free --make_room--> collected --tell the host--> linked --tell the host--> free
 *     ^                     |          (the mutex is held from collected to linked, and from linked to free)
 *     +---somebody's want---+
 *
 * Holds: INV-G-BALLOON-1: a frame that the host has been told of is linked by frame.link, or in the hands of who has the mutex;
 * nobody else uses it. A frame of the balloon has one reference.
 * Locks: the kernel's; for rings and what their interrupts say LOCK_DEVICES. A queue belongs to the thread, but the deflate queue,
 * which belongs to who has the mutex: whoever is short of memory uses it too.
 * See: virtio 1.2, 5.5. */
#include "balloon.h"

#include "apic.h"
#include "boot.h"
#include "check.h"
#include "file.h"
#include "frames.h"
#include "mutex.h"
#include "reclaim.h"
#include "swap.h"
#include "task.h"
#include "virtio.h"

#define FEATURE_MUST_TELL_HOST (1u << 0)
#define FEATURE_STATS (1u << 1)
#define FEATURE_DEFLATE_ON_OOM (1u << 2)
#define FEATURE_REPORTING (1u << 5)

#define CONFIG_NUM_PAGES 0
#define CONFIG_ACTUAL 4

#define BATCH 256
#define REPORT_BATCH 32

enum { INFLATE, DEFLATE, STATS, QUEUES };

#define STATS_COUNT 7
struct stat {
    u16 tag;
    u64 value;
} __attribute__((packed));

/* Tags. */
#define STAT_SWAP_IN 0
#define STAT_SWAP_OUT 1
#define STAT_MAJOR_FAULTS 2
#define STAT_MINOR_FAULTS 3
#define STAT_FREE 4
#define STAT_TOTAL 5
/* Of our own, and passed over by who does not know it: bytes of swap in use. */
#define STAT_SWAPPED 0xf000

static struct {
    struct virtio_device *device;
    u32 features;
    struct virtq queues[QUEUES];
    struct virtq reporting;
    u32 head, held; /* those that the host has, or is being told of */
    u32 collected;  /* numbers in pfns[INFLATE] of frames that the host has not been told of */
    u32 hold_until; /* ticks: before that nothing is given, since somebody was in want */
    u32 in_report; /* frames off the free list for as long as a report takes */
    const struct task *thread;
    volatile bool awake, second;
    volatile bool changed; /* the host wants another number */
    volatile bool answered[QUEUES + 1];
    u32 pfns[QUEUES][BATCH];
    struct stat stats[STATS_COUNT];
    struct mutex telling;
} balloon;

struct balloon_counts balloon_counts;

u32 balloon_held(void) { return balloon.held + balloon.collected + balloon.in_report; }

static void wake(void)
{
    balloon.awake = true;
    task_wake(&balloon);
}

static void take_answers(struct virtq *queue, u32 which)
{
    u32 bytes;
    while (virtq_take(queue, &bytes)) {
        balloon.answered[which] = true;
        if (which == STATS)
            wake();
        else
            task_expected_came(queue);
    }
}

static void interrupt(struct virtio_device *device)
{
    static u32 changes;
    take_answers(&balloon.queues[INFLATE], INFLATE);
    take_answers(&balloon.queues[DEFLATE], DEFLATE);
    if (balloon.features & FEATURE_STATS)
        take_answers(&balloon.queues[STATS], STATS);
    if (balloon.features & FEATURE_REPORTING)
        take_answers(&balloon.reporting, QUEUES);
    if (device->config_changes != changes) {
        changes = device->config_changes;
        balloon.changed = true;
        wake();
    }
}

static bool init_queue(u32 index, struct virtq *queue) { return virtq_init(balloon.device, index, queue); }

bool balloon_attach(struct virtio_device *device)
{
    u32 wanted = FEATURE_MUST_TELL_HOST | FEATURE_STATS | FEATURE_DEFLATE_ON_OOM | FEATURE_REPORTING;
    if (balloon.device || !virtio_negotiate(device, wanted, &balloon.features))
        return false;
    balloon.device = device;
    bool ok = init_queue(INFLATE, &balloon.queues[INFLATE]) && init_queue(DEFLATE, &balloon.queues[DEFLATE]);
    if (balloon.features & FEATURE_STATS)
        ok = ok && init_queue(STATS, &balloon.queues[STATS]);
    /* The queue of free page hints, which we have no use for, has no number where it is not agreed on. */
    if (balloon.features & FEATURE_REPORTING)
        ok = ok && init_queue(balloon.features & FEATURE_STATS ? 3 : 2, &balloon.reporting);
    if (!ok) {
        balloon.device = NULL;
        return false;
    }
    device->interrupt = interrupt;
    virtio_ready(device);
    return true;
}

/* Offers parts in a queue and sleeps until the device has answered. */
static void exchange(struct virtq *queue, u32 which, const struct virtq_part *parts, u32 out, u32 in)
{
    devices_take();
    balloon.answered[which] = false;
    bool offered = virtq_add(queue, parts, out, in, queue);
    ASSERT(offered);
    task_expect();
    virtq_kick(balloon.device, queue);
    devices_give();
    task_wait_while(!balloon.answered[which], queue);
}

/* Job 1: inflate and deflate. */

static void tell(u32 which, u32 count)
{
    struct virtq_part part = {low_physical(balloon.pfns[which]), count * 4};
    exchange(&balloon.queues[which], which, &part, 1, 0);
}

static void publish(void) { virtio_set_config32(balloon.device, CONFIG_ACTUAL, balloon.held); }

/* Something else is to be done than to collect more. */
static bool interrupted(void) { return balloon.changed || balloon.answered[STATS]; }

static bool holds_off(void) { return (int)(ticks - balloon.hold_until) < 0; }

/* High frames alone, and so that as much again stays free as reclaim keeps for itself: low ones are the kernel's. */
static void collect(u32 most)
{
    while (balloon.collected < most && !interrupted() && !holds_off() && try_room(1 + reclaim_min())) {
        u32 frame = frame_alloc_high();
        if (frame == FRAME_NONE)
            break;
        balloon.pfns[INFLATE][balloon.collected++] = frame;
    }
}

/* Whoever is in want waits for the mutex, and finds them linked. */
static u32 give(void)
{
    mutex_lock(&balloon.telling);
    u32 count = balloon.collected;
    balloon.collected = 0;
    balloon.held += count;
    if (count)
        tell(INFLATE, count);
    for (u32 i = 0; i < count; i++) {
        u32 frame = balloon.pfns[INFLATE][i];
        frame_of(frame)->link = balloon.head;
        balloon.head = frame;
    }
    balloon_counts.inflated += count;
    if (count)
        publish();
    mutex_unlock(&balloon.telling);
    return count;
}

/* Up to a batch, fewer where there is something else to do. False when there is no room for even one more page. */
static bool inflate(u32 want)
{
    collect(min_u32(want, BATCH));
    return give() || interrupted();
}

/* Frames that the host has not been told of need no telling. The mutex is held. */
static u32 uncollect(u32 want)
{
    u32 count = min_u32(want, balloon.collected);
    for (u32 i = 0; i < count; i++)
        frame_put(balloon.pfns[INFLATE][--balloon.collected]);
    return count;
}

/* The mutex is held. */
static u32 take_back(u32 want)
{
    u32 count = 0, first = balloon.head;
    while (count < min_u32(want, BATCH) && balloon.head != FRAME_NONE) {
        balloon.pfns[DEFLATE][count++] = balloon.head;
        balloon.head = frame_of(balloon.head)->link;
    }
    if (count == 0)
        return 0;
    tell(DEFLATE, count);
    balloon.held -= count;
    balloon_counts.deflated += count;
    for (u32 i = 0, frame = first, next; i < count; i++, frame = next) {
        next = frame_of(frame)->link;
        frame_of(frame)->link = 0;
        frame_put(frame);
    }
    publish();
    return count;
}

static u32 deflate(u32 want)
{
    mutex_lock(&balloon.telling);
    u32 count = take_back(want);
    mutex_unlock(&balloon.telling);
    return count;
}

u32 balloon_give_back(u32 frames)
{
    if (!(balloon.features & FEATURE_DEFLATE_ON_OOM) || current == balloon.thread)
        return 0;
    u32 want = max_u32(frames, BATCH / 4);
    kernel_take();
    mutex_lock(&balloon.telling);
    u32 given = uncollect(want);
    given += take_back(want - given);
    mutex_unlock(&balloon.telling);
    balloon.hold_until = ticks + boot.options.hz;
    balloon_counts.deflated_for_want += given;
    kernel_give_back();
    return given;
}

/* Job 2: statistics. */

static u32 faults(void)
{
    u32 sum = 0;
    for (const struct cpu *each = cpus; each < cpus_end; each++)
        sum += each->faults;
    return sum;
}

static void offer_stats(void)
{
    if (!(balloon.features & FEATURE_STATS))
        return;
    u32 waited = swap_counts.ins - swap_counts.hits + file_counts.waits;
    const struct stat stats[STATS_COUNT] = {
        {STAT_SWAP_IN, (u64)swap_counts.pages_read << PAGE_SHIFT},
        {STAT_SWAP_OUT, (u64)swap_counts.pages_written << PAGE_SHIFT},
        {STAT_MAJOR_FAULTS, waited},
        {STAT_MINOR_FAULTS, faults() - waited},
        {STAT_FREE, (u64)frames_free() << PAGE_SHIFT},
        {STAT_TOTAL, (u64)(frames_total() - balloon.held) << PAGE_SHIFT},
        {STAT_SWAPPED, (u64)swap_slots_used() << PAGE_SHIFT},
    };
    for (u32 i = 0; i < STATS_COUNT; i++)
        balloon.stats[i] = stats[i];
    struct virtq_part part = {low_physical(balloon.stats), sizeof(balloon.stats)};
    devices_take();
    balloon.answered[STATS] = false;
    if (virtq_add(&balloon.queues[STATS], &part, 1, 0, &balloon.queues[STATS]))
        virtq_kick(balloon.device, &balloon.queues[STATS]);
    devices_give();
}

/* Job 3: report free pages. */

static bool report(void)
{
    u32 frames[REPORT_BATCH];
    struct virtq_part parts[REPORT_BATCH];
    u32 count = balloon.in_report = frames_take_unreported(frames, min_u32(REPORT_BATCH, reclaim_to_spare()));
    for (u32 i = 0; i < count; i++)
        parts[i] = (struct virtq_part){(u64)frames[i] << PAGE_SHIFT, PAGE_SIZE};
    if (count)
        exchange(&balloon.reporting, QUEUES, parts, 0, count);
    balloon_counts.reported += count;
    frames_put_reported(frames, count);
    balloon.in_report = 0;
    return count == REPORT_BATCH;
}

/* Job 4: the thread. */

static void wait_for_work(void)
{
    task_wait_while(!balloon.awake, &balloon);
    balloon.awake = false;
}

/* Statistics are not kept waiting by a long inflation. */
static void adjust(void)
{
    bool more = true;
    while (more) {
        if (balloon.answered[STATS])
            offer_stats();
        balloon.changed = false;
        u32 target = virtio_config32(balloon.device, CONFIG_NUM_PAGES);
        if (balloon.held < target)
            more = inflate(target - balloon.held);
        else
            more = balloon.held > target && deflate(balloon.held - target);
    }
}

static void run(u32 argument)
{
    (void)argument;
    balloon.thread = current;
    offer_stats();
    while (1) {
        wait_for_work();
        adjust();
        while (balloon.features & FEATURE_REPORTING && balloon.second && report())
            barrier();
        balloon.second = false;
    }
}

void balloon_start(void)
{
    if (balloon.device)
        check(task_start_thread("balloon", run, 0), "the balloon's thread starts");
}

void balloon_tick(void)
{
    if (!balloon.device || ticks % boot.options.hz)
        return;
    balloon.second = true;
    wake();
}
