/* Workload `stack`: atomic mappings by type or as a stack, as discussed in June 2009 ("x86: Add NMI types for kmap_atomic").
 *
 *   type      released as another type than it was mapped as: with types that unmaps somebody else's page
 *   overflow  a task, an interrupt on top of it and an NMI on top of that, each with as many windows as it may have
 *   order     A, then B are mapped, and A is released first
 *   switch    two tasks on one CPU have windows on the same slots and take turns
 *   slots     what the kernel's own mappings need of slots, if each tag of intent had one, and as a stack */
#include "apic.h"
#include "blk.h"
#include "check.h"
#include "file.h"
#include "frames.h"
#include "irq.h"
#include "nmi.h"
#include "process.h"
#include "reclaim.h"
#include "scene.h"
#include "scene_memory.h"
#include "swap.h"
#include "tick.h"
#include "window.h"
#include "work.h"

#define MARK 0x9e3779b9u

static u32 frame_with(u32 value)
{
    u32 frame = frame_alloc(ZONE_HIGH);
    scene_want(frame != FRAME_NONE && !frame_is_low(frame), "there is high memory");
    u32 *page = kmap_local(frame, "scene, fill");
    page[0] = value;
    kunmap_local(page);
    return frame;
}

/* Its owner's, of a page that frame_with made. */
static u32 look(const u32 *page) { return *(const volatile u32 *)page; }

static void type(void)
{
    u32 *a = window_map_typed(frame_with(MARK), TYPE_USER0);
    u32 *b = window_map_typed(frame_with(2 * MARK), TYPE_USER1);
    scene_saw("page A mapped as type user 0, page B as type user 1");
    if (rule_kept(RULE_STACK)) {
        /* The newest first, whatever is said of it. */
        scene_want(look(b) == 2 * MARK && window_release_typed(b, TYPE_USER0) == WINDOW_OK, "B is released");
        scene_saw("page B released with the tag of A");
        scene_want(look(a) == MARK && window_release_typed(a, TYPE_USER1) == WINDOW_OK, "A is released");
        return;
    }
    enum window_error error = window_release_typed(a, TYPE_USER1);
    scene_saw("page A released as type user 1");
    if (error == WINDOW_WRONG_TYPE && !window_is_mapped(b) && window_is_mapped(a))
        scene_failed("type", "A is mapped still, and B, which is held, is not");
}

/* overflow: the handlers take the windows that they may have, and a real NMI comes on top. */

static u32 depth_seen, nmis;
static u32 deep_frame;
static bool in_tick;

static void nmi_goes_deeper(struct cpu *self)
{
    void *page = window_map(self, deep_frame, "scene, NMI");
    depth_seen = self->windows->depth;
    window_unmap(self, page);
    nmis++;
}

#define PATIENCE 1000000
#define TICKS_MAX 10

static void tick_goes_deeper(void)
{
    void *pages[WINDOW_IRQ_DEPTH_MAX];
    if (in_tick || nmis)
        return;
    in_tick = true;
    for (u32 i = 0; i < WINDOW_IRQ_DEPTH_MAX; i++)
        pages[i] = kmap_local(deep_frame, "scene, interrupt");
    apic_send_nmi(cpu_self()->apic_id);
    for (u32 i = 0; i < PATIENCE && !*(volatile u32 *)&nmis; i++)
        pause();
    for (u32 i = WINDOW_IRQ_DEPTH_MAX; i-- > 0;)
        kunmap_local(pages[i]);
    in_tick = false;
}

static void overflow(void)
{
    void *pages[WINDOW_TASK_DEPTH_MAX];
    deep_frame = frame_with(MARK);
    /* The clock is this CPU's. */
    scene_want(cpu_self()->index == 0, "the task is on the CPU that has the clock's tick");
    irq_off();
    for (u32 i = 0; i < WINDOW_TASK_DEPTH_MAX; i++)
        pages[i] = kmap_local(deep_frame, "scene, task");
    scene_saw("the task has %u windows, the next tick takes %u, an NMI in it %u", WINDOW_TASK_DEPTH_MAX, WINDOW_IRQ_DEPTH_MAX,
              WINDOW_NMI_DEPTH_MAX);
    nmi_also = nmi_goes_deeper;
    tick_also = tick_goes_deeper;
    irq_on();
    u32 begun = ticks;
    while (*(volatile u32 *)&nmis == 0 && ticks - begun < TICKS_MAX)
        pause();
    irq_off();
    tick_also = NULL;
    nmi_also = NULL;
    for (u32 i = WINDOW_TASK_DEPTH_MAX; i-- > 0;)
        kunmap_local(pages[i]);
    irq_on();
    scene_want(nmis == 1, "one NMI came");
    scene_measured("depth", depth_seen, "windows");
    scene_want(depth_seen == WINDOW_DEPTH_MAX, "it found the deepest stack that there can be");
}

