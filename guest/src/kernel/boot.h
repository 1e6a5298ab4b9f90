/* What the code that runs before paging leaves for the kernel: the parsed command line and the memory map. */
#ifndef BOOT_H
#define BOOT_H

#include "layout.h"
#include "types.h"

/* Workloads: name in C, name on the command line. */
#define WORKLOADS(X) \
    X(ALL, "all")    \
    X(HELLO, "hello") \
    X(MM, "mm")      \
    X(KMAP, "kmap")  \
    X(ACCESS, "access") \
    X(SPIN, "spin")  \
    X(SWEEP, "sweep") \
    X(STORM, "storm") \
    X(MIX, "mix")    \
    X(FPU, "fpu")    \
    X(RECLAIM, "reclaim") \
    X(DISK, "disk")  \
    X(SHOOT, "shoot") \
    X(AGE, "age")    \
    X(REPORT, "report") \
    X(SERIES, "series") \
    X(STACK, "stack") \
    X(SUPERBLOCK, "superblock") \
    X(HUGE, "huge") \
    X(OOPS, "oops")

enum workload {
#define X(id, name) WORKLOAD_##id,
    WORKLOADS(X)
#undef X
};

/* Ways in which a CPU is known to differ from the architecture; `allow=` names those that are no error. Of page faults:
 *   rsvd-no-p   a reserved bit is reported without P
 *   rmw-read    an unlocked read-modify-write reads first: it faults as a read, and a fault of its write comes after A was set
 * Of SSE:
 *   no-xm       an exception is never raised, unmasked or not
 *   mxcsr-any   LDMXCSR takes reserved bits */
#define QUIRKS(X) \
    X(RSVD_NO_P, "rsvd-no-p") \
    X(RMW_READ, "rmw-read") \
    X(NO_XM, "no-xm") \
    X(MXCSR_ANY, "mxcsr-any")

enum quirk_index {
#define X(id, name) QUIRK_INDEX_##id,
    QUIRKS(X)
#undef X
    QUIRK_COUNT
};

enum quirk {
#define X(id, name) QUIRK_##id = 1u << QUIRK_INDEX_##id,
    QUIRKS(X)
#undef X
};

/* How much workload `reclaim` does and compares: by the CPU's speed, unless it is said (pace.h). */
enum pace { PACE_AUTO, PACE_SLOW, PACE_FAST };

struct options {
    enum workload workload;
    bool legacy; /* two-level paging */
    u32 seed;
    u32 scale;  /* percent of the default work */
    u32 lowmem; /* MiB, a multiple of 4 */
    u32 hz;     /* timer interrupts a second */
    u32 nmi;    /* samples a second */
    u32 work;   /* times that a process of workload=reclaim reads a page that it touches */
    u32 cpus;   /* how many are used at most; 0: all that are found */
    u32 ram;    /* MiB that the kernel uses of what there is; 0: the workload decides */
    enum pace pace;
    u32 allow;  /* set of enum quirk */
    u32 omit;   /* set of enum flush (omit.h) */
    char case_name[16]; /* of workload=series, stack, superblock (scene.h); "" for none */
    bool bug;           /* the case's rules are switched off */
};

struct memory_range {
    u32 start; /* first frame */
    u32 end;   /* frame after the last */
};

#define MEMORY_RANGES_MAX 16

struct boot {
    struct options options;
    char bad_word[64]; /* first word of the command line that was not understood; "" when all were */
    bool multiboot;    /* the loader's magic was right */
    u32 range_count;
    struct memory_range ranges[MEMORY_RANGES_MAX]; /* RAM, as the loader reports it, unsorted */
    u32 cpu_count;         /* CPUs to be used, the one that boots among them */
    u8 apic_ids[CPUS_MAX]; /* theirs, if there is more than one */
};

extern struct boot boot;

/* Built before paging, then owned by kpt.c. */
extern u64 kernel_pdpt[4];
extern u32 kernel_directory[1024];

/* Fills `options` from a Multiboot command line whose first word may be the image's name. Copies the first word that it
 * does not know into `bad_word` and returns false. Runs with paging off: see early.c. */
bool command_line_parse(const char *line, struct options *options, char *bad_word, u32 bad_word_bytes);

#endif
