/* GDT, TSS and IDT.
 *
 * Holds: all gates are interrupt gates, so every trap starts with interrupts off (irq.h builds on it). A TSS for each CPU, used
 * only for SS0:ESP0, whose descriptors stand before any other CPU starts; no task gates, no LDT, and an I/O map past the TSS's
 * limit, so user code has no ports.
 * Limits: a double fault runs on the stack that it happened on. That serves all but an unusable stack, which ends in a
 * triple fault. */
#include "desc.h"

#include "boot.h"
#include "cpus.h"
#include "layout.h"
#include "string.h"
#include "trap.h"

struct gate {
    u16 offset_low, selector;
    u8 zero, type;
    u16 offset_high;
};

struct tss {
    u32 link, esp0, ss0;
    u32 unused[22];
    u16 trap, io_map;
};

struct table_register {
    u16 limit;
    u32 base;
} __attribute__((packed));

#define GATE_INTERRUPT 0x8e
#define GATE_USER 0x60

/* Flat 4 GiB segments: base 0, limit fffff pages. Accessed is set, so that loading one writes nothing. */
#define SEGMENT(access) (0x00cf00000000ffffull | (u64)(access) << 40)
#define CODE_KERNEL 0x9b
#define DATA_KERNEL 0x93
#define CODE_USER 0xfb
#define DATA_USER 0xf3
#define TSS_AVAILABLE 0x89ull

/* Each within a page. */
static struct tss tss[CPUS_MAX] __attribute__((aligned(1024)));
/* A page of its own: a hypervisor that keeps a copy of the table must look at every store to its page. */
static u64 gdt[4096 / 8] __attribute__((aligned(4096))) = {
    0, SEGMENT(CODE_KERNEL), SEGMENT(DATA_KERNEL), SEGMENT(CODE_USER), SEGMENT(DATA_USER),
};
#define TSS_INDEX (TSS_SELECTOR / 8)
static struct gate idt[256];

static void set_gate(u32 vector, const void *stub, u8 type)
{
    u32 offset = (u32)stub;
    idt[vector] = (struct gate){.offset_low = (u16)offset,
                                .selector = KERNEL_CS,
                                .type = type,
                                .offset_high = (u16)(offset >> 16)};
}

static void make_tss(u32 index)
{
    u64 base = (u32)&tss[index];
    tss[index] = (struct tss){.ss0 = KERNEL_DS, .io_map = sizeof(struct tss)};
    gdt[TSS_INDEX + index] =
        (sizeof(struct tss) - 1) | (base & 0xffffff) << 16 | TSS_AVAILABLE << 40 | (base >> 24) << 56;
}

static void load_gdt(u32 index)
{
    struct table_register gdtr = {(u16)((TSS_INDEX + boot.cpu_count) * sizeof(gdt[0]) - 1), (u32)gdt};
    __asm__ volatile("lgdt %0\n\t"
                     "ljmp %1, $1f\n"
                     "1:\tmov %2, %%ds\n\t"
                     "mov %2, %%es\n\t"
                     "mov %2, %%ss\n\t"
                     "mov %3, %%fs\n\t"
                     "mov %3, %%gs\n\t"
                     "ltr %w4"
                     :
                     : "m"(gdtr), "i"(KERNEL_CS), "r"(KERNEL_DS), "r"(0), "r"(TSS_SELECTOR + index * 8)
                     : "memory");
}

void descriptors_load(const struct cpu *self)
{
    load_gdt(self->index);
    struct table_register idtr = {sizeof(idt) - 1, (u32)idt};
    __asm__ volatile("lidt %0" : : "m"(idtr));
}

void descriptors_init(void)
{
    for (u32 index = 0; index < boot.cpu_count; index++)
        make_tss(index);
    for (u32 vector = 0; vector < TRAP_STUBS; vector++)
        set_gate(vector, trap_stubs[vector], GATE_INTERRUPT);
    set_gate(VECTOR_SYSCALL, trap_syscall_stub, GATE_INTERRUPT | GATE_USER);
    set_gate(VECTOR_SPURIOUS, trap_spurious_stub, GATE_INTERRUPT);
    descriptors_load(cpu_self());
}

void tss_set_stack(u32 top) { tss[cpu_self()->index].esp0 = top; }