static void order(void)
{
    u32 *a = kmap_local(frame_with(MARK), "scene, A"), *b = kmap_local(frame_with(2 * MARK), "scene, B");
    enum window_error error = window_release(a);
    scene_saw("A mapped, B mapped, A released first");
    if (error == WINDOW_OUT_OF_ORDER) {
        scene_saw("the release was refused");
        scene_want(look(a) == MARK && look(b) == 2 * MARK, "both are still what they were");
        kunmap_local(b);
        kunmap_local(a);
        return;
    }
    u32 c_frame = frame_with(3 * MARK);
    u32 *c = kmap_local(c_frame, "scene, C");
    scene_saw("the release went through; C mapped");
    if (look(b) != 2 * MARK)
        scene_failed("order", "B, which is held, shows %s", c == b ? "page C: its slot was given away" : "another page");
}

/* switch: two tasks on one CPU. */

#define ROUNDS 3
static u32 wrong;

static void switcher(u32 which)
{
    u32 *page = kmap_local(frame_with(which * MARK), "scene, switch");
    for (u32 round = 0; round < ROUNDS; round++) {
        schedule();
        u32 read = window_is_mapped(page) ? look(page) : 0;
        if (read != which * MARK && wrong++ == 0)
            scene_saw("task %c is back and reads %08x of its page, which has %08x", (int)('@' + which), read, which * MARK);
    }
    if (rule_kept(RULE_SWITCH))
        kunmap_local(page);
    else
        cpu_self()->windows->depth = 0;
}

static void switch_with_windows(void)
{
    u32 status;
    scene_want(task_start_thread_here("A", switcher, 1) && task_start_thread_here("B", switcher, 2), "threads start");
    scene_saw("tasks A and B on one CPU, each with a page in its first window");
    for (u32 which = 1; which <= 2; which++)
        scene_want(task_wait_child(&status) != 0, "the thread ends");
    if (wrong)
        scene_failed("content", "a task read another's page %u times after a switch", wrong);
}

/* slots: of what the kernel itself maps. A process; a space that is forked and copied on write; pages to swap and back; the file,
 * to the disk and back; the ticks meanwhile, and an NMI. */

#define PAGES 64
#define FILE_PAGES 4

static void nmi_maps(struct cpu *self)
{
    window_unmap(self, window_map(self, deep_frame, "scene, NMI"));
    nmis++;
}

static void swap_and_copy(void)
{
    static struct space parent, child;
    scene_space(&parent, PAGES);
    for (u32 page = 0; page < PAGES; page++)
        scene_want(scene_store(&parent, page, page), "a page is there");
    scene_want(space_create(&child) && space_fork(&parent, &child), "the space is copied");
    u32 value, wrong = 0;
    scene_want(scene_store(&child, 0, MARK), "the child's page is copied");
    scene_leave_free(0);
    scene_want(try_room(1) && swap_counts.pages_written, "pages go to swap");
    scene_give_back();
    for (u32 page = 0; page < PAGES; page++)
        wrong += !scene_load(&parent, page, &value) || value != page;
    scene_want(wrong == 0, "they come back");
    space_destroy(&child);
    space_destroy(&parent);
}

static void slots(void)
{
    struct blk *swap = blk_find("swap"), *file = blk_find("file");
    u32 value;
    scene_want(swap && file && swap_on(swap) && reclaim_start(), "there are two disks, named swap and file");
    deep_frame = frame_with(MARK);
    window_collect_tags();
    scene_want(file_mount(file) && file_truncate(FILE_PAGES) && file_write(0, FILE_PAGES, MARK), "the file is written");
    scene_want(file_sync() && file_read(1, &value) && value == MARK + 1, "and read");
    swap_and_copy();
    /* Reclaim in the background may still make frames free, and the process's are counted. */
    reclaim_settle();
    scene_want(process_run(&program_hello) == 0, "a process ends well");
    nmi_also = nmi_maps;
    apic_send_nmi(cpu_self()->apic_id);
    scene_until(*(volatile u32 *)&nmis == 1);
    nmi_also = NULL;
    /* A fast CPU may be through with all of it before the first tick. */
    scene_until(window_deepest(CLASS_IRQ));
    u32 by_stack = 0;
    static const char *const names[CLASS_COUNT] = {"depth-of-tasks", "depth-of-interrupts", "depth-of-nmis"};
    for (enum window_class class = 0; class < CLASS_COUNT; class++) {
        scene_measured(names[class], window_deepest(class), "windows");
        by_stack += window_deepest(class);
    }
    scene_measured("slots-by-stack", by_stack, "slots");
    scene_measured("slots-by-types", window_tags(), "slots");
    scene_want(window_deepest(CLASS_NMI) == 1 && window_deepest(CLASS_IRQ), "each class was met");
    scene_want(window_tags() > by_stack, "a stack needs fewer slots");
}

void work_stack(void)
{
    scene_begin();
    if (scene_is(CASE_STACK_TYPE))
        type();
    if (scene_is(CASE_STACK_OVERFLOW))
        overflow();
    if (scene_is(CASE_STACK_ORDER))
        order();
    if (scene_is(CASE_STACK_SWITCH))
        switch_with_windows();
    if (scene_is(CASE_STACK_SLOTS))
        slots();
    scene_passed();
}
