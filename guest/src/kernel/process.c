/* Running one program to its end, from a kernel thread. */
#include "process.h"

#include "balloon.h"
#include "boot.h"
#include "check.h"
#include "frames.h"
#include "pace.h"
#include "reclaim.h"
#include "syscalls.h"
#include "task.h"
#include "witness.h"

static u32 flags(void)
{
    return (paging.nx ? FLAG_NX : 0) | (boot.options.allow & QUIRK_NO_XM ? FLAG_NO_XM : 0) |
           (boot.options.allow & QUIRK_MXCSR_ANY ? FLAG_MXCSR_ANY : 0) | (pace_is_fast() ? FLAG_FAST : 0) |
           boot.options.work << FLAGS_WORK_SHIFT;
}

/* Frames that are somebody's, but for those that are meant to stay. */
static u32 held(void) { return frames_in_use() - witness_frames() - balloon_held(); }

u32 process_run(const struct program *program)
{
    u32 held_before = held();
    struct arguments arguments = {.seed = boot.options.seed, .scale = boot.options.scale, .flags = flags()};
    u32 status = 0, pid = 0;
    struct task *task = task_spawn(program, &arguments);
    if (task)
        pid = task_wait_child(&status);
    reclaim_settle();
    check(task && pid, "the program runs");
    check(held() == held_before, "the program's frames are free again");
    return status;
}
