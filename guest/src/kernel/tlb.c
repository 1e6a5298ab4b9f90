/* Which page tables are loaded, and making CPUs forget translations.
 *
 * The shootdown, by whoever has the kernel, of what another CPU may have in its TLB:
 *
 *   has the kernel                              the other CPU: in user code, or waiting for the kernel
 *   ----------------------------------------    ---------------------------------------------------------------
 *   takes the entry away, with its A and D      may use the old translation, and set no more A or D by it
 *   notes the page in the CPU's request         (may not load another root: for that it wants the kernel)
 *   ... more pages ...
 *   tlb_finish: wanted := true, interrupt       takes the interrupt, or sees `wanted` while it waits for the kernel
 *   waits until not wanted                      INVLPG each page, or MOV CR3; wanted := false
 *   reads, writes or frees the frames           faults if it touches one, and waits for the kernel
 *
 * One that halts is not woken for this. It uses no translation of what is dropped before it has taken the kernel; `stale` then has
 * it forget everything first.
 *
 * Holds: loaded_root is what CR3 holds; CR3 itself is never read back, which would be one more exit. INV-G-TLB-1: a root other than
 * the kernel's is loaded on one CPU at most. INV-G-TLB-2: a request is changed only while it is not wanted. Window slots are each
 * CPU's own and need none of this.
 * Locks: the kernel, but for tlb_serve, which touches the CPU's own request alone. */
#include "tlb.h"

#include "apic.h"
#include "check.h"
#include "cpu.h"
#include "kpt.h"

u32 flushes_sent;

bool tlb_is_loaded_anywhere(u32 root)
{
    for (const struct cpu *other = cpus; other < cpus_end; other++)
        if (other->loaded_root == root)
            return true;
    return false;
}

void tlb_load(u32 root)
{
    if (cpu->loaded_root == root)
        return;
    if (smp)
        ASSERT(root == kpt_root() || !tlb_is_loaded_anywhere(root));
    cpu->loaded_root = root;
    write_cr3(root);
}

void flush_not_global(void)
{
    cpu->stale = false;
    write_cr3(cpu->loaded_root);
}

static void note(struct cpu *other, u32 page)
{
    struct flush_request *request = &other->flush;
    if (other->halted) {
        other->stale = true;
        return;
    }
    if (request->count < FLUSH_PAGES_MAX)
        request->pages[request->count] = page;
    if (request->count <= FLUSH_PAGES_MAX)
        request->count++;
}

static bool is_other_with(const struct cpu *other, u32 root) { return other != cpu && other->loaded_root == root; }

void tlb_drop(u32 root, u32 page)
{
    if (tlb_is_loaded(root))
        invlpg(page);
    else if (smp)
        for (struct cpu *other = cpus; other < cpus_end; other++)
            if (is_other_with(other, root))
                note(other, page);
}

void tlb_age(u32 root, u32 page)
{
    if (tlb_is_loaded(root))
        invlpg(page);
    else if (smp)
        for (struct cpu *other = cpus; other < cpus_end; other++)
            other->stale |= is_other_with(other, root);
}

static void ask(struct cpu *other)
{
    flushes_sent++;
    barrier();
    other->flush.wanted = true;
    apic_send(other->apic_id, VECTOR_FLUSH);
}

/* All are asked first and awaited then. */
static void shoot_down(void)
{
    for (struct cpu *other = cpus; other < cpus_end; other++)
        if (other->flush.count)
            ask(other);
    for (struct cpu *other = cpus; other < cpus_end; other++) {
        while (other->flush.wanted)
            pause();
        other->flush.count = 0;
    }
}

void tlb_finish(void)
{
    if (smp)
        shoot_down();
}

void flush_not_global_everywhere(void)
{
    flush_not_global();
    for (struct cpu *other = cpus; other < cpus_end; other++) {
        other->stale |= other->halted;
        if (other != cpu && !other->halted)
            other->flush.count = FLUSH_PAGES_MAX + 1;
    }
    tlb_finish();
}

void tlb_serve(struct cpu *self)
{
    struct flush_request *request = &self->flush;
    if (!request->wanted)
        return;
    barrier();
    if (request->count > FLUSH_PAGES_MAX)
        write_cr3(self->loaded_root);
    else
        for (u32 i = 0; i < request->count; i++)
            invlpg(request->pages[i]);
    self->flushes++;
    barrier();
    request->wanted = false;
}
