/* Program `mm`: fork, copy on write, demand-zero memory, mapping and unmapping, with every content checked.
 *
 *   zero      untouched pages read as zeros, then each gets its own pattern
 *   fork      children check what they inherited, overwrite a part each, fork grandchildren that overwrite another; every
 *             generation finds its own view unchanged by the others, while the parent writes too
 *   churn     children map, punch holes, unmap, map again and move their heap
 *   stack     recursion grows the stack page by page
 *   pointers  system calls refuse bad addresses, and write into pages that are shared after a fork
 *   crimes    each kind of forbidden act kills exactly the child that commits it, and the parent learns of it
 *   clock     processes that never give up the CPU are preempted; one that sleeps wakes up
 *
 * Holds: only the first process prints, while no other one runs, so that the order of lines does not hang on the timer. */
#include "user.h"

#define TEXT 0x08048000u
#define BASE 0x40000000u
#define CHURN_BASE 0x50000000u
#define PAGES_DEFAULT 32
#define PAGES_MIN 8
#define CHILDREN 4
#define WORDS_CHECKED 16
#define WORD_STEP (PAGE_SIZE / 4 / WORDS_CHECKED)
#define WITNESSED 8
#define STATUS_KILLED 0x100
#define SPIN_MAX 400000000u

static u32 seed, pages;

/* Patterns: a page under a key holds a word of its own at each place that is checked. */

static u32 mix(u32 key, u32 page, u32 i)
{
    u32 x = (key * 0x9e3779b9u ^ seed) + page * 0x85ebca6bu + i * 0xc2b2ae35u;
    x ^= x >> 15;
    x *= 0x2c1b3c6du;
    return x ^ x >> 13;
}

static u32 *page_at(u32 page) { return (u32 *)(BASE + page * PAGE_SIZE); }

static void fill(u32 *at, u32 key, u32 page)
{
    for (u32 i = 0; i < WORDS_CHECKED; i++)
        at[i * WORD_STEP + i] = mix(key, page, i);
}

static bool holds(const u32 *at, u32 key, u32 page)
{
    for (u32 i = 0; i < WORDS_CHECKED; i++)
        if (at[i * WORD_STEP + i] != mix(key, page, i))
            return false;
    return true;
}

static bool is_zero(const u32 *at)
{
    for (u32 i = 0; i < WORDS_CHECKED; i++)
        if (at[i * WORD_STEP + i] != 0)
            return false;
    return true;
}

/* Waits for `count` children, all of which must end with status 0. */
static void wait_all(u32 count)
{
    u32 status = ~0u;
    for (u32 i = 0; i < count; i++) {
        expect(wait(&status) != SYS_ERROR, "a child ends");
        expect(status == 0, "a child ends well");
    }
}

static void leave(void)
{
    tally_report();
    exit(0);
}

/* zero */

static void test_zero(void)
{
    expect(map(BASE, pages * PAGE_SIZE) == 0, "memory is mapped");
    for (u32 page = 0; page < pages; page++)
        expect(is_zero(page_at(page)), "untouched memory is zero");
    for (u32 page = 0; page < pages; page++)
        fill(page_at(page), 1, page);
    for (u32 page = 0; page < pages; page++)
        expect(holds(page_at(page), 1, page), "a page keeps its pattern");
    say("pager: mm zero pages=", pages, NULL);
}

/* fork: which key a page holds in the view of the first process, of child c, of its grandchild. The first process, once it
 * has forked, writes key 2 into every fourth page. */

static u32 key_of_child(u32 child, u32 page) { return page % CHILDREN == child ? 10 + child : 1; }
static u32 key_of_grandchild(u32 child, u32 page)
{
    return page % CHILDREN == (child + 1) % CHILDREN ? 20 + child : key_of_child(child, page);
}
static u32 key_of_parent(u32 page) { return page % 4 == 3 ? 2 : 1; }

static void grandchild(u32 child)
{
    tally_forget();
    for (u32 page = 0; page < pages; page++)
        expect(holds(page_at(page), key_of_child(child, page), page), "a grandchild inherits its parent's view");
    for (u32 page = 0; page < pages; page++)
        if (key_of_grandchild(child, page) != key_of_child(child, page))
            fill(page_at(page), key_of_grandchild(child, page), page);
    yield();
    for (u32 page = 0; page < pages; page++)
        expect(holds(page_at(page), key_of_grandchild(child, page), page), "a grandchild keeps its own view");
    leave();
}

