/* Workload `access`: every way in which a page-table entry can refuse an access, or let it pass.
 *
 * Story: a case is a set of axes (access.h) and a kind. For each: build the entries in a slot of the address space that nothing
 * else uses, INVLPG, access from ring 0 here or from ring 3 in the program `access`, catch the fault, read the entries
 * back, hand all to access_report_case.
 *   1. Enumeration: for each state of CR0.WP and CR4.SMEP and each ring, all cases with at most two axes off the plain one,
 *      then a seeded sample of the rest.
 *   2. The slot: TEST_BASE, a directory entry of its own. The page behind it is one low frame; as a large page, the one
 *      that contains this frame.
 *   3. Running: ring-0 cases in a row; a ring-3 case leaves through the trap frame and ends in the next trap.
 *
 * Holds: between cases of ring 3 no window is held. The process stays on its CPU, whose control registers and TLB all is about.
 * Interrupts may come in between: kernel code does not mind WP or SMEP off. */
#include "access.h"

#include "boot.h"
#include "check.h"
#include "console.h"
#include "cpu.h"
#include "frames.h"
#include "process.h"
#include "string.h"
#include "task.h"
#include "tlb.h"
#include "window.h"
#include "work.h"

#define TEST_BASE 0x40000000u
#define DATA_OFFSET 0x40
#define CODE_OFFSET 0x80
#define RETURN_INSTRUCTION 0xc3
#define SAMPLE_DEFAULT 10 /* sets of axes for each state of control registers and ring; each is tried with four kinds */

#define CONTROL_AXES (AXIS_NO_WP | AXIS_NO_SMEP | AXIS_RING3)
#define DIRECTORY_AXES \
    (AXIS_DIR_ABSENT | AXIS_DIR_READONLY | AXIS_DIR_SUPERVISOR | AXIS_DIR_NX | AXIS_DIR_RESERVED | AXIS_DIR_ACCESSED)
#define ENTRY_AXES AXIS_INDEX_NO_WP /* the axes before it are of entries */

extern const char access_at_read[], access_at_write[], access_at_modify[], access_failed[], access_failed_call[];
u32 access_touch(u32 kind, u32 address, u32 value);
u32 access_value;

/* Job 1: enumeration. */

struct sequence {
    u32 control;       /* axes of control registers and ring, fixed for a stretch */
    u32 first, second; /* the next pair of entry axes, by index; index ENTRY_AXES is no axis */
    u32 sampled;       /* sets of the sample so far; the sample follows when the pairs have run through */
    u32 entry;         /* entry axes of the current case */
    u32 kind;          /* 0 before a stretch's first case */
    u32 random;
};

static u32 count_bits(u32 set)
{
    u32 n = 0;
    for (; set; set &= set - 1)
        n++;
    return n;
}

/* A legacy entry has reserved bits only if it is a large page's: there the one axis brings the other with it. */
static u32 complete(u32 entry) { return !paging.pae && entry & AXIS_RESERVED ? entry | AXIS_LARGE : entry; }

/* Whether the axes make sense together, in this format and on this CPU. */
static bool legal(u32 axes)
{
    if (axes & AXIS_LARGE && axes & DIRECTORY_AXES)
        return false; /* a large page has no entry of a directory above it */
    if (!paging.nx && axes & (AXIS_NX | AXIS_DIR_NX))
        return false;
    if (!paging.smep && axes & AXIS_NO_SMEP)
        return false;
    return paging.pae || !(axes & (AXIS_ROOT_ABSENT | AXIS_DIR_RESERVED));
}

static u32 next_random(struct sequence *sequence)
{
    u32 x = sequence->random;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return sequence->random = x;
}

/* Axes that the case may still have off, beside those of its control registers; the ring does not count. */
static u32 pairs_room(const struct sequence *sequence)
{
    return 2 - count_bits(sequence->control & ~(u32)AXIS_RING3);
}

