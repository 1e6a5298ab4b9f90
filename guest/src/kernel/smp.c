/* Starting the other CPUs.
 *
 *   CPU 0                                          another
 *   -------------------------------------------    -----------------------------------------------
 *   its task, its stack; the trampoline (ap.S)     waits for a startup
 *   INIT to all, 10 ms
 *   startup; 200 us later once more, if need be    real mode, protected mode, paging
 *                                                  ap_main: descriptors, LAPIC; up := true
 *   admitted := true; cpus_end goes past it        waits for that
 *   the next one                                   its timer; its first task ends
 *
 * Story: one starts at a time, since they share the trampoline's page. A CPU comes up as the task whose stack it was given, and
 * that task ends at once: from there on it is like any CPU whose task has ended, and takes what it finds.
 * Holds: CPU 0 has the kernel all the while. Who comes too late is not admitted, and none is started after it: the page is still
 * its own.
 * See: Intel SDM 3, 9.4 (MP initialization). */
#include "smp.h"

#include "apic.h"
#include "boot.h"
#include "check.h"
#include "console.h"
#include "cpu.h"
#include "desc.h"
#include "frames.h"
#include "kpt.h"
#include "string.h"
#include "task.h"
#include "tlb.h"

#define INIT_DELAY 10000 /* microseconds, as below */
#define STARTUP_DELAY 200
#define STEP 100
#define START_MAX 2000000

extern const char ap_trampoline[], ap_trampoline_end[];

/* ap.S has the offsets. */
struct ap_parameters {
    u32 cr0, cr3, cr4, efer, stack;
    void (*enter)(void);
};
_Static_assert(offsetof(struct ap_parameters, enter) == 20, "");

static void ap_main(void)
{
    struct cpu *self = cpu_self();
    write_cr3(self->loaded_root);
    descriptors_load(self);
    apic_init_local();
    self->up = true;
    while (!self->admitted)
        pause();
    apic_timer_start(boot.options.hz);
    task_exit(0);
}

/* The page's place in the kernel's half. */
static void *low(u32 physical) { return low_address(physical >> PAGE_SHIFT) + physical % PAGE_SIZE; }

static void prepare_trampoline(void)
{
    memcpy(low(AP_TRAMPOLINE), ap_trampoline, (u32)(ap_trampoline_end - ap_trampoline));
    *(struct ap_parameters *)low(AP_PARAMETERS) = (struct ap_parameters){
        .cr0 = read_cr0(), .cr3 = kpt_root_from_below(), .cr4 = read_cr4(), .efer = paging_efer(), .enter = ap_main};
}

static bool is_up_within(const struct cpu *starting, u32 microseconds)
{
    for (u32 waited = 0; waited < microseconds && !starting->up; waited += STEP)
        apic_delay(STEP);
    return starting->up;
}

static bool start(struct cpu *starting)
{
    struct ap_parameters *parameters = low(AP_PARAMETERS);
    parameters->stack = task_for_cpu(starting);
    if (!parameters->stack)
        return false;
    starting->loaded_root = kpt_root();
    apic_send_startup(starting->apic_id, AP_TRAMPOLINE);
    if (!is_up_within(starting, STARTUP_DELAY))
        apic_send_startup(starting->apic_id, AP_TRAMPOLINE);
    return is_up_within(starting, START_MAX);
}

/* Those that the firmware named, but for the one that runs. Returns the end of the list. */
static struct cpu *name_others(void)
{
    struct cpu *other = cpus + 1;
    for (u32 i = 0; i < boot.cpu_count && other < cpus + boot.cpu_count; i++) {
        if (boot.apic_ids[i] == cpu_self()->apic_id)
            continue;
        other->index = (u32)(other - cpus);
        other->apic_id = boot.apic_ids[i];
        other++;
    }
    return other;
}

static void start_all(struct cpu *end)
{
    for (struct cpu *starting = cpus + 1; starting < end; starting++)
        apic_send_init(starting->apic_id);
    apic_delay(INIT_DELAY);
    for (struct cpu *starting = cpus + 1; starting < end; starting++) {
        if (!start(starting)) {
            check(false, "a CPU starts");
            return;
        }
        cpus_end = starting + 1;
        starting->admitted = true;
    }
}

void smp_start(void)
{
    if (boot.cpu_count == 1)
        return;
    prepare_trampoline();
    kernel_become_smp();
    start_all(name_others());
    printk("smp: cpus=%u\n", (u32)(cpus_end - cpus));
}

void smp_print_counts(void)
{
    if (!smp)
        return;
    u32 sent = 0, served = 0;
    for (const struct cpu *each = cpus; each < cpus_end; each++) {
        sent += each->flushes_sent;
        served += each->flushes;
    }
    printk("smp: flushes sent=%u served=%u\n", sent, served);
}
