/* Workloads that are one user program each and are there to be timed: `spin`, `sweep`, `mix`. The programs are in user/. */
#include "check.h"
#include "console.h"
#include "process.h"
#include "work.h"

static void run(const struct program *program)
{
    u32 status = process_run(program);
    check(status == 0, "the program ends with status 0");
    printk("pager: %s status=%u\n", program->name, status);
}

void work_spin(void) { run(&program_spin); }
void work_sweep(void) { run(&program_sweep); }
void work_mix(void) { run(&program_mix); }
