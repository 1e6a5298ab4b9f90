/* Workload `reclaim`: processes with more memory than there is, on two disks; the work is in user/reclaim.c.
 *
 * Story: swap goes to the disk that calls itself `swap`, the shared file to `file`. Afterwards the counts are printed, in lines
 * that begin with "reclaim:", since they hang on the timer and on the disks; what went over the disks can be compared with
 * what the disks say. */
#include "audit.h"
#include "balloon.h"
#include "blk.h"
#include "boot.h"
#include "check.h"
#include "console.h"
#include "file.h"
#include "frames.h"
#include "nmi.h"
#include "pace.h"
#include "process.h"
#include "reclaim.h"
#include "swap.h"
#include "witness.h"
#include "work.h"

static void print_disk(const char *name, const struct blk *disk)
{
    const struct blk_counts *counts = blk_counts(disk);
    printk("reclaim: disk %s reads=%u read_pages=%u writes=%u written_pages=%u flushes=%u discards=%u errors=%u\n", name,
           counts->requests[BLK_READ], counts->pages[BLK_READ], counts->requests[BLK_WRITE], counts->pages[BLK_WRITE],
           counts->requests[BLK_FLUSH], counts->requests[BLK_DISCARD], counts->errors);
}

static void print_counts(const struct blk *swap, const struct blk *file)
{
    printk("reclaim: scanned=%u referenced=%u stolen=%u stolen_clean=%u direct=%u kswapd=%u busy=%u denied=%u no_slot=%u oom=%u\n",
           reclaim_counts.scanned, reclaim_counts.referenced, reclaim_counts.stolen, reclaim_counts.stolen_clean,
           reclaim_counts.direct, reclaim_counts.background, reclaim_counts.busy, reclaim_counts.denied,
           reclaim_counts.no_slot, reclaim_counts.out_of_memory);
    printk("reclaim: refaults=%u hits=%u read_ahead=%u checked=%u lost=%u slots_used=%u\n", swap_counts.ins,
           swap_counts.hits, swap_counts.read_ahead, swap_counts.checked, swap_counts.lost, swap_slots_used());
    printk("reclaim: swap reads=%u pages=%u writes=%u pages=%u\n", swap_counts.reads, swap_counts.pages_read,
           swap_counts.writes, swap_counts.pages_written);
    printk("reclaim: file faults=%u reads=%u writes=%u blocks=%u freed=%u truncations=%u left=%u\n", file_counts.faults,
           file_counts.reads, file_counts.writes, file_counts.blocks_allocated, file_counts.blocks_freed,
           file_counts.truncations, file_counts.left_alone);
    printk("reclaim: balloon inflated=%u deflated=%u for_want=%u reported=%u\n", balloon_counts.inflated,
           balloon_counts.deflated, balloon_counts.deflated_for_want, balloon_counts.reported);
    const struct nmi_counts nmi = nmi_total();
    printk("reclaim: nmi samples=%u user=%u kernel=%u threads=%u frames=%u whole=%u absent=%u cut=%u broken=%u\n",
           nmi.samples, nmi.user, nmi.kernel, nmi.threads, nmi.frames, nmi.whole, nmi.absent, nmi.cut, nmi.broken);
    print_disk("swap", swap);
    print_disk("file", file);
}

void work_reclaim(void)
{
    struct blk *swap = blk_find("swap"), *file = blk_find("file");
    if (!swap || !file) {
        printk("pager: workload reclaim wants two virtio disks, named swap and file; there is %s\n",
               swap ? "no file" : file ? "no swap" : "none");
        tally.errors++;
        return;
    }
    check(swap_on(swap), "the swap disk can be swapped to");
    check(file_mount(file), "the file's disk takes a file system");
    check(reclaim_start(), "kswapd starts");
    nmi_start(boot.options.nmi);
    u32 status = process_run(&program_reclaim);
    check(nmi_stop(), "samples come, and some lead to a stack's end");
    check(status == 0, "reclaim ends with status 0");
    check(nmi_total().broken == 0, "every user stack leads to its end, or to a page that is away");
    check(swap_counts.lost == 0, "every page came back as it went");
    check(!pace_is_fast() || audit() == 0, "lists, slots, mappings and the file's cache are what they say");
    check(swap_slots_used() <= witness_frames(), "every slot is free again, but of pages that were published");
    check(reclaim_counts.stolen > 0 && swap_counts.ins > 0, "memory was short");
    print_counts(swap, file);
    printk("pager: reclaim status=%u\n", status);
}
