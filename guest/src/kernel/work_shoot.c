/* Workload `shoot`: pages of the shared file that are taken away from processes while they store to them; the work is in
 * user/shoot.c. */
#include "blk.h"
#include "check.h"
#include "console.h"
#include "file.h"
#include "process.h"
#include "work.h"

void work_shoot(void)
{
    struct blk *disk = blk_find("file");
    check(disk && file_mount(disk), "there is a disk that calls itself file, and takes a file system");
    if (tally.errors)
        return;
    u32 status = process_run(&program_shoot);
    check(status == 0, "shoot ends with status 0");
    printk("pager: shoot status=%u\n", status);
}
