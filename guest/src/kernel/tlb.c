/* Which page tables are loaded, and making CPUs forget translations.
 *
 * The shootdown, of what another CPU may have in its TLB:
 *
 *   has the space's lock                        the other CPU: in user code, in the kernel, or waiting for a lock
 *   ----------------------------------------    ---------------------------------------------------------------
 *   takes the entry away, with its A and D      may use the old translation, and set no more A or D by it
 *   notes the page in its request to the CPU    or loads another root, and has forgotten it then
 *   ... more pages, other spaces ...
 *   tlb_finish: wanted := true, called := true,
 *   interrupt
 *   waits until not wanted; meanwhile does      takes the interrupt, or sees `called` where it takes a lock
 *   what others want of it                      INVLPG each page, or MOV CR3; wanted := false
 *   reads, writes or frees the frames           faults if it touches one, and waits for the space's lock
 *
 * One that halts is not woken for this. It uses no translation of what is dropped before it has looked at `stale`:
 *
 *   stale := true                               halted := true; ...; halted := false
 *   does it halt still? nothing is to be done   fence; is it stale? forgets everything
 *
 * Holds: loaded_root is what CR3 holds, or is about to: it is written first, so that who finds another root there knows that what it
 * has taken away is forgotten. CR3 itself is never read back, which would be one more exit. INV-G-TLB-1: a root other than
 * the kernel's is loaded on one CPU at most. INV-G-TLB-2: a CPU has one request to each other, and changes it only while it is not
 * wanted; between a tlb_drop and its tlb_finish the task does not sleep. Window slots are each CPU's own and need none of this.
 * Locks: none. Who waits in tlb_finish may have locks: whoever waits for those answers. */
#include "tlb.h"

#include "apic.h"
#include "check.h"
#include "cpu.h"
#include "irq.h"
#include "kpt.h"
#include "omit.h"

bool tlb_is_loaded_anywhere(u32 root)
{
    for (const struct cpu *other = cpus; other < cpus_end; other++)
        if (other->loaded_root == root)
            return true;
    return false;
}

void tlb_load(u32 root)
{
    struct cpu *self = cpu_self();
    if (self->loaded_root == root)
        return;
    if (smp)
        ASSERT(root == kpt_root() || !tlb_is_loaded_anywhere(root));
    self->loaded_root = root;
    write_cr3(root);
}

void flush_not_global(enum flush flush)
{
    struct cpu *self = cpu_self();
    self->stale = false;
    if (flush_kept(flush))
        write_cr3(self->loaded_root);
}

/* True where it halts, and will look at `stale` before it does anything else. */
static bool leave_to(struct cpu *other)
{
    if (!other->halted)
        return false;
    other->stale = true;
    fence();
    return other->halted;
}

static void note(struct cpu *self, struct cpu *other, u32 page)
{
    struct flush_request *request = &self->flush[other->index];
    if (leave_to(other))
        return;
    if (request->count < FLUSH_PAGES_MAX)
        request->pages[request->count] = page;
    if (request->count <= FLUSH_PAGES_MAX)
        request->count++;
}

/* The entry has been taken away by a locked instruction: whoever loads the root after this look does not find it. */
void tlb_drop(u32 root, u32 page)
{
    struct cpu *self = cpu_self();
    if (self->loaded_root == root) {
        if (flush_kept(FLUSH_DROP_LOCAL))
            invlpg(page);
    } else if (smp && flush_kept(FLUSH_DROP_REMOTE)) {
        for (struct cpu *other = cpus; other < cpus_end; other++)
            if (other->loaded_root == root)
                note(self, other, page);
    }
}

void tlb_age(u32 root, u32 page)
{
    if (tlb_is_loaded(root)) {
        if (flush_kept(FLUSH_AGE_LOCAL))
            invlpg(page);
    } else if (smp && flush_kept(FLUSH_AGE_REMOTE)) {
        for (struct cpu *other = cpus; other < cpus_end; other++)
            if (other->loaded_root == root)
                other->stale = true;
    }
}

static void ask(struct cpu *self, struct cpu *other)
{
    struct flush_request *request = &self->flush[other->index];
    self->flushes_sent++;
    request->wanted = true;
    fence();
    other->called = true;
    apic_send(other->apic_id, VECTOR_FLUSH);
}

/* All are asked first and awaited then. */
static void shoot_down(struct cpu *self)
{
    for (struct cpu *other = cpus; other < cpus_end; other++)
        if (self->flush[other->index].count && flush_kept(FLUSH_FINISH))
            ask(self, other);
    for (struct cpu *other = cpus; other < cpus_end; other++) {
        struct flush_request *request = &self->flush[other->index];
        while (request->wanted && flush_kept(FLUSH_FINISH_WAIT)) {
            tlb_serve(self);
            pause();
        }
        request->count = 0;
    }
}

void tlb_finish(void)
{
    if (smp)
        shoot_down(cpu_self());
}

void flush_not_global_everywhere(void)
{
    struct cpu *self = cpu_self();
    flush_not_global(FLUSH_POOL_LOCAL);
    for (struct cpu *other = cpus; other < cpus_end && flush_kept(FLUSH_POOL_REMOTE); other++)
        if (other != self && !leave_to(other))
            self->flush[other->index].count = FLUSH_PAGES_MAX + 1;
    tlb_finish();
}

static void serve(struct cpu *self, struct flush_request *request)
{
    if (request->count > FLUSH_PAGES_MAX) {
        if (flush_kept(FLUSH_SERVE_ALL))
            write_cr3(self->loaded_root);
    } else if (flush_kept(FLUSH_SERVE_PAGES)) {
        for (u32 i = 0; i < request->count; i++)
            invlpg(request->pages[i]);
    }
    self->flushes++;
    barrier();
    request->wanted = false;
}

/* Not to be interrupted by itself: it would say for the next request that it is served. */
void tlb_serve_all(struct cpu *self)
{
    irq_off();
    self->called = false;
    fence();
    for (struct cpu *other = cpus; other < cpus_end; other++)
        if (other->flush[self->index].wanted)
            serve(self, &other->flush[self->index]);
    irq_on();
}
