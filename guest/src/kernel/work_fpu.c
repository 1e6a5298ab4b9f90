/* Workload `fpu`: processes that compute with x87 and SSE2 while the timer switches them; the work is in user/fpu.c. Then a
 * new process looks whether anything of that is left for it to see (user/fpu_fresh.c). */
#include "check.h"
#include "console.h"
#include "fpu.h"
#include "process.h"
#include "work.h"

void work_fpu(void)
{
    bool on = fpu_init();
    check(on, "the CPU has x87, FXSR and SSE2");
    if (!on)
        return;
    u32 status = process_run(&program_fpu), fresh = process_run(&program_fpu_fresh);
    check(status == 0, "fpu ends with status 0");
    check(fresh == 0, "a new process finds fresh registers");
    printk("pager: fpu status=%u fresh=%u\n", status, fresh);
}