/* The next pair, single axis, or none at all, such that the case has at most two axes off the plain one. */
static bool advance_pairs(struct sequence *sequence)
{
    while (sequence->first <= ENTRY_AXES) {
        u32 chosen = (1u << sequence->first | 1u << sequence->second) & ((1u << ENTRY_AXES) - 1);
        if (++sequence->second > ENTRY_AXES)
            sequence->second = min_u32(++sequence->first + 1, ENTRY_AXES);
        sequence->entry = complete(chosen);
        if (count_bits(chosen) <= pairs_room(sequence) && legal(sequence->entry | sequence->control))
            return true;
    }
    return false;
}

static bool advance_sample(struct sequence *sequence)
{
    if (sequence->sampled++ >= max_u32(SAMPLE_DEFAULT * boot.options.scale / 100, 1))
        return false;
    u32 chosen;
    do {
        chosen = next_random(sequence) >> 8 & ((1u << ENTRY_AXES) - 1);
        sequence->entry = complete(chosen);
    } while (count_bits(chosen) <= pairs_room(sequence) || !legal(sequence->entry | sequence->control));
    return true;
}

static void begin_stretch(struct sequence *sequence, u32 control)
{
    sequence->control = control;
    sequence->first = 0;
    sequence->second = 1;
    sequence->sampled = 0;
    sequence->kind = 0;
}

static bool advance_control(struct sequence *sequence)
{
    u32 control = sequence->control;
    do
        control += AXIS_NO_WP; /* the lowest of the three, which are adjacent */
    while (control <= CONTROL_AXES && !legal(control));
    begin_stretch(sequence, control);
    return control <= CONTROL_AXES;
}

/* Moves to the next case; false after the last. */
static bool advance(struct sequence *sequence)
{
    if (sequence->kind && ++sequence->kind <= PROBE_EXECUTE)
        return true;
    do {
        sequence->kind = PROBE_READ;
        if (advance_pairs(sequence) || advance_sample(sequence))
            return true;
    } while (advance_control(sequence));
    return false;
}

/* Job 2: the slot. */

struct slot {
    struct upt *upt;
    u32 directory_frame, table_frame;
    u32 page_frame;
    u32 va; /* of the page */
    u8 *page;
    pte_t root; /* with everything present */
};

static struct slot slot;

static u32 large_frames(void) { return table_reach() / PAGE_SIZE; }

static bool slot_open(struct upt *upt)
{
    struct leaf leaf;
    u32 frame = frame_alloc(ZONE_LOW);
    if (frame == FRAME_NONE)
        return false;
    if (!upt_open(upt, TEST_BASE, true, &leaf)) {
        frame_put(frame);
        return false;
    }
    upt_close(&leaf);
    slot = (struct slot){.upt = upt,
                         .directory_frame = paging.pae ? pte_frame(upt->pdpt[TEST_BASE >> 30]) : upt->root,
                         .table_frame = leaf.frame,
                         .page_frame = frame,
                         .va = TEST_BASE + frame % large_frames() * PAGE_SIZE,
                         .page = low_address(frame),
                         .root = upt->pdpt[TEST_BASE >> 30]};
    clear_page(slot.page);
    slot.page[CODE_OFFSET] = RETURN_INSTRUCTION;
    return true;
}

/* The slot's table was filled behind upt.c's back, but with one entry, which is 0 again by now. */
static void slot_close(void)
{
    u32 table = upt_unlink(slot.upt, TEST_BASE);
    if (flush_kept(FLUSH_ACCESS_CLOSE))
        invlpg(slot.va);
    frame_put(table);
    frame_put(slot.page_frame);
}

static u32 *data_word(void) { return (u32 *)(slot.page + DATA_OFFSET); }

/* One of the bits that are reserved at this place, by chance. */
static pte_t reserved_bit(bool large, u32 chance)
{
    static const u8 pae[] = {52, 55, 57, 62}, pae_large[] = {13, 20, 52, 62};
    if (!paging.pae)
        return 1u << 21;
    return 1ull << (large ? pae_large : pae)[chance % 4];
}

