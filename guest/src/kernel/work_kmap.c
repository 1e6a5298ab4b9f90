/* Workload `kmap`: high memory through the temporary window and the persistent pool.
 *
 *   frames   hundreds of high frames, each written and later checked through a window
 *   nest     windows to the full depth, on distinct frames
 *   order    a release out of order, and one without a mapping, are refused
 *   alias    one frame through both, each sees the other's stores
 *   pool     more frames than slots, so that sweeps must free idle ones
 *   share    threads take slots in turn, on all CPUs: each sweep by one is a sweep for all
 *   full     every slot held: taking one more fails, or sleeps until one is released
 *   switch   two threads hold windows on the same slots and take turns
 *
 * Interrupts are on throughout, and each tick takes a window of its own (tick.c). */
#include "boot.h"
#include "check.h"
#include "console.h"
#include "frames.h"
#include "kmap.h"
#include "string.h"
#include "task.h"
#include "tick.h"
#include "window.h"
#include "witness.h"
#include "work.h"

#define FRAMES_DEFAULT 256
#define FRAMES_MOST (FRAMES_DEFAULT * SCALE_MAX / 100)
#define WORDS_CHECKED 16
#define WORD_STEP (PAGE_SIZE / 4 / WORDS_CHECKED)
#define WITNESSED 8
#define SWITCH_ROUNDS 4

static const u32 low_key = 0x10f;

static u32 frames[FRAMES_MOST];
static u32 frame_count;

static u32 mix(u32 a, u32 b)
{
    u32 x = (a ^ boot.options.seed * 0x9e3779b9u) + b * 0x85ebca6bu;
    x ^= x >> 15;
    x *= 0x2c1b3c6du;
    return x ^ x >> 13;
}

static void fill(u32 *page, u32 key)
{
    for (u32 i = 0; i < WORDS_CHECKED; i++)
        page[i * WORD_STEP + i] = mix(key, i);
}

static bool holds(const u32 *page, u32 key)
{
    for (u32 i = 0; i < WORDS_CHECKED; i++)
        if (page[i * WORD_STEP + i] != mix(key, i))
            return false;
    return true;
}

static bool take_frames(void)
{
    frame_count = max_u32(FRAMES_DEFAULT * boot.options.scale / 100, POOL_SLOTS + 1);
    for (u32 i = 0; i < frame_count; i++) {
        frames[i] = frame_alloc(ZONE_HIGH);
        if (frames[i] == FRAME_NONE)
            return false;
    }
    return true;
}

static void give_frames_back(void)
{
    for (u32 i = 0; i < frame_count && frames[i] != FRAME_NONE; i++)
        frame_put(frames[i]);
}

static void test_frames(void)
{
    u32 wrong = 0;
    for (u32 i = 0; i < frame_count; i++) {
        u32 *page = kmap_local(frames[i], "fill");
        fill(page, i);
        kunmap_local(page);
    }
    for (u32 i = 0; i < frame_count; i++) {
        u32 *page = kmap_local(frames[i], "verify");
        wrong += !holds(page, i);
        kunmap_local(page);
    }
    check(wrong == 0, "every high frame holds its pattern");
    printk("pager: kmap frames=%u wrong=%u\n", frame_count, wrong);
}

static void test_nest(void)
{
    u32 *pages[WINDOW_TASK_DEPTH_MAX];
    u32 right = 0;
    window_reset_high_water();
    for (u32 i = 0; i < WINDOW_TASK_DEPTH_MAX; i++)
        pages[i] = kmap_local(frames[i * 3], "nest");
    for (u32 i = 0; i < WINDOW_TASK_DEPTH_MAX; i++)
        right += holds(pages[i], i * 3);
    for (u32 i = WINDOW_TASK_DEPTH_MAX; i-- > 0;)
        kunmap_local(pages[i]);
    check(right == WINDOW_TASK_DEPTH_MAX, "nested windows show their own frames");
    check(window_depth() == 0, "nested windows are released");
    check(window_high_water() == WINDOW_TASK_DEPTH_MAX, "the high-water mark is the depth that was reached");
    printk("pager: kmap nest depth=%u high-water=%u\n", right, window_high_water());
}

static void test_order(void)
{
    u32 refused = window_release(frames) == WINDOW_EMPTY;
    u32 *first = kmap_local(frames[0], "order");
    u32 *second = kmap_local(frames[1], "order");
    refused += window_release(first) == WINDOW_OUT_OF_ORDER;
    check(refused == 2, "wrong releases are refused");
    check(holds(first, 0) && holds(second, 1), "a refused release changes nothing");
    kunmap_local(second);
    kunmap_local(first);
    printk("pager: kmap order refused=%u\n", refused);
}

static void test_alias(void)
{
    u32 *pooled = kmap(frames[5]);
    u32 *windowed = kmap_local(frames[5], "alias");
    check(pooled != windowed && holds(pooled, 5) && holds(windowed, 5), "both mappings show the frame");
    windowed[7] = 0x11112222;
    check(pooled[7] == 0x11112222, "a store through the window is seen in the pool");
    pooled[7] = 0x33334444;
    check(windowed[7] == 0x33334444, "a store through the pool is seen in the window");
    kunmap_local(windowed);
    check(kmap(frames[5]) == pooled, "a frame has one slot in the pool");
    kunmap(pooled);
    kunmap(pooled);
    printk("pager: kmap alias mappings=2\n");
}