static void child(u32 child)
{
    tally_forget();
    for (u32 page = 0; page < pages; page++)
        expect(holds(page_at(page), 1, page), "a child inherits its parent's view");
    for (u32 page = 0; page < pages; page++)
        if (key_of_child(child, page) != 1)
            fill(page_at(page), key_of_child(child, page), page);
    u32 pid = fork();
    expect(pid != SYS_ERROR, "a child forks");
    if (pid == 0)
        grandchild(child);
    wait_all(1);
    for (u32 page = 0; page < pages; page++)
        expect(holds(page_at(page), key_of_child(child, page), page), "a child keeps its own view");
    leave();
}

static void test_fork(void)
{
    for (u32 i = 0; i < CHILDREN; i++) {
        u32 pid = fork();
        expect(pid != SYS_ERROR, "the first process forks");
        if (pid == 0)
            child(i);
    }
    for (u32 page = 0; page < pages; page++)
        if (key_of_parent(page) != 1)
            fill(page_at(page), key_of_parent(page), page);
    wait_all(CHILDREN);
    for (u32 page = 0; page < pages; page++)
        expect(holds(page_at(page), key_of_parent(page), page), "the parent keeps its own view");
    say("pager: mm fork children=", CHILDREN, " grandchildren=", CHILDREN, " pages=", pages, NULL);
}

/* churn */

#define CHURN_CHILDREN 2
#define CHURN_PAGES 12
#define CHURN_ROUNDS 6

static u32 *churn_at(u32 page) { return (u32 *)(CHURN_BASE + page * PAGE_SIZE); }

static void churn_hole(u32 key)
{
    expect(unmap(CHURN_BASE + 4 * PAGE_SIZE, 3 * PAGE_SIZE) == 0, "a hole is made");
    for (u32 page = 0; page < CHURN_PAGES; page++)
        if (page < 4 || page > 6)
            expect(holds(churn_at(page), key, page), "pages around a hole keep their pattern");
    expect(map(CHURN_BASE + 4 * PAGE_SIZE, 3 * PAGE_SIZE) == 0, "a hole is mapped again");
    for (u32 page = 4; page <= 6; page++)
        expect(is_zero(churn_at(page)), "memory that comes back is zero");
}

static void churn_heap(u32 key)
{
    u32 start = brk(0), pages_grown = 4;
    expect(brk(start + pages_grown * PAGE_SIZE) == start + pages_grown * PAGE_SIZE, "the heap grows");
    for (u32 page = 0; page < pages_grown; page++) {
        expect(is_zero((u32 *)(start + page * PAGE_SIZE)), "a grown heap is zero");
        fill((u32 *)(start + page * PAGE_SIZE), key, page);
    }
    expect(holds((u32 *)(start + PAGE_SIZE), key, 1), "the heap keeps its pattern");
    expect(brk(start) == start, "the heap shrinks");
}

static void churner(u32 which)
{
    tally_forget();
    for (u32 round = 0; round < CHURN_ROUNDS; round++) {
        u32 key = 100 + which * CHURN_ROUNDS + round;
        expect(map(CHURN_BASE, CHURN_PAGES * PAGE_SIZE) == 0, "a range is mapped");
        for (u32 page = 0; page < CHURN_PAGES; page++)
            fill(churn_at(page), key, page);
        churn_hole(key);
        churn_heap(key);
        expect(unmap(CHURN_BASE, CHURN_PAGES * PAGE_SIZE) == 0, "a range is unmapped");
    }
    leave();
}

static void test_churn(void)
{
    for (u32 i = 0; i < CHURN_CHILDREN; i++) {
        u32 pid = fork();
        expect(pid != SYS_ERROR, "a churner is forked");
        if (pid == 0)
            churner(i);
    }
    wait_all(CHURN_CHILDREN);
    say("pager: mm churn children=", CHURN_CHILDREN, " rounds=", CHURN_ROUNDS, NULL);
}

/* stack: one page a call */

#define STACK_DEPTH 24

static __attribute__((noinline)) u32 descend(u32 depth)
{
    volatile u32 room[PAGE_SIZE / 4];
    room[0] = mix(7, depth, 0);
    room[PAGE_SIZE / 4 - 1] = depth;
    u32 below = depth ? descend(depth - 1) : 0;
    return below + (room[0] == mix(7, depth, 0) && room[PAGE_SIZE / 4 - 1] == depth);
}

static void test_stack(void)
{
    u32 right = descend(STACK_DEPTH - 1);
    expect(right == STACK_DEPTH, "every stack frame keeps its contents");
    say("pager: mm stack pages=", right, NULL);
}

/* pointers */

