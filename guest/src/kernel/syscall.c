/* System calls.
 *
 * Holds: an address from user mode is used only through copy_from_user and copy_to_user, which refuse the kernel's half. */
#include "syscall.h"

#include "access.h"
#include "audit.h"
#include "check.h"
#include "console.h"
#include "file.h"
#include "fpu.h"
#include "frames.h"
#include "reclaim.h"
#include "rmap.h"
#include "swap.h"
#include "syscalls.h"
#include "task.h"
#include "witness.h"

static bool in_user_half(u32 start, u32 bytes) { return start <= USER_END && bytes <= USER_END - start; }

static bool copy_from_user(void *to, u32 from, u32 bytes)
{
    return in_user_half(from, bytes) && user_copy(to, (const void *)from, bytes);
}

static bool copy_to_user(u32 to, const void *from, u32 bytes)
{
    return in_user_half(to, bytes) && user_copy((void *)to, from, bytes);
}

static u32 sys_wait(u32 status_address)
{
    u32 status, pid = task_wait_child(&status);
    if (pid == 0 || !copy_to_user(status_address, &status, sizeof(status)))
        return SYS_ERROR;
    return pid;
}

static u32 sys_write(u32 text, u32 bytes)
{
    char chunk[128];
    for (u32 done = 0; done < bytes;) {
        u32 part = min_u32(bytes - done, sizeof(chunk));
        if (!copy_from_user(chunk, text + done, part))
            return SYS_ERROR;
        console_write(chunk, part);
        done += part;
    }
    return bytes;
}

/* [start, start + bytes) in whole pages; false if that wraps or is empty. */
static bool page_range(u32 start, u32 bytes, u32 *end)
{
    *end = start + ALIGN_UP(bytes, PAGE_SIZE);
    return start % PAGE_SIZE == 0 && *end > start && *end <= USER_END;
}

static u32 sys_map(u32 start, u32 bytes)
{
    u32 end;
    if (!page_range(start, bytes, &end))
        return SYS_ERROR;
    struct region region = {.start = start, .end = end, .flags = REGION_WRITE};
    return space_map(&current->space, region) ? 0 : SYS_ERROR;
}

static u32 sys_unmap(u32 start, u32 bytes)
{
    u32 end;
    if (!page_range(start, bytes, &end))
        return SYS_ERROR;
    return space_unmap(&current->space, start, end) ? 0 : SYS_ERROR;
}

static u32 sys_tally(u32 checks, u32 errors)
{
    tally.checks += checks;
    tally.errors += errors;
    return 0;
}

/* The frames of `pages` pages, each with a reference, so that they stay while the next is brought in. Returns how many it has:
 * fewer where one cannot be had. */
static u32 hold_pages(u32 start, u32 pages, u32 *frames)
{
    for (u32 i = 0; i < pages; i++) {
        u32 page = start + i * PAGE_SIZE;
        u8 byte;
        if (!copy_from_user(&byte, page, 1))
            return i;
        frames[i] = upt_frame_at(&current->space.upt, page);
        if (frames[i] == FRAME_NONE)
            return i;
        frame_get(frames[i]);
    }
    return pages;
}

static u32 sys_witness(u32 name_address, u32 start, u32 pages)
{
    char name[WITNESS_NAME_BYTES];
    u32 frames[WITNESS_PAGES_MAX];
    if (pages > WITNESS_PAGES_MAX || start % PAGE_SIZE || !in_user_half(start, pages * PAGE_SIZE))
        return SYS_ERROR;
    if (!copy_from_user(name, name_address, sizeof(name)))
        return SYS_ERROR;
    u32 held = hold_pages(start, pages, frames);
    bool published = held == pages && witness_publish(name, frames, pages);
    for (u32 i = 0; i < held; i++)
        swap_put(frames[i]);
    return published ? 0 : SYS_ERROR;
}

/* Who waits in SYS_AWAIT_AGE. */
static u8 aged;

