/* Workload `storm`: mappings that come and go, in the kernel here, in a user program by page faults (user/storm.c).
 *
 *   kernel   enter a frame in a kernel page table, store and load through it, take it out, INVLPG
 *
 * Story: more slots than one, and a number of frames that has no factor in common with theirs, so that in time each frame is
 * seen through each slot: a translation that outlives its INVLPG stores into the wrong frame.
 * Holds: every store has a word of its own until the turn comes round again, and a frame remembers its last one. */
#include "boot.h"
#include "check.h"
#include "console.h"
#include "cpu.h"
#include "frames.h"
#include "kpt.h"
#include "omit.h"
#include "process.h"
#include "stopwatch.h"
#include "string.h"
#include "window.h"
#include "work.h"

#define FRAMES 17
#define ROUNDS_PER_PERCENT 1000
#define WORDS (PAGE_SIZE / 4)

static u32 frames[FRAMES];
/* The page-table entry for each. */
static pte_t entries[FRAMES];

/* The slot and the word of a round, and what it stores. Its frame is round % FRAMES. */
static u32 slot_of_round(u32 round) { return round % STORM_SLOTS; }
static u32 word_of_round(u32 round) { return round / FRAMES % WORDS; }
static u32 value_of_round(u32 round, u32 seed) { return (round + 1) * 0x9e3779b9u ^ seed; }

static bool take_frames(void)
{
    for (u32 i = 0; i < FRAMES; i++) {
        frames[i] = frame_alloc(ZONE_HIGH);
        if (frames[i] == FRAME_NONE)
            return false;
        void *page = kmap_local(frames[i], "storm");
        clear_page(page);
        kunmap_local(page);
        entries[i] = pte_make(frames[i], kpt_data_bits());
    }
    return true;
}

/* How often what was stored was not what was read back. */
static u32 wrong;

static __attribute__((noinline, cold)) void note_wrong(void) { wrong++; }

/* Rounds from `round` to `end`, a turn of the frames, in which the word is the same. Little but the mapping itself, since that
 * is timed: each format has a function of its own, and what the loop needs stays in registers. */
static inline __attribute__((always_inline)) void turn(bool pae, u32 round, u32 end)
{
    const u32 first_word = STORM_BASE + word_of_round(round) * 4, seed = boot.options.seed;
    for (const pte_t *entry = entries; round < end; round++, entry++) {
        u32 slot = slot_of_round(round), value = value_of_round(round, seed);
        volatile u32 *word = (volatile u32 *)(first_word + slot * PAGE_SIZE);
        table_enter(pae, top_tables, top_index(STORM_BASE) + slot, *entry);
        *word = value;
        if (*word != value)
            note_wrong();
        table_clear(pae, top_tables, top_index(STORM_BASE) + slot);
        if (flush_kept(FLUSH_STORM))
            invlpg((u32)word);
    }
}

static __attribute__((noinline)) void turn_pae(u32 round, u32 end) { turn(true, round, end); }
static __attribute__((noinline)) void turn_legacy(u32 round, u32 end) { turn(false, round, end); }

static void storm(u32 rounds)
{
    for (u32 first = 0; first < rounds; first += FRAMES) {
        u32 end = first + min_u32(FRAMES, rounds - first);
        if (paging.pae)
            turn_pae(first, end);
        else
            turn_legacy(first, end);
    }
}

/* The last store to each word of each frame, and zero where there was none. */
static u32 count_lost(u32 rounds)
{
    u32 lost = 0, period = FRAMES * WORDS;
    for (u32 i = 0; i < FRAMES; i++) {
        u32 *page = kmap_local(frames[i], "after the storm");
        for (u32 round = i; round < period; round += FRAMES) {
            u32 last = round + (rounds > round ? (rounds - 1 - round) / period * period : 0);
            lost += page[word_of_round(round)] != (round < rounds ? value_of_round(last, boot.options.seed) : 0);
        }
        kunmap_local(page);
    }
    return lost;
}

void work_storm(void)
{
    u32 rounds = boot.options.scale * ROUNDS_PER_PERCENT;
    check(take_frames(), "there is high memory for the workload");
    stopwatch_start("storm.kernel", "operations", rounds);
    storm(rounds);
    stopwatch_stop("storm.kernel");
    u32 lost = count_lost(rounds);
    check(wrong == 0, "a word just stored is read back");
    check(lost == 0, "every store reached its own frame");
    printk("pager: storm kernel operations=%u wrong=%u lost=%u\n", rounds, wrong, lost);
    for (u32 i = 0; i < FRAMES; i++)
        frame_put(frames[i]);
    u32 status = process_run(&program_storm);
    check(status == 0, "storm ends with status 0");
    printk("pager: storm status=%u\n", status);
}
