/* The two paging formats, behind one entry type. See paging.h. */
#include "paging.h"

#include "boot.h"
#include "cpu.h"

struct paging paging READ_MOSTLY;

#define CPUID_1_EDX_PGE (1u << 13)
#define CPUID_7_EBX_SMEP (1u << 7)
#define CPUID_EXT1_EDX_NX (1u << 20)
#define MSR_EFER 0xc0000080
#define EFER_NXE (1u << 11)

static void enable_nx(void)
{
    if (cpuid(0x80000000).eax < 0x80000001 || !(cpuid(0x80000001).edx & CPUID_EXT1_EDX_NX))
        return;
    write_msr(MSR_EFER, read_msr(MSR_EFER) | EFER_NXE);
    paging.nx = PTE_NX;
}

u32 paging_efer(void) { return paging.nx ? EFER_NXE : 0; }

void paging_init(void)
{
    paging.pae = !boot.options.legacy;
    paging.entries = paging.pae ? 512 : 1024;
    paging.entry_bytes = PAGE_SIZE / paging.entries;
    paging.directory_shift = paging.pae ? 21 : 22;
    if (paging.pae)
        enable_nx();
    u32 cr4 = read_cr4();
    if (cpuid(1).edx & CPUID_1_EDX_PGE) {
        cr4 |= CR4_PGE;
        paging.global = PTE_G;
    }
    if (cpuid(0).eax >= 7 && cpuid(7).ebx & CPUID_7_EBX_SMEP) {
        cr4 |= CR4_SMEP;
        paging.smep = true;
    }
    write_cr4(cr4);
    paging.data = paging.nx | paging.global | PTE_D | PTE_A | PTE_W | PTE_P;
}
