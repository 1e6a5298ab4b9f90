/* Leaving out one flush of a TLB, to see that it is missed.
 *
 * Story: each INVLPG, each reload of CR3 that is made to forget, and each request to another CPU has a name here; `omit=NAME,..` on the
 * command line leaves those out. A reload that switches address spaces is none of them: it is the switch. With nothing left out a
 * place costs one test of a word.
 *
 * The columns: name in C, name on the command line, what the flush is for. docs/GUEST-RULES.md has the list, with the workload in
 * which each matters, and a test compares them. */
#ifndef OMIT_H
#define OMIT_H

#include "boot.h"

#define FLUSHES(X) \
    X(WINDOW, "window", "a slot of the window leads to the frame that it was given last") \
    X(POOL_LOCAL, "pool-local", "slots that a sweep of the pool has emptied are forgotten by the CPU that sweeps") \
    X(POOL_REMOTE, "pool-remote", "and by all others") \
    X(DROP_LOCAL, "drop-local", "a page that reclaim takes from the space that is loaded here is forgotten before it is written out or freed") \
    X(DROP_REMOTE, "drop-remote", "a page taken from a space that another CPU has loaded is asked for there") \
    X(FINISH, "finish", "that CPU is interrupted") \
    X(FINISH_WAIT, "finish-wait", "and awaited, before anything is done with the frames") \
    X(SERVE_PAGES, "serve-pages", "a CPU that is asked to forget a few pages does") \
    X(SERVE_ALL, "serve-all", "a CPU that is asked to forget all that is not global does") \
    X(REFRESH_TRAP, "refresh-trap", "a CPU that was told that it is stale forgets before its next trap ends") \
    X(REFRESH_HALT, "refresh-halt", "or before it goes on after a halt, through which nobody has asked it") \
    X(AGE_LOCAL, "age-local", "an accessed bit that was taken is set again when the page is used") \
    X(AGE_REMOTE, "age-remote", "the same where another CPU has the space loaded") \
    X(COPY, "copy-on-write", "the copy takes the shared page's place") \
    X(FORK, "fork", "the parent stores no more to the pages that it shares with its child") \
    X(ZAP_FEW, "zap-few", "pages and tables that are unmapped are forgotten before their frames are free") \
    X(ZAP_MANY, "zap-many", "the same for more than a few at a time") \
    X(POINTERS, "pointers", "PAE: the CPU reads the four top entries again after a new one") \
    X(ACCESS_SLOT, "access-slot", "workload access: the entries under test are those that are used") \
    X(ACCESS_CLOSE, "access-close", "workload access: the slot's page and table are forgotten before they are free") \
    X(ACCESS_POINTERS, "access-pointers", "workload access, PAE: the top entry under test is the one that is used") \
    X(STORM, "storm", "workload storm: a slot that was emptied leads nowhere")

enum flush {
#define X(id, name, what) FLUSH_##id,
    FLUSHES(X)
#undef X
    FLUSH_COUNT
};

_Static_assert(FLUSH_COUNT <= 32, "");

/* False where the flush is to be left out. */
static inline bool flush_kept(enum flush flush)
{
    return __builtin_expect(!(boot.options.omit & 1u << flush), 1);
}

#endif