/* As reclaim does, for workload `age`. */
static u32 sys_age(u32 start, u32 pages)
{
    u32 used = 0;
    pte_t bits;
    if (start % PAGE_SIZE || pages > USER_END / PAGE_SIZE || !in_user_half(start, pages * PAGE_SIZE))
        return SYS_ERROR;
    for (u32 i = 0; i < pages; i++) {
        u32 frame = upt_frame_at(&current->space.upt, start + i * PAGE_SIZE);
        if (frame == FRAME_NONE || frame == zero_frame)
            continue;
        frame_get(frame);
        rmap_take_used(&frame, 1, &bits);
        used += (bits & PTE_A) != 0;
        swap_put(frame);
    }
    task_wake(&aged);
    return used;
}

/* The word at `address`, read once it has been woken: by the kernel, before the process goes on. */
static u32 sys_await_age(u32 address)
{
    u32 word;
    task_wait_on(&aged);
    return copy_from_user(&word, address, sizeof(word)) ? word : SYS_ERROR;
}

/* What a fork takes: tables and directories. */
#define FORK_ROOM 16

static u32 sys_fork(const struct trap_frame *frame)
{
    if (!make_room(FORK_ROOM))
        return SYS_ERROR;
    u32 pid = task_fork(frame);
    return pid ? pid : SYS_ERROR;
}

static u32 sys_sleep(u32 for_ticks)
{
    task_sleep(for_ticks);
    return 0;
}

static u32 sys_yield(void)
{
    schedule();
    return 0;
}

static u32 call(struct trap_frame *frame)
{
    switch (frame->eax) {
    case SYS_EXIT: task_exit(frame->ebx & 0xff);
    case SYS_FORK: return sys_fork(frame);
    case SYS_WAIT: return sys_wait(frame->ebx);
    case SYS_GETPID: return current->pid;
    case SYS_YIELD: return sys_yield();
    case SYS_WRITE: return sys_write(frame->ebx, frame->ecx);
    case SYS_BRK: return space_brk(&current->space, frame->ebx);
    case SYS_MAP: return sys_map(frame->ebx, frame->ecx);
    case SYS_UNMAP: return sys_unmap(frame->ebx, frame->ecx);
    case SYS_TALLY: return sys_tally(frame->ebx, frame->ecx);
    case SYS_WITNESS: return sys_witness(frame->ebx, frame->ecx, frame->edx);
    case SYS_PREEMPTIONS: return current->preemptions;
    case SYS_SLEEP: return sys_sleep(frame->ebx);
    case SYS_FPU_TAKES: return fpu_takes;
    case SYS_MEMORY: return frames_total();
    case SYS_FILE_MAP: return frame->ebx % PAGE_SIZE == 0 && file_map(&current->space, frame->ebx) ? 0 : SYS_ERROR;
    case SYS_FILE_TRUNCATE: return file_truncate(frame->ebx) ? 0 : SYS_ERROR;
    case SYS_FILE_RESERVE: return file_reserve(frame->ebx) ? 0 : SYS_ERROR;
    case SYS_AUDIT: return audit();
    case SYS_FILE_SYNC: return file_sync() ? 0 : SYS_ERROR;
    case SYS_CPUS: return (u32)(cpus_end - cpus);
    case SYS_AGE: return sys_age(frame->ebx, frame->ecx);
    case SYS_AWAIT_AGE: return sys_await_age(frame->ebx);
    case SYS_MEET: return task_meet(frame->ebx);
    default: return SYS_ERROR;
    }
}

/* Those that touch nothing but the task itself. */
static bool needs_kernel(u32 number)
{
    return number != SYS_YIELD && number != SYS_SLEEP && number != SYS_GETPID && number != SYS_PREEMPTIONS;
}

void syscall_dispatch(struct trap_frame *frame)
{
    bool takes = needs_kernel(frame->eax);
    if (takes)
        kernel_take();
    if (frame->eax == SYS_PROBE)
        access_probe(frame);
    else
        frame->eax = call(frame);
    if (takes)
        kernel_give_back();
}
