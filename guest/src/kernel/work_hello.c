/* Workload `hello`: one process says a line through a system call. */
#include "check.h"
#include "console.h"
#include "process.h"
#include "work.h"

void work_hello(void)
{
    u32 status = process_run(&program_hello);
    check(status == 0, "hello ends with status 0");
    printk("pager: hello status=%u\n", status);
}
