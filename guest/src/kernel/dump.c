/* What a kernel that cannot go on says before it stops.
 *
 * Story: panic() is for invariants, die() for exceptions in kernel code. Both end in the closing line with FAIL.
 * Holds: nothing here depends on the window's stack or the frame table being sound; the walk reads each level through a slot
 * of its own. A fault while dumping ends the run at once. Other CPUs are not stopped: the end of the run stops them. */
#include "dump.h"

#include "boot.h"
#include "check.h"
#include "console.h"
#include "cpu.h"
#include "frames.h"
#include "paging.h"
#include "task.h"
#include "umbra_abi.h"
#include "window.h"

#define STACK_WORDS 32

static bool dumping;

static void enter_dump(void)
{
    __asm__ volatile("cli");
    if (dumping) {
        printk("\npager: another fault during the dump\n");
        tally.errors++;
        finish(STATUS_PANIC);
    }
    dumping = true;
    tally.errors++;
}

/* Up to the end of the stack's pages: a word in the page above may not be mapped. */
static void dump_stack(u32 esp)
{
    u32 end = min_u32(ALIGN_DOWN(esp, PAGE_SIZE) + PAGE_SIZE, esp + STACK_WORDS * 4);
    printk("stack:");
    for (u32 at = esp; at < end; at += 4)
        printk("%s%08x", (at - esp) % 32 == 0 ? "\n  " : " ", *(const u32 *)at);
    printk("\n");
}

static void dump_entry(const char *level, u32 index, pte_t entry)
{
    printk("  %s[%u] = %016llx%s%s%s%s%s%s%s%s\n", level, index, entry, entry & PTE_P ? " P" : " absent",
           entry & PTE_W ? " W" : "", entry & PTE_U ? " U" : "", entry & PTE_A ? " A" : "", entry & PTE_D ? " D" : "",
           entry & PTE_PS ? " PS/PAT" : "", entry & PTE_G ? " G" : "", entry & PTE_NX ? " NX" : "");
}

static void dump_walk(u32 va)
{
    u32 frame = read_cr3() >> PAGE_SHIFT;
    printk("walk of %08x from cr3 %08x:\n", va, read_cr3());
    if (paging.pae) {
        const u8 *page = window_map_for_dump(frame);
        u64 entry = *(const u64 *)(page + (read_cr3() & 0xfe0) + (va >> 30) * 8);
        dump_entry("pdpt", va >> 30, entry);
        if (!(entry & PTE_P))
            return;
        frame = pte_frame(entry);
    }
    pte_t entry = table_get(window_map_for_dump(frame), directory_index(va));
    dump_entry("directory", directory_index(va), entry);
    if (!(entry & PTE_P) || (entry & PTE_PS))
        return;
    dump_entry("table", table_index(va), table_get(window_map_for_dump(pte_frame(entry)), table_index(va)));
}

const char *fault_access_text(u32 error) { return error & FAULT_FETCH ? "fetch" : error & FAULT_W ? "write" : "read"; }

const char *fault_reason_text(u32 error)
{
    return error & FAULT_RSVD ? "reserved bit" : error & FAULT_P ? "not permitted" : "not present";
}

static void dump_page_fault(u32 error, u32 cr2)
{
    printk("page fault: %s of %08x in %s mode, %s (error %x)\n", fault_access_text(error), cr2,
           error & FAULT_U ? "user" : "kernel", fault_reason_text(error), error);
}

void die(const struct trap_frame *frame, u32 cr2)
{
    enter_dump();
    bool user = trap_from_user(frame);
    u32 esp = user ? frame->user_esp : (u32)&frame->user_esp;
    printk("pager: KERNEL FAULT: %s (vector %u, error %x) in task %u (%s)\n", trap_name(frame->vector), frame->vector,
           frame->error, current->pid, current->name);
    if (frame->vector == TRAP_PAGE_FAULT)
        dump_page_fault(frame->error, cr2);
    printk("cs:eip %04x:%08x eflags %08x ss:esp %04x:%08x\n", frame->cs & 0xffff, frame->eip, frame->eflags,
           user ? frame->user_ss & 0xffff : KERNEL_DS, esp);
    printk("eax %08x ebx %08x ecx %08x edx %08x\n", frame->eax, frame->ebx, frame->ecx, frame->edx);
    printk("esi %08x edi %08x ebp %08x\n", frame->esi, frame->edi, frame->ebp);
    printk("cr0 %08x cr2 %08x cr3 %08x cr4 %08x\n", read_cr0(), cr2, read_cr3(), read_cr4());
    if (frame->vector == TRAP_PAGE_FAULT)
        dump_walk(cr2);
    window_dump_stack();
    if (!user)
        dump_stack(esp);
    finish(STATUS_PANIC);
}

void panic(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vpanic(format, args);
}

void vpanic(const char *format, va_list args)
{
    enter_dump();
    printk("pager: PANIC: ");
    vprintk(format, args);
    printk("\nin task %u (%s)\n", current->pid, current->name);
    window_dump_stack();
    dump_stack((u32)__builtin_frame_address(0));
    finish(STATUS_PANIC);
}
