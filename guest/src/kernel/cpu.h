/* Single instructions.
 *
 * Holds: nothing here reads the flags, the code selector or a descriptor-table register: run at CPL 3 by a monitor, those
 * would tell of the monitor's world instead of ours (the ELF note promises their absence). */
#ifndef CPU_H
#define CPU_H

#include "types.h"

static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }

static inline u8 in8(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline void write_cr0(u32 value) { __asm__ volatile("mov %0, %%cr0" : : "r"(value) : "memory"); }
static inline void write_cr3(u32 value) { __asm__ volatile("mov %0, %%cr3" : : "r"(value) : "memory"); }
static inline void write_cr4(u32 value) { __asm__ volatile("mov %0, %%cr4" : : "r"(value) : "memory"); }

static inline u32 read_cr0(void)
{
    u32 value;
    __asm__ volatile("mov %%cr0, %0" : "=r"(value));
    return value;
}

static inline u32 read_cr2(void)
{
    u32 value;
    __asm__ volatile("mov %%cr2, %0" : "=r"(value));
    return value;
}

static inline u32 read_cr3(void)
{
    u32 value;
    __asm__ volatile("mov %%cr3, %0" : "=r"(value));
    return value;
}

static inline u32 read_cr4(void)
{
    u32 value;
    __asm__ volatile("mov %%cr4, %0" : "=r"(value));
    return value;
}

/* Forgets the translation of one page, global ones too. */
static inline void invlpg(u32 va) { __asm__ volatile("invlpg (%0)" : : "r"(va) : "memory"); }

struct cpuid {
    u32 eax, ebx, ecx, edx;
};

static inline struct cpuid cpuid(u32 leaf)
{
    struct cpuid r;
    __asm__ volatile("cpuid" : "=a"(r.eax), "=b"(r.ebx), "=c"(r.ecx), "=d"(r.edx) : "a"(leaf), "c"(0));
    return r;
}

static inline u64 read_time_stamp(void)
{
    u64 value;
    __asm__ volatile("rdtsc" : "=A"(value));
    return value;
}

static inline u64 read_msr(u32 msr)
{
    u64 value;
    __asm__ volatile("rdmsr" : "=A"(value) : "c"(msr));
    return value;
}

static inline void write_msr(u32 msr, u64 value) { __asm__ volatile("wrmsr" : : "A"(value), "c"(msr)); }

#endif
