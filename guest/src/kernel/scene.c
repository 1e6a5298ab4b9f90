/* Scenes: the cases' table, what they print, and who is found to wait for whom.
 *
 * Story: a case runs on the main thread, starts its parties, and joins them. A deadlock is a state that is looked for: the main thread
 * sleeps a tick at a time, which no party can keep it from, and asks whether any has had a CPU since.
 * Holds: what a line says of a party is what the mutex, the slot or the task itself says: nothing here keeps books of its own.
 * Locks: the kernel's. */
#include "scene.h"

#include "boot.h"
#include "check.h"
#include "console.h"
#include "kmap.h"
#include "mutex.h"
#include "reclaim.h"
#include "string.h"
#include "umbra_abi.h"

#define PARTIES_MAX 12
/* Nobody has got on for so long, and never will. */
#define STUCK_TICKS 5
/* Longer than a case takes on the slowest machine, in seconds. */
#define PATIENCE 60

u32 rules_off READ_MOSTLY;
bool scene_looks_on READ_MOSTLY;
u32 places_closed;

struct known {
    enum workload workload;
    const char *name;
    u32 rules;
};

static const struct known cases[] = {
#define X(workload, id, name, rules) {WORKLOAD_##workload, name, rules},
    CASES(X)
#undef X
};

static const struct known *chosen;

static struct task *parties[PARTIES_MAX];
static u32 party_count;
static u32 waited; /* ticks of scene_until */
static u32 held_up[PLACE_COUNT];

/* Which case. */

static bool is_scene(enum workload workload)
{
    return workload == WORKLOAD_SERIES || workload == WORKLOAD_STACK || workload == WORKLOAD_SUPERBLOCK;
}

static bool same(const char *a, const char *b)
{
    for (; *a && *a == *b; a++)
        b++;
    return *a == *b;
}

static void list_cases(enum workload workload)
{
    printk("pager: there is");
    for (const struct known *known = cases; known < cases + CASE_COUNT; known++)
        if (known->workload == workload)
            printk(" case=%s%s", known->name, known->rules ? " [bug]" : "");
    printk("\n");
}

bool scene_choose(void)
{
    const struct options *options = &boot.options;
    if (!is_scene(options->workload)) {
        if (options->case_name[0] || options->bug)
            printk("pager: case= and bug are for workload=series, stack and superblock\n");
        return !options->case_name[0] && !options->bug;
    }
    for (const struct known *known = cases; known < cases + CASE_COUNT; known++)
        if (known->workload == options->workload && same(known->name, options->case_name))
            chosen = known;
    if (!chosen || (options->bug && !chosen->rules)) {
        if (chosen)
            printk("pager: case %s has no bug\n", options->case_name);
        else
            printk("pager: there is no case \"%s\"\n", options->case_name);
        list_cases(options->workload);
        return false;
    }
    scene_looks_on = true;
    if (options->bug)
        rules_off = chosen->rules;
    return true;
}

bool scene_is(enum scene_case which) { return chosen == &cases[which]; }
bool scene_has_bug(void) { return boot.options.bug; }

/* What is printed. */

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printk("scenario %s: ", chosen->name);
    vprintk(format, args);
    printk("\n");
    va_end(args);
}

void scene_begin(void)
{
    say("begin");
    for (enum rule rule = 0; rule < RULE_COUNT; rule++) {
        static const char *const texts[] = {
#define X(id, what) what,
            RULES(X)
#undef X
        };
        if (!rule_kept(rule))
            say("saw off: %s", texts[rule]);
    }
}

void scene_saw(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printk("scenario %s: saw ", chosen->name);
    vprintk(format, args);
    printk("\n");
    va_end(args);
}

void scene_measured(const char *name, u32 number, const char *unit) { say("measured %s = %u %s", name, number, unit); }

static void fail(const char *kind, const char *format, va_list args) __attribute__((noreturn));
static void fail(const char *kind, const char *format, va_list args)
{
    printk("scenario %s: failed %s: ", chosen->name, kind);
    vprintk(format, args);
    printk("\n");
    tally.errors++;
    finish(STATUS_FAIL);
}

void scene_failed(const char *kind, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fail(kind, format, args);
}

