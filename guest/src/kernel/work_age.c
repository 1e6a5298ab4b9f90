/* Workload `age`: a process's pages lose their accessed bits while it runs, halts, or takes them itself, and have them again once it has
 * used the pages; the work is in user/age.c. */
#include "blk.h"
#include "check.h"
#include "console.h"
#include "file.h"
#include "process.h"
#include "work.h"

void work_age(void)
{
    struct blk *disk = blk_find("file");
    check(disk && file_mount(disk), "there is a disk that calls itself file, and takes a file system");
    if (tally.errors)
        return;
    u32 status = process_run(&program_age);
    check(status == 0, "age ends with status 0");
    printk("pager: age status=%u\n", status);
}
