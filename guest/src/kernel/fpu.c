/* The FPU, switched lazily.
 *
 *   switch to the owner         TS off: its registers are still in the CPU
 *   switch to anybody else      TS on: the first FPU instruction is #NM
 *   #NM                         TS off, FXSAVE the owner's, FXRSTOR the current's, who owns them now
 *   fork                        FXSAVE first if the parent owns them
 *   exit                        nobody owns them
 *
 * With more than one CPU a task may go on elsewhere: its registers go home to its image whenever it is switched away, and each CPU
 * sets its FPU up at its first switch after fpu_init.
 *
 * Locks: an FPU is its CPU's; last_taker is only looked at to count, and hangs on no lock.
 * Holds: CR0.TS is clear if and only if the current task owns this CPU's registers. Kernel code has no use for them: FXSAVE, FXRSTOR
 * and FNINIT, all of which leave a pending x87 exception pending, are all there is; so it is raised in the process that caused
 * it, whoever ran in between. */
#include "fpu.h"

#include "check.h"
#include "cpu.h"
#include "string.h"
#include "task.h"

#define CR0_MP (1u << 1)
#define CR0_EM (1u << 2)
#define CR0_TS (1u << 3)
#define CR4_OSFXSR (1u << 9)
#define CR4_OSXMMEXCPT (1u << 10)

#define CPUID_1_EDX_NEEDED (1u << 0 | 1u << 24 | 1u << 25 | 1u << 26) /* x87, FXSR, SSE, SSE2 */

/* In an image. */
#define IMAGE_MXCSR 24
#define IMAGE_REGISTERS 32
#define MXCSR_RESET 0x1f80

u32 fpu_takes;

static bool on;
static u32 cr0; /* without TS */
static struct fpu *last_taker; /* on whatever CPU; or who went home last */
static struct fpu pristine;

static void save(struct fpu *fpu) { __asm__ volatile("fxsave %0" : "=m"(fpu->image)); }
static void restore(const struct fpu *fpu) { __asm__ volatile("fxrstor %0" : : "m"(fpu->image)); }

static void set_task_switched(bool wanted)
{
    if (wanted == cpu_self()->fpu_closed)
        return;
    cpu_self()->fpu_closed = wanted;
    if (wanted)
        write_cr0(cr0 | CR0_TS);
    else
        __asm__ volatile("clts");
}

/* FNINIT clears control, status and tags; data registers and MXCSR keep what firmware left there. */
static void make_pristine(void)
{
    __asm__ volatile("fninit");
    save(&pristine);
    *(u32 *)(pristine.image + IMAGE_MXCSR) = MXCSR_RESET;
    memset(pristine.image + IMAGE_REGISTERS, 0, FPU_IMAGE_BYTES - IMAGE_REGISTERS);
}

static void open_here(void)
{
    write_cr4(read_cr4() | CR4_OSFXSR | CR4_OSXMMEXCPT);
    write_cr0(cr0);
    cpu_self()->fpu_on = true;
    cpu_self()->fpu_closed = false;
}

bool fpu_init(void)
{
    if ((cpuid(1).edx & CPUID_1_EDX_NEEDED) != CPUID_1_EDX_NEEDED)
        return false;
    cr0 = (read_cr0() & ~(CR0_EM | CR0_TS)) | CR0_MP;
    open_here();
    make_pristine();
    on = true;
    set_task_switched(true);
    return true;
}

bool fpu_take(void)
{
    if (!on)
        return false;
    ASSERT(cpu_self()->fpu_owner != &current->fpu);
    set_task_switched(false);
    if (cpu_self()->fpu_owner)
        save(cpu_self()->fpu_owner);
    restore(current->fpu.used ? &current->fpu : &pristine);
    current->fpu.used = true;
    cpu_self()->fpu_owner = &current->fpu;
    fpu_takes += last_taker != cpu_self()->fpu_owner;
    last_taker = cpu_self()->fpu_owner;
    return true;
}

static void send_home(void)
{
    if (!cpu_self()->fpu_on)
        open_here();
    if (!cpu_self()->fpu_owner)
        return;
    save(cpu_self()->fpu_owner);
    last_taker = cpu_self()->fpu_owner;
    cpu_self()->fpu_owner = NULL;
}

void fpu_switch(const struct fpu *to)
{
    if (!on)
        return;
    if (smp)
        send_home();
    set_task_switched(to != cpu_self()->fpu_owner);
}

void fpu_reset(struct fpu *fpu) { fpu->used = false; }

void fpu_fork(struct fpu *child)
{
    if (cpu_self()->fpu_owner == &current->fpu)
        save(cpu_self()->fpu_owner);
    *child = current->fpu;
}

void fpu_drop(void)
{
    if (last_taker == &current->fpu)
        last_taker = NULL;
    if (cpu_self()->fpu_owner != &current->fpu)
        return;
    cpu_self()->fpu_owner = NULL;
    set_task_switched(true);
}
