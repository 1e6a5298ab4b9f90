/* Workload `mm`: processes that fork, copy on write, map and unmap; the work is in user/mm.c. */
#include "check.h"
#include "console.h"
#include "process.h"
#include "work.h"

void work_mm(void)
{
    u32 status = process_run(&program_mm);
    check(status == 0, "mm ends with status 0");
    printk("pager: mm status=%u\n", status);
}
