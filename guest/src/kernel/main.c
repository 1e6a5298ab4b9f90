/* The kernel's main: bring everything up in order, run the workloads, close. */
#include "apic.h"
#include "balloon.h"
#include "boot.h"
#include "check.h"
#include "console.h"
#include "desc.h"
#include "frames.h"
#include "irq.h"
#include "kpt.h"
#include "reclaim.h"
#include "scene.h"
#include "smp.h"
#include "space.h"
#include "task.h"
#include "tick.h"
#include "umbra_abi.h"
#include "virtio.h"
#include "witness.h"
#include "work.h"

struct boot boot;

void kernel_main(void);

static void refuse_bad_start(void)
{
    if (!boot.multiboot) {
        printk("pager: not started by a Multiboot1 loader\n");
        finish(STATUS_COMMAND_LINE);
    }
    if (boot.bad_word[0]) {
        printk("pager: command line: cannot use \"%s\"\n", boot.bad_word);
        tally.errors++;
        finish(STATUS_COMMAND_LINE);
    }
    if (!scene_choose()) {
        tally.errors++;
        finish(STATUS_COMMAND_LINE);
    }
}

static void run(enum workload workload)
{
    bool all = workload == WORKLOAD_ALL;
    if (all || workload == WORKLOAD_HELLO)
        work_hello();
    if (all || workload == WORKLOAD_MM)
        work_mm();
    if (all || workload == WORKLOAD_KMAP)
        work_kmap();
    if (workload == WORKLOAD_ACCESS)
        work_access();
    if (workload == WORKLOAD_SPIN)
        work_spin();
    if (workload == WORKLOAD_SWEEP)
        work_sweep();
    if (workload == WORKLOAD_STORM)
        work_storm();
    if (workload == WORKLOAD_MIX)
        work_mix();
    if (workload == WORKLOAD_FPU)
        work_fpu();
    if (workload == WORKLOAD_RECLAIM)
        work_reclaim();
    if (workload == WORKLOAD_DISK)
        work_disk();
    if (workload == WORKLOAD_SHOOT)
        work_shoot();
    if (workload == WORKLOAD_AGE)
        work_age();
    if (workload == WORKLOAD_REPORT)
        work_report();
    if (workload == WORKLOAD_SERIES)
        work_series();
    if (workload == WORKLOAD_STACK)
        work_stack();
    if (workload == WORKLOAD_SUPERBLOCK)
        work_superblock();
    if (workload == WORKLOAD_HUGE)
        work_huge();
    if (workload == WORKLOAD_OOPS)
        work_oops();
}

void kernel_main(void)
{
    console_init();
    descriptors_init();
    refuse_bad_start();
    printk("pager: boot paging=%s lowmem=%uM seed=%u scale=%u\n", boot.options.legacy ? "legacy" : "pae",
           boot.options.lowmem, boot.options.seed, boot.options.scale);
    paging_init();
    kpt_init();
    frames_init();
    reclaim_init();
    task_init();
    space_init();
    tick_init();
    apic_init();
    virtio_init();
    smp_start();
    apic_timer_start(boot.options.hz);
    irq_on();
    balloon_start();
    run(boot.options.workload);
    irq_off();
    smp_print_counts();
    witness_seal();
    finish(tally.errors ? STATUS_FAIL : STATUS_PASS);
}
