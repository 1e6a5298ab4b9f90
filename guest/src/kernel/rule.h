/* Switching off one rule of the kernel's, to see what it is for.
 *
 * Story: the workloads `series`, `stack` and `superblock` replay what was once discussed of temporary mappings and of reclaim. Each of
 * their cases passes with the kernel as it is; with the word `bug` the rules that scene.h names for the case are switched off, in
 * the kernel's own code, and the case fails in the way that was feared. With none switched off a place costs one test of a word.
 *
 * The columns: name in C, and the rule. */
#ifndef RULE_H
#define RULE_H

#include "types.h"

#define RULES(X) \
    X(TABLE_WINDOW, "page tables are reached through the window: nobody waits for them") \
    X(TABLE_SPIN, "nothing that may sleep is mapped under a spin lock") \
    X(TABLE_CLEAR, "a new table is cleared through what tables are reached by") \
    X(FILL_WINDOW, "a page is filled through the window: who has its table open waits for nothing more") \
    X(ROOM_FIRST, "room is made before anything is held") \
    X(POOL_SPARE, "a pool has a slot more than there are who hold one and want another") \
    X(STACK, "windows are a stack: a tag of intent decides nothing") \
    X(NMI_SHARE, "the depth has the NMI's share on top of the interrupt's") \
    X(LAST_FIRST, "windows are released in the reverse of the order in which they were mapped") \
    X(SWITCH, "a context's windows are saved and restored where it is switched") \
    X(SB_SCOPE, "who has the superblock's lock is in a scope without GFP_FS") \
    X(SB_RESERVE, "who has it takes from the reserve, and waits for nobody's frame") \
    X(SB_WHOLE, "what the superblock's lock protects is whole wherever memory is asked for under it") \
    X(INODE, "page-out takes no lock that is held over an allocation for the file") \
    X(TRUNCATE, "the length does not change between the beginning of a page-out and its end")

enum rule {
#define X(id, what) RULE_##id,
    RULES(X)
#undef X
    RULE_COUNT
};

_Static_assert(RULE_COUNT <= 32, "");

#define RULE(id) (1u << RULE_##id)

/* Set of those that are switched off (scene.c). */
extern u32 rules_off;
/* A scene runs: who waits for ever is found and reported. */
extern bool scene_looks_on;

static inline bool rule_kept(enum rule rule) { return __builtin_expect(!(rules_off & 1u << rule), 1); }

/* A rule of that KIND is broken and the kernel has found out: ends the run. A scene says `failed KIND`; without one it is a panic. */
void rule_broken(const char *kind, const char *format, ...) __attribute__((noreturn, format(printf, 2, 3)));

/* Places where a scene may hold a task up, so that what has to happen meanwhile does, whatever the machine's timing. */
enum place {
    PLACE_TABLE_OPEN, /* a fault has its table, through the pool (fault.c) */
    PLACE_KSWAPD,     /* kswapd has been woken */
    PLACE_SB_HELD,    /* the superblock's lock has been taken for a new block */
    PLACE_PAGE_OUT,   /* a page of the file is marked as on its way out */
    PLACE_COUNT
};

extern u32 places_closed;
void place_wait(enum place place);

/* The caller may sleep here. */
static inline void place_pass(enum place place)
{
    if (__builtin_expect(places_closed & 1u << place, 0))
        place_wait(place);
}

#endif