void rule_broken(const char *kind, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (chosen)
        fail(kind, format, args);
    vpanic(format, args);
}

void scene_want(bool holds, const char *what)
{
    tally.checks++;
    if (!holds)
        scene_failed("lost", "not so: %s", what);
}

void scene_passed(void) { say("passed"); }

/* Who holds what, and waits for what. */

static void say_of(const struct task *task)
{
    for (const struct mutex *mutex = task->mutexes; mutex; mutex = mutex->next)
        if (mutex->name)
            say("%s holds %s", task->name, mutex->name);
    for (enum series series = 0; series < SERIES_COUNT; series++)
        for (u32 slots = pool_held_by(task, series); slots; slots--)
            say("%s holds %s", task->name, series_slot(series));
    if (task->has_batch)
        say("%s owes a free frame", task->name);
    if (task->waits_for)
        say("%s waits for %s", task->name, task->waits_for);
}

static bool has_ended(const struct task *task)
{
    return !task || task->state == TASK_FREE || task->state == TASK_ZOMBIE;
}

static void say_of_all(void)
{
    for (u32 i = 0; i < party_count; i++)
        if (!has_ended(parties[i]))
            say_of(parties[i]);
    if (reclaim_thread())
        say_of(reclaim_thread());
}

static bool is_asleep(const struct task *task) { return task->state == TASK_WAITING && task->waits_for; }

/* Turns of all who are left; 0 where one of them may go on, or none is left. */
static u32 turns_if_asleep(void)
{
    const struct task *kswapd = reclaim_thread();
    u32 turns = 0;
    for (u32 i = 0; i < party_count; i++) {
        if (has_ended(parties[i]))
            continue;
        if (!is_asleep(parties[i]))
            return 0;
        turns += parties[i]->turns;
    }
    if (turns && kswapd) {
        if (kswapd->state != TASK_WAITING || (kswapd->has_batch && !kswapd->waits_for))
            return 0;
        turns += kswapd->turns;
    }
    return turns;
}

static u32 count_left(void)
{
    u32 left = 0;
    for (u32 i = 0; i < party_count; i++)
        left += !has_ended(parties[i]);
    return left;
}

struct task *scene_start(const char *name, void (*run)(u32), u32 argument)
{
    struct task *task = task_start_thread(name, run, argument);
    scene_want(task && party_count < PARTIES_MAX, "a thread starts");
    parties[party_count++] = task;
    return task;
}

static void reap(void)
{
    u32 status;
    for (u32 i = 0; i < party_count; i++)
        task_wait_child(&status);
    party_count = 0;
}

void scene_join(void)
{
    u32 still = 0, turns_before = 0;
    for (u32 spent = 0; count_left(); spent++) {
        task_sleep(1);
        u32 turns = turns_if_asleep();
        still = turns && turns == turns_before ? still + 1 : 0;
        turns_before = turns;
        if (still < STUCK_TICKS && spent < PATIENCE * boot.options.hz)
            continue;
        say_of_all();
        if (still < STUCK_TICKS)
            scene_failed("lost", "%u parties have not ended after %u seconds", count_left(), PATIENCE);
        scene_failed("deadlock", "%u parties are asleep, and none has run for %u ticks", count_left(), STUCK_TICKS);
    }
    reap();
}

void scene_tick(const char *condition)
{
    if (waited++ < PATIENCE * boot.options.hz) {
        task_sleep(1);
        return;
    }
    say_of_all();
    scene_failed("lost", "never came: %s", condition);
}

void scene_ticked(void) { waited = 0; }

bool task_waits_for(const struct task *task, const char *what)
{
    return task->state == TASK_WAITING && task->waits_for && same(task->waits_for, what);
}

/* Places. */

void place_close(enum place place) { places_closed |= 1u << place; }

void place_open(enum place place)
{
    places_closed &= ~(1u << place);
    task_wake(&held_up[place]);
}

u32 place_count(enum place place) { return held_up[place]; }

void place_wait(enum place place)
{
    kernel_take();
    held_up[place]++;
    while (places_closed & 1u << place)
        task_wait_on(&held_up[place]);
    held_up[place]--;
    kernel_give_back();
}
