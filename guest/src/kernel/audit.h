/* An audit of what reclaim keeps: derived once more from the page tables, and compared. */
#ifndef AUDIT_H
#define AUDIT_H

#include "paging.h"

/* Says what does not hold (the first few), and returns how much that is. At any time, by a task; never sleeps. */
u32 audit(void);

/* Parts of it, by those who know: each says whether all of its own holds. */
bool lru_audit(void);
bool file_audit(void);
/* Takes an entry of a page table that names the slot off its count, or puts it there again; false if there was none to take. */
bool swap_audit_entry(u32 slot, bool take);
/* So many slots are in use as it is said. */
bool swap_audit_used(void);
/* While all entries are off: no slot has one left; a slot and its page name each other. */
bool swap_audit_rest(void);

#endif