static void test_pointers(void)
{
    u32 refused = 0, status;
    refused += write((const void *)0x10, 4) == SYS_ERROR;
    refused += write((const void *)0xc0100000, 4) == SYS_ERROR;
    refused += write((const void *)0xfffffff0, 0x20) == SYS_ERROR;
    refused += map(0xbff00000, 0x200000) == SYS_ERROR;
    refused += map(BASE, PAGE_SIZE) == SYS_ERROR;
    refused += unmap(BASE + 1, PAGE_SIZE) == SYS_ERROR;
    refused += system_call(99, 0, 0, 0) == SYS_ERROR;
    refused += wait(&status) == SYS_ERROR;
    expect(refused == 8, "bad arguments are refused");
    /* The kernel writes the child's status into a page that the fork has just made read-only and shared. */
    u32 *shared = page_at(0), saved = shared[1];
    if (fork() == 0)
        exit(shared[1] == saved ? 5 : 6);
    expect(wait(&shared[1]) != SYS_ERROR && shared[1] == 5, "the kernel writes to a shared page");
    shared[1] = saved;
    say("pager: mm pointers refused=", refused, NULL);
}

/* crimes */

static void read_nowhere(void) { (void)*(volatile u32 *)0x60000000; }
static void write_text(void) { *(volatile u32 *)TEXT = 0; }
static void write_kernel(void) { *(volatile u32 *)0xc0200000 = 0; }
static void read_kernel(void) { (void)*(volatile u32 *)0xc0200000; }
static void jump_to_data(void) { ((void (*)(void))BASE)(); }
static void read_unmapped(void)
{
    unmap(BASE + PAGE_SIZE, PAGE_SIZE);
    (void)*(volatile u32 *)(BASE + PAGE_SIZE);
}
static void overflow_stack(void)
{
    __asm__ volatile("and $-4096, %esp\n"
                     "1:\tpush $0\n\t"
                     "sub $4092, %esp\n\t"
                     "jmp 1b");
}
static void clear_interrupts(void) { __asm__ volatile("cli"); }
static void halt(void) { __asm__ volatile("hlt"); }
static void use_port(void) { __asm__ volatile("outb %%al, $0xf4" : : "a"(0)); }
static void load_cr3(void) { __asm__ volatile("mov %0, %%cr3" : : "r"(0)); }
static void use_kernel_gate(void) { __asm__ volatile("int $0x20"); }
static void divide(void)
{
    __asm__ volatile("div %2" : : "a"(1), "d"(0), "r"(0));
}
static void undefined(void) { __asm__ volatile("ud2"); }
static void use_x87(void) { __asm__ volatile("fninit"); }

struct crime {
    void (*commit)(void);
    u32 vector;
};

static const struct crime crimes[] = {
    {read_nowhere, 14}, {read_unmapped, 14}, {write_text, 14}, {write_kernel, 14}, {read_kernel, 14},
    {overflow_stack, 14}, {clear_interrupts, 13}, {halt, 13}, {use_port, 13}, {load_cr3, 13}, {use_kernel_gate, 13},
    {divide, 0}, {undefined, 6}, {use_x87, 7},
};

static u32 punish(const struct crime *crime)
{
    u32 status = 0, pid = fork();
    if (pid == 0) {
        crime->commit();
        exit(0);
    }
    expect(wait(&status) == pid, "the parent learns who ended");
    bool killed = status == STATUS_KILLED + crime->vector;
    expect(killed, "the parent learns what killed its child");
    return killed;
}

static void test_crimes(u32 flags)
{
    static const struct crime data_execution = {jump_to_data, 14};
    u32 killed = 0;
    for (u32 i = 0; i < ARRAY_SIZE(crimes); i++)
        killed += punish(&crimes[i]);
    if (flags & FLAG_NX)
        killed += punish(&data_execution);
    for (u32 page = 0; page < pages; page++)
        expect(holds(page_at(page), key_of_parent(page), page), "a child's crime does not touch the parent");
    say("pager: mm crimes killed=", killed, NULL);
}

/* clock */

static void spinner(void)
{
    tally_forget();
    u32 spins = 0;
    while (preemptions() == 0 && spins < SPIN_MAX)
        for (u32 i = 0; i < 1000; i++, spins++)
            __asm__ volatile("");
    expect(spins < SPIN_MAX, "a process that spins is preempted");
    leave();
}

static void test_clock(void)
{
    for (u32 i = 0; i < 2; i++)
        if (fork() == 0)
            spinner();
    wait_all(2);
    sleep(1);
    say("pager: mm clock preempted=", 2, NULL);
}

u32 program_main(u32 run_seed, u32 scale, u32 flags)
{
    seed = run_seed;
    pages = PAGES_DEFAULT * scale / 100;
    if (pages < PAGES_MIN)
        pages = PAGES_MIN;
    test_zero();
    test_fork();
    test_churn();
    test_stack();
    test_pointers();
    test_crimes(flags);
    test_clock();
    expect(witness("mm-data\0\0\0\0\0\0\0\0", BASE, WITNESSED) == 0, "the data is published");
    tally_report();
    return 0;
}
