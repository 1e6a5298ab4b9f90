/* A sampler by NMI.
 *
 * Story: the PIT's channel 0 goes through the first IOAPIC's pin 2 as an NMI, so a sample comes wherever the CPU happens to be: in
 * the middle of a window's map or release, of a switch of tasks, of reclaim. The handler may wait for nothing and must leave
 * everything as it was; user memory it reaches by the page tables and its own window slots, never by a user address, since a
 * fault would end the blocking of NMIs.
 * Each CPU gets them all, whether it has the kernel or not; which CPU it is, its stack tells.
 * Holds: INV-G-NMI-1: a walk changes nothing (not even which table was found last) and uses one window slot at a time, beyond
 * those of the task and the interrupt under it. An entry is written so that no walk can meet half of it (paging.h), and leads to a
 * frame that is in use. INV-G-NMI-2: only the space that this CPU has loaded is walked, and not while it halts: an entry taken by
 * another CPU meanwhile leads to its frame for as long as this CPU has not answered (tlb.c), which it cannot before the walk is
 * over; and tables go with their own task alone. */
#include "nmi.h"

#include "apic.h"
#include "boot.h"
#include "cpu.h"
#include "frames.h"
#include "irq.h"
#include "task.h"
#include "window.h"

#define PIT_CHANNEL_0 0x40
#define PIT_COMMAND 0x43
#define PIT_RATE_GENERATOR 0x34 /* channel 0, both bytes, mode 2 */
#define PIT_INPUT_HZ 1193182u

#define PIT_DIVISOR_MAX 0xffffu

#define FRAMES_WALKED_MAX 32
/* Seconds, and walks, after which there should be something. */
#define LONG_ENOUGH 4
#define WALKS_ENOUGH 32

static struct nmi_counts counts[CPUS_MAX];
static bool armed;
static u32 every; /* so many NMIs are one sample */
static u32 started_at;

/* The PIT cannot be slower than 18.2 Hz: below that it is some times as fast. */
void nmi_start(u32 hz)
{
    if (hz == 0)
        return;
    u32 divisor = PIT_INPUT_HZ / hz;
    every = divisor / (PIT_DIVISOR_MAX + 1) + 1;
    divisor /= every;
    started_at = ticks;
    armed = true;
    apic_pit_as_nmi(true);
    out8(PIT_COMMAND, PIT_RATE_GENERATOR);
    out8(PIT_CHANNEL_0, (u8)divisor);
    out8(PIT_CHANNEL_0, (u8)(divisor >> 8));
}

/* One may be under way still, so it stays armed. */
bool nmi_stop(void)
{
    if (!armed)
        return true;
    apic_pit_as_nmi(false);
    const struct nmi_counts total = nmi_total();
    bool long_enough = ticks - started_at >= LONG_ENOUGH * boot.options.hz;
    bool walks_enough = total.user + total.kernel >= WALKS_ENOUGH;
    return (!long_enough || total.samples) && (!walks_enough || total.whole);
}

/* An entry of a table that is reached through the window; 0 where there is no table. One that another CPU changes between two looks
 * may have been met in halves, and counts as absent. */
static pte_t entry_of(struct cpu *self, u32 table_frame, u32 index)
{
    if (table_frame == FRAME_NONE)
        return 0;
    const void *table = window_map(self, table_frame, "nmi: table");
    pte_t entry = table_get(table, index);
    bool whole = entry == table_get(table, index);
    window_unmap(self, table);
    return entry & PTE_P && whole ? entry : 0;
}

static bool read_user_word(struct cpu *self, u32 va, u32 *word)
{
    const struct upt *upt = &self->task->space.upt;
    u32 directory = paging.pae ? pte_frame(upt->pdpt[va >> 30]) : upt->root;
    u32 table = pte_frame(entry_of(self, directory, directory_index(va)));
    u32 frame = pte_frame(entry_of(self, table, table_index(va)));
    if (frame == FRAME_NONE)
        return false;
    const u32 *page = window_map(self, frame, "nmi: stack");
    *word = page[va % PAGE_SIZE / 4];
    window_unmap(self, page);
    return true;
}

/* A frame pointer leads to the caller's, and the stack only grows down: else it is none. */
static bool may_follow(u32 ebp, u32 before) { return ebp > before && ebp % 4 == 0 && ebp < USER_END - 8; }

/* The program's text stays where its region is from the start, whatever else of the regions is being changed. */
static bool is_code(const struct space *space, u32 address)
{
    for (u32 i = 0; i < space->region_count; i++) {
        const struct region *region = &space->regions[i];
        if (region->flags & REGION_EXEC && address >= region->start && address < region->end)
            return true;
    }
    return false;
}

static void walk_stack(struct cpu *self, struct nmi_counts *count, const struct space *space, u32 ebp)
{
    u32 before = 0, next, return_address;
    for (u32 depth = 0; ebp; depth++) {
        if (depth == FRAMES_WALKED_MAX) {
            count->cut++;
            return;
        }
        if (!may_follow(ebp, before)) {
            count->broken++;
            return;
        }
        if (!read_user_word(self, ebp, &next) || !read_user_word(self, ebp + 4, &return_address)) {
            count->absent++;
            return;
        }
        if (!is_code(space, return_address)) {
            count->broken++;
            return;
        }
        count->frames++;
        before = ebp;
        ebp = next;
    }
    count->whole++;
}

/* The frame pointer that the process left user mode with. On the way in or out, where its frame is not whole, EBP still has it:
 * traps.S leaves it alone. What lies above an NMI's frame in kernel mode is where the stack was; in the middle of a switch that
 * is another task's. */
static u32 user_frame_pointer(const struct task *task, const struct trap_frame *frame)
{
    const struct trap_frame *users = task_user_frame(task);
    u32 esp = (u32)&frame->user_esp;
    bool on_the_way = esp >= (u32)users && esp <= (u32)(users + 1);
    return trap_from_user(frame) || on_the_way ? frame->ebp : users->ebp;
}

void (*nmi_also)(struct cpu *self);

static void serve_scene(struct cpu *self)
{
    u32 depth = window_nmi_enter(self);
    nmi_also(self);
    window_nmi_leave(self, depth);
}

bool nmi_sample(const struct trap_frame *frame)
{
    if (nmi_also) {
        serve_scene(cpu_self());
        return true;
    }
    if (!armed)
        return false;
    struct cpu *self = cpu_self();
    const struct task *task = self->task;
    struct nmi_counts *count = &counts[self->index];
    if (++count->arrived % every)
        return true;
    u32 depth = window_nmi_enter(self);
    bool user = trap_from_user(frame);
    count->samples++;
    if (!task->is_process || self->halted || self->loaded_root != task->space.upt.cr3) {
        count->threads++;
    } else {
        count->user += user;
        count->kernel += !user;
        walk_stack(self, count, &task->space, user_frame_pointer(task, frame));
    }
    window_nmi_leave(self, depth);
    return true;
}

struct nmi_counts nmi_total(void)
{
    struct nmi_counts total = {0};
    for (const struct nmi_counts *count = counts; count < counts + CPUS_MAX; count++) {
        total.samples += count->samples;
        total.user += count->user;
        total.kernel += count->kernel;
        total.threads += count->threads;
        total.frames += count->frames;
        total.whole += count->whole;
        total.absent += count->absent;
        total.cut += count->cut;
        total.broken += count->broken;
    }
    return total;
}