static pte_t entry_of(u32 frame, u32 axes, u32 absent, pte_t reserved)
{
    pte_t entry = pte_make(frame, reserved);
    /* `absent` is the first of five axes that mean the same for a page and for a directory entry. */
    entry |= axes & absent ? 0 : PTE_P;
    entry |= axes & absent << 1 ? 0 : PTE_W;
    entry |= axes & absent << 2 ? 0 : PTE_U;
    entry |= axes & absent << 3 ? PTE_NX : 0;
    return axes & absent << 4 ? entry : entry & ~reserved;
}

_Static_assert(AXIS_INDEX_RESERVED == AXIS_INDEX_ABSENT + 4, "");
_Static_assert(AXIS_INDEX_DIR_RESERVED == AXIS_INDEX_DIR_ABSENT + 4, "");

static struct access_setup build(u32 axes, u32 kind, u32 chance)
{
    bool large = axes & AXIS_LARGE;
    u32 frame = large ? slot.page_frame - slot.page_frame % large_frames() : slot.page_frame;
    pte_t page = entry_of(frame, axes, AXIS_ABSENT, reserved_bit(large, chance));
    page |= axes & AXIS_ACCESSED ? PTE_A : 0;
    page |= axes & AXIS_DIRTY ? PTE_D : 0;
    struct access_setup setup = {.root = axes & AXIS_ROOT_ABSENT ? 0 : slot.root,
                                 .large = large,
                                 .nx = paging.nx,
                                 .wp = !(axes & AXIS_NO_WP),
                                 .smep = paging.smep && !(axes & AXIS_NO_SMEP),
                                 .user = axes & AXIS_RING3,
                                 .kind = kind};
    if (large) {
        setup.directory = page | PTE_PS;
        return setup;
    }
    setup.directory = entry_of(slot.table_frame, axes, AXIS_DIR_ABSENT, reserved_bit(false, chance >> 4));
    setup.directory |= axes & AXIS_DIR_ACCESSED ? PTE_A : 0;
    setup.table = page;
    return setup;
}

static void set_root(pte_t root)
{
    if (!paging.pae || slot.upt->pdpt[TEST_BASE >> 30] == root)
        return;
    slot.upt->pdpt[TEST_BASE >> 30] = root;
    flush_not_global(FLUSH_ACCESS_POINTERS); /* the CPU reads it at MOV CR3 only */
}

static void slot_write(const struct access_setup *setup)
{
    void *directory = kmap_local(slot.directory_frame, "access, directory");
    table_set(directory, directory_index(slot.va), setup->directory);
    kunmap_local(directory);
    void *table = kmap_local(slot.table_frame, "access, table");
    table_set(table, table_index(slot.va), setup->table);
    kunmap_local(table);
    set_root(setup->root);
    if (flush_kept(FLUSH_ACCESS_SLOT))
        invlpg(slot.va);
}

static void slot_read(struct access_outcome *outcome)
{
    void *directory = kmap_local(slot.directory_frame, "access, directory");
    outcome->directory = table_get(directory, directory_index(slot.va));
    kunmap_local(directory);
    void *table = kmap_local(slot.table_frame, "access, table");
    outcome->table = table_get(table, table_index(slot.va));
    kunmap_local(table);
}

/* Everything as upt.c left it: linked, and empty. */
static void slot_restore(void)
{
    struct access_setup plain = {
        .root = slot.root, .directory = pte_make(slot.table_frame, PTE_A | PTE_U | PTE_W | PTE_P)};
    slot_write(&plain);
}

/* Job 3: running. */

struct run {
    struct sequence sequence;
    struct access_setup setup;
    u32 address; /* of the access */
    u32 token;   /* the data word before the access */
    struct access_outcome got;
    bool strayed;
};

static struct run run;
bool access_armed;

static u32 run_axes(void) { return run.sequence.entry | run.sequence.control; }

