/* Which page tables are loaded. See tlb.h.
 *
 * Holds: loaded_root is what CR3 holds; CR3 itself is never read back, which would be one more exit. */
#include "tlb.h"

#include "cpu.h"

static u32 loaded_root;

void tlb_load(u32 root)
{
    if (loaded_root == root)
        return;
    loaded_root = root;
    write_cr3(root);
}

bool tlb_is_loaded(u32 root) { return loaded_root == root; }

void flush_not_global(void) { write_cr3(loaded_root); }
