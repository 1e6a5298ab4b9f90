/* Program `fpu`: x87 and SSE2 in several processes at once, their results known in advance to the last bit.
 *
 *   inherit   a child goes on with the registers that its parent had at the fork, and both come to the known end
 *   lazy      a process that is switched away and back, with nobody else using the FPU, keeps the registers in the CPU
 *   workers   each rounds in its own way, in a precision of its own, and is preempted again and again; more of each where there are
 *             more CPUs, so that none has one for itself; beside them
 *   crimes    a division by zero with its exception unmasked kills exactly the process that commits it, and by the right
 *             vector, also when others have used the FPU between the division and the instruction that reports it
 *
 * Holds: only the first process prints, and kills come one after the other, so that the order of lines does not hang on the
 * timer. The known ends are in fpu_known.h. */
#include "fpu_loop.h"
#include "fpu_known.h"
#include "user.h"

#define STATUS_KILLED 0x100
#define VECTOR_GENERAL_PROTECTION 13
#define VECTOR_X87 16
#define VECTOR_SIMD 19

#define STATUS_INEXACT 0x20
#define STATUS_TOP_OF_5 0x1800 /* five registers in use */
#define STATUS_CONDITIONS 0x4700 /* C0 to C3: C1 tells how the last result was rounded */
#define MXCSR_INEXACT 0x20

#define YIELDS 20
#define PREEMPTIONS_DEFAULT 6
#define PREEMPTIONS_MIN 4
#define ROUNDS_MAX 4000000u
#define COPIES_MAX 4 /* of each worker */

struct known {
    u32 control, mxcsr;
    struct extended x87[3];
    u64 xmm[3][2];
    u32 s[4];
};

/* Rounding to nearest, down, up, toward zero; precision of x87 extended, double, extended, single. */
static const struct known known[] = {FPU_KNOWN};

static u32 workers_preempted;
/* How often the registers had gone to another process before the workers came. */
static u32 takes_before;

/* Where all start: numbers that every precision holds exactly; those that stay need all their bits. */
static struct fpu_numbers start_of(const struct known *way)
{
    return (struct fpu_numbers){
        .control = way->control,
        .mxcsr = way->mxcsr,
        .x87 = {.x = {0xa000000000000000, 0x3ffd, {0}}, /* 0.3125 */
                .y = {0x8000000000000000, 0x3fff, {0}},
                .w = {0x8000000000000000, 0x3fff, {0}},
                .still = {{0xfedcba9876543211, 0x4123, {0}}, {0x8000000000000001, 0xbabe, {0}}}},
        .xmm = {.x = {0x3fd4000000000000, 0x3fda000000000000}, /* 0.3125, 0.40625 */
                .y = {0x3ff0000000000000, 0x4000000000000000},
                .w = {0x3ff0000000000000, 0x4008000000000000},
                .s = {0x3ea00000, 0x3ed00000, 0x3e600000, 0x3ef00000}, /* 0.3125, 0.40625, 0.21875, 0.46875 */
                .i = {way->control, ~way->mxcsr},
                .still = {0x0123456789abcdef, 0x7ff0000000000001}},
    };
}

static u64 expected_integer(u64 lane)
{
    for (u32 step = 0; step < FPU_STEPS; step++)
        lane = (u64)(u32)lane * FPU_FACTOR + FPU_TERM;
    return lane;
}

static bool same_words(const void *a, const void *b, u32 bytes)
{
    const u32 *x = a, *y = b;
    for (u32 i = 0; i < bytes / 4; i++)
        if (x[i] != y[i])
            return false;
    return true;
}

#define SAME(a, b) same_words(&(a), &(b), sizeof(a))

/* The end that the registers came to, against the known one. */
static bool is_known_end(const struct fpu_numbers *end, const struct known *way)
{
    const struct fpu_numbers start = start_of(way);
    bool x87 = same_words(&end->x87, way->x87, sizeof(way->x87)) && SAME(end->x87.still, start.x87.still);
    bool xmm = same_words(&end->xmm, way->xmm, sizeof(way->xmm)) && SAME(end->xmm.s, way->s) &&
               SAME(end->xmm.still, start.xmm.still);
    bool integers = end->xmm.i[0] == expected_integer(start.xmm.i[0]) && end->xmm.i[1] == expected_integer(start.xmm.i[1]);
    bool control = end->control == way->control && end->mxcsr == (way->mxcsr | MXCSR_INEXACT) &&
                   (end->status & ~STATUS_CONDITIONS) == (STATUS_TOP_OF_5 | STATUS_INEXACT);
    return x87 && xmm && integers && control;
}

static bool store_is_known_end(const struct known *way)
{
    struct fpu_numbers end = {0};
    fpu_store(&end);
    return is_known_end(&end, way);
}

static void leave(void)
{
    tally_report();
    exit(0);
}

/* Waits for `pid`; other children may end before it, and well. */
static u32 status_of(u32 pid, u32 *others)
{
    u32 status = ~0u;
    while (1) {
        u32 ended = wait(&status);
        if (ended == pid || ended == SYS_ERROR)
            return status;
        expect(status == 0, "a worker ends well");
        ++*others;
    }
}

/* inherit */

static void test_inherit(void)
{
    const struct fpu_numbers start = start_of(&known[0]);
    fpu_load(&start);
    fpu_steps(FPU_STEPS / 2);
    u32 pid = fork(), others = 0;
    expect(pid != SYS_ERROR, "the first process forks");
    if (pid == 0)
        tally_forget();
    fpu_steps(FPU_STEPS - FPU_STEPS / 2);
    expect(store_is_known_end(&known[0]), "parent and child go on with the same registers");
    if (pid == 0)
        leave();
    expect(status_of(pid, &others) == 0, "the child ends well");
    say("pager: fpu inherit children=", 1, NULL);
}

