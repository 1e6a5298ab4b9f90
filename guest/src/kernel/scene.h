/* Scenes: discussions of the field's history, replayed. The cases, and what they tell the host.
 *
 * One fact a line, and in no other form; WHO is a task, WHAT a lock, `a pool slot`, `a free frame`:
 *
 *   scenario CASE: begin
 *   scenario CASE: WHO holds WHAT
 *   scenario CASE: WHO owes WHAT
 *   scenario CASE: WHO waits for WHAT
 *   scenario CASE: WHO lets go of WHAT
 *   scenario CASE: saw TEXT
 *   scenario CASE: measured NAME = NUMBER UNIT
 *   scenario CASE: failed KIND: TEXT
 *   scenario CASE: passed
 *
 * A case ends with one of the last two. Before `failed deadlock` stand the lines of all who hold, owe or wait, as locks, slots and tasks
 * have them: whoever reads finds the cycle. */
#ifndef SCENE_H
#define SCENE_H

#include "rule.h"
#include "task.h"

/* Workload, name in C, name on the command line, rules that `bug` switches off: 0 where a case has none. */
#define CASES(X) \
    X(SERIES, ORDER, "order", RULE(TABLE_WINDOW) | RULE(FILL_WINDOW)) \
    X(SERIES, SPINLOCK, "spinlock", RULE(TABLE_WINDOW) | RULE(TABLE_SPIN)) \
    X(SERIES, BORDER, "border", RULE(TABLE_WINDOW)) \
    X(SERIES, CLEAR, "clear", RULE(TABLE_WINDOW) | RULE(TABLE_CLEAR)) \
    X(SERIES, WALKER, "walker", RULE(TABLE_WINDOW) | RULE(ROOM_FIRST)) \
    X(SERIES, SPARE, "spare", RULE(POOL_SPARE)) \
    X(STACK, TYPE, "type", RULE(STACK)) \
    X(STACK, OVERFLOW, "overflow", RULE(NMI_SHARE)) \
    X(STACK, ORDER, "order", RULE(LAST_FIRST)) \
    X(STACK, SWITCH, "switch", RULE(SWITCH)) \
    X(STACK, SLOTS, "slots", 0) \
    X(SUPERBLOCK, DIRECT, "direct", RULE(SB_SCOPE)) \
    X(SUPERBLOCK, KSWAPD, "kswapd", RULE(SB_RESERVE)) \
    X(SUPERBLOCK, INODE, "inode", RULE(INODE)) \
    X(SUPERBLOCK, CURES, "cures", 0) \
    X(SUPERBLOCK, TRUNCATE, "truncate", RULE(TRUNCATE)) \
    X(SUPERBLOCK, RECURSIVE, "recursive", RULE(SB_WHOLE)) \
    X(SUPERBLOCK, CLUSTERING, "clustering", 0)

enum scene_case {
#define X(workload, id, name, rules) CASE_##workload##_##id,
    CASES(X)
#undef X
    CASE_COUNT
};

/* From main, before anything else: finds the case and switches its rules off. False, with a list of what there is, where the command
 * line names none that there is, or wants a bug of one that has none. */
bool scene_choose(void);
bool scene_is(enum scene_case which);
/* The case is to go wrong. */
bool scene_has_bug(void);

void scene_begin(void);
void scene_saw(const char *format, ...) __attribute__((format(printf, 1, 2)));
void scene_measured(const char *name, u32 number, const char *unit);
/* Ends the run, unless the condition holds: with `failed lost`, where a case is not what it is meant to be. */
void scene_want(bool holds, const char *what);
void scene_failed(const char *kind, const char *format, ...) __attribute__((noreturn, format(printf, 2, 3)));
void scene_passed(void);

/* A party: a thread that is expected to end. */
struct task *scene_start(const char *name, void (*run)(u32), u32 argument);
/* Until all parties have ended. Where those that are left have all been asleep for STUCK_TICKS, each waiting for something that
 * has a name, and none has run: their lines, and the end. */
void scene_join(void);
/* Until the condition holds, and not for ever. */
#define scene_until(condition)               \
    do {                                     \
        while (!(condition))                 \
            scene_tick(#condition);          \
        scene_ticked();                      \
    } while (0)
void scene_tick(const char *condition);
void scene_ticked(void);
/* The task waits for that, which is one of the names above. */
bool task_waits_for(const struct task *task, const char *what);

/* Whoever comes to the place from now on stays there, until it is opened. */
void place_close(enum place place);
void place_open(enum place place);
/* Tasks that are held up there. */
u32 place_count(enum place place);

#endif