static void test_pool(void)
{
    u32 wrong = 0;
    for (u32 i = 0; i < frame_count; i++) {
        u32 *page = kmap(frames[i]);
        wrong += !holds(page, i);
        fill(page, i + 1);
        kunmap(page);
    }
    for (u32 i = 0; i < frame_count; i++) {
        u32 *page = kmap_local(frames[i], "after the pool");
        wrong += !holds(page, i + 1);
        kunmap_local(page);
    }
    check(wrong == 0, "the pool shows the right frames after every sweep");
    printk("pager: kmap pool slots=%u taken=%u sweeps=%u swept=%u wrong=%u\n", POOL_SLOTS, frame_count,
           pool_counts.sweeps, pool_counts.reclaimed, wrong);
}

#define SHARERS 4

static u32 share_errors;

/* Each has every fourth frame, and goes on where there is a CPU for it. */
static void sharer(u32 which)
{
    u32 wrong = 0;
    for (u32 round = 0; round < 2; round++)
        for (u32 i = which; i < frame_count; i += SHARERS) {
            u32 *page = kmap(frames[i]);
            wrong += !holds(page, i + 1);
            kunmap(page);
            schedule();
        }
    share_errors += wrong;
}

static void test_share(void)
{
    u32 status;
    share_errors = 0;
    for (u32 which = 0; which < SHARERS; which++)
        check(task_start_thread("sharer", sharer, which) != NULL, "a thread starts");
    for (u32 which = 0; which < SHARERS; which++)
        check(task_wait_child(&status) != 0, "the thread ends");
    check(share_errors == 0, "the pool shows each thread its own frames");
    printk("pager: kmap share threads=%u wrong=%u\n", SHARERS, share_errors);
}

static void waiter(u32 frame)
{
    u32 *page = kmap(frame);
    page[9]++;
    kunmap(page);
}

/* Another CPU may be slow to run the thread. */
#define TURNS_MAX 1000000

/* Holds every slot, starts a thread that needs one more, lets it fall asleep, then gives one back. */
static void test_full(void)
{
    u32 *pages[POOL_SLOTS];
    u32 status, waits_before = pool_counts.waits, spare = frames[POOL_SLOTS];
    for (u32 i = 0; i < POOL_SLOTS; i++)
        pages[i] = kmap(frames[i]);
    check(kmap_try(spare) == NULL, "a full pool has no slot");
    pages[0][9] = 41;
    kunmap(pages[0]);
    u32 *refilled = kmap(spare);
    check(refilled == pages[0], "the slot that was released is the one that is swept");
    refilled[9] = 41;
    check(task_start_thread("waiter", waiter, frames[0]) != NULL, "a thread starts");
    for (u32 turns = 0; turns < TURNS_MAX && pool_counts.waits == waits_before; turns++)
        schedule();
    check(pool_counts.waits == waits_before + 1, "the thread waits for a slot");
    kunmap(refilled);
    check(task_wait_child(&status) != 0, "the thread ends");
    for (u32 i = 1; i < POOL_SLOTS; i++)
        kunmap(pages[i]);
    u32 *page = kmap_local(frames[0], "what the waiter did");
    check(page[9] == 42, "the thread wrote once it had its slot");
    kunmap_local(page);
    printk("pager: kmap full slots=%u waits=%u\n", POOL_SLOTS, pool_counts.waits - waits_before);
}

static u32 switch_errors;

/* Two of these run in turn: each holds two windows over every switch, on the slots that the other uses too. */
static void switcher(u32 which)
{
    u32 *outer = kmap_local(frames[10 + which], "switch, outer");
    u32 *inner = kmap_local(frames[20 + which], "switch, inner");
    for (u32 round = 0; round < SWITCH_ROUNDS; round++) {
        outer[3] = which * 100 + round;
        inner[3] = which * 200 + round;
        schedule();
        switch_errors += outer[3] != which * 100 + round || inner[3] != which * 200 + round;
        switch_errors += window_depth() != 2;
    }
    kunmap_local(inner);
    kunmap_local(outer);
}

static void test_switch(void)
{
    u32 status;
    switch_errors = 0;
    for (u32 which = 1; which <= 2; which++)
        check(task_start_thread("switcher", switcher, which) != NULL, "a thread starts");
    for (u32 which = 1; which <= 2; which++)
        check(task_wait_child(&status) != 0, "the thread ends");
    check(switch_errors == 0, "windows survive a switch");
    printk("pager: kmap switch threads=2 rounds=%u errors=%u\n", SWITCH_ROUNDS, switch_errors);
}

static void publish(void)
{
    u32 low = frame_alloc(ZONE_LOW);
    check(low != FRAME_NONE && frame_is_low(low), "there is a low frame");
    clear_page(low_address(low));
    fill(low_address(low), low_key);
    check(witness_publish("kernel-buffer\0\0", &low, 1), "the kernel's buffer is published");
    frame_put(low);
    check(witness_publish("kmap-frames\0\0\0\0", &frames[frame_count - WITNESSED], WITNESSED), "the window's frames are published");
}

void work_kmap(void)
{
    if (take_frames()) {
        test_frames();
        test_nest();
        test_order();
        test_alias();
        test_pool();
        test_share();
        test_full();
        test_switch();
        check(tick_stamp_holds(), "ticks stamp their page");
        publish();
    } else {
        check(false, "there is high memory for the workload");
    }
    give_frames_back();
}
