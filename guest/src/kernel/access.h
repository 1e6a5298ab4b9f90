/* Workload `access`: every way in which a page-table entry can refuse an access, or let it pass. */
#ifndef ACCESS_H
#define ACCESS_H

#include "paging.h"
#include "syscalls.h"
#include "trap.h"

/* How a case differs from the plain one: a small page, present, writable, user, executable, not accessed, not dirty, under a
 * directory entry that allows everything; CR0.WP and CR4.SMEP on; ring 0. "dir" is the directory entry above a small
 * page's; a large page is itself a directory entry. */
#define AXES(X)                          \
    X(ABSENT, "absent")                  \
    X(READONLY, "readonly")              \
    X(SUPERVISOR, "supervisor")          \
    X(NX, "nx")                          \
    X(RESERVED, "reserved")              \
    X(ACCESSED, "accessed")              \
    X(DIRTY, "dirty")                    \
    X(LARGE, "large")                    \
    X(DIR_ABSENT, "dir-absent")          \
    X(DIR_READONLY, "dir-readonly")      \
    X(DIR_SUPERVISOR, "dir-supervisor")  \
    X(DIR_NX, "dir-nx")                  \
    X(DIR_RESERVED, "dir-reserved")      \
    X(DIR_ACCESSED, "dir-accessed")      \
    X(ROOT_ABSENT, "root-absent")        \
    X(NO_WP, "no-wp")                    \
    X(NO_SMEP, "no-smep")                \
    X(RING3, "ring3")

enum axis_index {
#define X(id, name) AXIS_INDEX_##id,
    AXES(X)
#undef X
    AXIS_COUNT
};

enum axis {
#define X(id, name) AXIS_##id = 1u << AXIS_INDEX_##id,
    AXES(X)
#undef X
};

/* One access, as the CPU sees it. */
struct access_setup {
    pte_t root, directory, table; /* entries before; root in PAE only, table only if the directory's is not large */
    bool large;
    bool nx, wp, smep; /* EFER.NXE, CR0.WP, CR4.SMEP */
    bool user;
    u32 kind; /* PROBE_* */
};

/* What came, or is to come, of it. */
struct access_outcome {
    bool fault;
    u32 error;            /* if fault */
    pte_t directory, table; /* entries after */
};

/* access_oracle.c: what the architecture says, or a CPU with these quirks (a set of enum quirk) would do. */
struct access_outcome access_predict(const struct access_setup *setup, u32 quirks);
/* The flags of the directory entry that the architecture leaves open: accessed, when the walk went past the entry and then
 * faulted. */
pte_t access_open_flags(const struct access_setup *setup, const struct access_outcome *expected);
/* Whether `got` is `expected`, but for open flags. */
bool access_agrees(const struct access_setup *setup, const struct access_outcome *expected,
                   const struct access_outcome *got);

/* access_report.c: counts a case; one that did not go as it should is told with others of its class at the end.
 * `strayed`: CR2, the data read or the data stored was wrong. */
void access_report_case(u32 axes, const struct access_setup *setup, const struct access_outcome *got, bool strayed);
void access_report_print(void);

/* The program's call for its next order. */
void access_probe(struct trap_frame *frame);

/* A case is under way. */
extern bool access_armed;
/* While one is: whether the fault was provoked by it; it is noted then, and the frame goes on elsewhere. */
bool access_fault(struct trap_frame *frame, u32 cr2);

#endif