/* lazy */

static void idler(void)
{
    tally_forget();
    for (u32 i = 0; i < YIELDS; i++)
        yield();
    leave();
}

static void test_lazy(void)
{
    const struct fpu_numbers start = start_of(&known[1]);
    u32 others = 0;
    fpu_load(&start);
    u32 pid = fork(), before = fpu_takes();
    if (pid == 0)
        idler();
    for (u32 i = 0; i < YIELDS; i++) {
        yield();
        fpu_steps(1);
    }
    expect(fpu_takes() == before, "the registers stay where they are while nobody else wants them");
    fpu_steps(FPU_STEPS - YIELDS);
    expect(store_is_known_end(&known[1]), "the registers are as they were");
    expect(status_of(pid, &others) == 0, "the child ends well");
    say("pager: fpu lazy yields=", YIELDS, NULL);
}

/* workers */

static bool went_round(void) { return fpu_takes() - takes_before >= 2 * ARRAY_SIZE(known); }

/* On a slow machine the first is preempted often enough before the second is forked: it waits for the others. */
static void worker(const struct known *way)
{
    const struct fpu_numbers start = start_of(way);
    u32 rounds = 0, wrong = 0;
    tally_forget();
    while ((preemptions() < workers_preempted || !went_round()) && rounds++ < ROUNDS_MAX) {
        fpu_load(&start);
        fpu_steps(FPU_STEPS);
        wrong += !store_is_known_end(way);
    }
    expect(wrong == 0, "a worker comes to the known end each time");
    expect(rounds < ROUNDS_MAX, "a worker is preempted");
    leave();
}

/* crimes */

/* The division is found out about by the next x87 instruction that waits; until then others have their turns. */
static void divide_x87(void)
{
    static const u16 control = 0x37b; /* zero divide unmasked */
    __asm__ volatile("fninit\n\t"
                     "fldcw %0\n\t"
                     "fldz\n\t"
                     "fld1\n\t"
                     "fdivp"
                     :
                     : "m"(control));
    for (u32 i = 0; i < 2; i++)
        yield();
    __asm__ volatile("fwait");
}

static void divide_sse(void)
{
    static const u32 mxcsr = 0x1d80; /* zero divide unmasked */
    static const u32 ones[4] __attribute__((aligned(16))) = {0x3f800000, 0x3f800000, 0x3f800000, 0x3f800000};
    __asm__ volatile("ldmxcsr %0\n\t"
                     "xorps %%xmm1, %%xmm1\n\t"
                     "movaps %1, %%xmm0\n\t"
                     "divps %%xmm1, %%xmm0"
                     :
                     : "m"(mxcsr), "m"(ones));
}

static void load_bad_mxcsr(void)
{
    static const u32 mxcsr = 0x80001f80;
    __asm__ volatile("ldmxcsr %0" : : "m"(mxcsr));
}

struct crime {
    void (*commit)(void);
    u32 vector;
    u32 allowed; /* flag of the run under which it may go unpunished */
};

static const struct crime crimes[] = {{divide_x87, VECTOR_X87, 0},
                                      {divide_sse, VECTOR_SIMD, FLAG_NO_XM},
                                      {load_bad_mxcsr, VECTOR_GENERAL_PROTECTION, FLAG_MXCSR_ANY}};

static bool punish(const struct crime *crime, u32 flags, u32 *workers_ended)
{
    u32 pid = fork();
    expect(pid != SYS_ERROR, "a criminal is forked");
    if (pid == 0) {
        crime->commit();
        exit(0);
    }
    u32 status = status_of(pid, workers_ended);
    bool killed = status == STATUS_KILLED + crime->vector, spared = status == 0 && crime->allowed & flags;
    expect(killed || spared, "a process is killed by the exception that it unmasked");
    return killed;
}

static void test_workers_and_crimes(u32 flags)
{
    u32 ended = 0, killed = 0, copies = cpus() < COPIES_MAX ? cpus() : COPIES_MAX;
    takes_before = fpu_takes();
    for (u32 i = 0; i < ARRAY_SIZE(known) * copies; i++) {
        u32 pid = fork();
        expect(pid != SYS_ERROR, "a worker is forked");
        if (pid == 0)
            worker(&known[i % ARRAY_SIZE(known)]);
    }
    for (u32 i = 0; i < ARRAY_SIZE(crimes); i++)
        killed += punish(&crimes[i], flags, &ended);
    status_of(0, &ended);
    expect(ended == ARRAY_SIZE(known) * copies, "every worker ends");
    expect(went_round(), "the registers went round");
    say("pager: fpu workers=", ended, " steps=", FPU_STEPS, " crimes=", ARRAY_SIZE(crimes), " deviations=",
        ARRAY_SIZE(crimes) - killed, NULL);
}

u32 program_main(u32 seed, u32 scale, u32 flags)
{
    (void)seed;
    workers_preempted = PREEMPTIONS_DEFAULT * scale / 100;
    if (workers_preempted < PREEMPTIONS_MIN)
        workers_preempted = PREEMPTIONS_MIN;
    test_inherit();
    test_lazy();
    test_workers_and_crimes(flags);
    /* Full registers, for fpu_fresh to look for: it runs next, in the place of this process. */
    const struct fpu_numbers left = start_of(&known[2]);
    fpu_load(&left);
    tally_report();
    return 0;
}