static void set_control(const struct access_setup *setup)
{
    static u32 cr0, cr4;
    if (!cr0) {
        cr0 = read_cr0();
        cr4 = read_cr4();
    }
    u32 new_cr0 = setup->wp ? cr0 | CR0_WP : cr0 & ~CR0_WP;
    u32 new_cr4 = setup->smep ? cr4 | CR4_SMEP : cr4 & ~CR4_SMEP;
    if (new_cr0 != cr0)
        write_cr0(cr0 = new_cr0);
    if (new_cr4 != cr4)
        write_cr4(cr4 = new_cr4);
}

static void begin_case(void)
{
    u32 chance = next_random(&run.sequence);
    run.setup = build(run_axes(), run.sequence.kind, chance >> 8);
    run.address = slot.va + (run.setup.kind == PROBE_EXECUTE ? CODE_OFFSET : DATA_OFFSET);
    *data_word() = ++run.token;
    run.got = (struct access_outcome){.fault = false};
    run.strayed = false;
    set_control(&run.setup);
    slot_write(&run.setup);
    access_armed = true;
}

/* `value`: what a read that passed has given. */
static void end_case(u32 value)
{
    access_armed = false;
    slot_read(&run.got);
    bool wrote = !run.got.fault && (run.setup.kind == PROBE_WRITE || run.setup.kind == PROBE_MODIFY);
    run.strayed |= *data_word() != run.token + wrote;
    run.strayed |= !run.got.fault && run.setup.kind == PROBE_READ && value != run.token;
    access_report_case(run_axes(), &run.setup, &run.got, run.strayed);
}

/* Runs all cases of ring 0 that come next; leaves with one of ring 3 begun, or false after the last case. */
static bool run_to_ring3(void)
{
    while (advance(&run.sequence)) {
        begin_case();
        if (run.setup.user)
            return true;
        access_touch(run.setup.kind, run.address, run.token + 1);
        end_case(access_value);
    }
    return false;
}

static void order_next(struct trap_frame *frame)
{
    if (run_to_ring3()) {
        frame->eax = run.setup.kind;
        frame->ecx = run.address;
        frame->edx = run.token + 1;
        return;
    }
    const struct access_setup as_always = {.wp = true, .smep = paging.smep};
    set_control(&as_always);
    slot_restore();
    slot_close();
    frame->eax = PROBE_END;
}

/* Where the program goes on: behind its INT. */
static u32 resume_eip;

static void begin(void)
{
    current->stays = true;
    if (!slot_open(&current->space.upt))
        panic("no memory for the access workload");
}

void access_probe(struct trap_frame *frame)
{
    resume_eip = frame->eip;
    if (access_armed)
        end_case(frame->edx);
    else
        begin();
    order_next(frame);
}

static void note_fault(const struct trap_frame *frame, u32 cr2)
{
    run.got.fault = true;
    run.got.error = frame->error;
    run.strayed |= cr2 != run.address;
}

/* Where ring-0 code goes on after its access has faulted; 0 if the fault is not one of ours. */
static u32 resume_in_kernel(u32 eip)
{
    if (eip == (u32)access_at_read || eip == (u32)access_at_write || eip == (u32)access_at_modify)
        return (u32)access_failed;
    return eip == run.address && run.setup.kind == PROBE_EXECUTE ? (u32)access_failed_call : 0;
}

bool access_fault(struct trap_frame *frame, u32 cr2)
{
    if (trap_from_user(frame) != run.setup.user || (cr2 & PAGE_MASK) != slot.va)
        return false;
    if (!run.setup.user) {
        u32 eip = resume_in_kernel(frame->eip);
        if (!eip)
            return false;
        note_fault(frame, cr2);
        frame->eip = eip;
        return true;
    }
    note_fault(frame, cr2);
    end_case(0);
    frame->eip = resume_eip;
    order_next(frame);
    return true;
}

void work_access(void)
{
    run.sequence.random = boot.options.seed * 2654435761u | 1;
    begin_stretch(&run.sequence, 0);
    u32 status = process_run(&program_access);
    check(status == 0, "access ends with status 0");
    access_report_print();
}
