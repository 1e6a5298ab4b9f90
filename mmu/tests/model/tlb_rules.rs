//! Which translations a CPU may use: SDM vol. 3A, 4.10.
//!
//! A CPU may use what memory says now. It may also use what it could have cached: for a page, any translation
//! that a walk could have made since the page was last invalidated. A walk reads the directory entry first, or
//! takes it from a paging-structure cache, which may be older but not older than the last invalidation of those.
//!
//! | event | forgets |
//! |---|---|
//! | a change of CR0 or CR4 that flushes | everything |
//! | MOV CR3 | the same, but for global pages while CR4.PGE is set and a TLB in software is at work (Umbra promises more where hardware runs) |
//! | INVLPG | the page's translations, those of a large page as a whole, and all paging-structure caches |
//! | a page fault that the guest sees | the page's translations, and the structures that lead to it |

use std::collections::HashMap;

use super::memory::{Memory, Past};
use super::walker::{self, Cacheable, Control, Entry, Request};

/// What one CPU may still remember.
#[derive(Debug, Default)]
pub struct TlbRules {
    all: u64,
    /// The last flush that left global pages alone.
    local: u64,
    pages: HashMap<u32, u64>,
    /// The last INVLPG in each 2 MiB.
    regions: HashMap<u32, u64>,
    /// When the paging-structure caches were emptied, rising.
    structures: Vec<u64>,
}

impl TlbRules {
    /// Forgets everything.
    pub fn flush(&mut self, now: u64) {
        *self = TlbRules { all: now, ..TlbRules::default() };
    }

    /// Forgets everything but global pages.
    pub fn flush_but_global(&mut self, now: u64) {
        self.local = now;
        self.structures.push(now);
    }

    /// INVLPG of `va`.
    pub fn invalidate(&mut self, va: u32, now: u64) {
        self.pages.insert(va >> 12, now);
        self.regions.insert(va >> 21, now);
        self.structures.push(now);
    }

    /// A page fault at `va`. Whether the structure caches of other addresses survive is nobody's business here:
    /// they may.
    pub fn fault(&mut self, va: u32, now: u64) {
        self.pages.insert(va >> 12, now);
    }

    /// Since when this CPU may have cached anything at all.
    pub fn horizon(&self) -> u64 {
        self.all
    }

    /// Every translation of `va` that this CPU may use now for `r`.
    pub fn permitted(&self, memory: &Memory, c: &Control, va: u32, r: Request) -> Vec<Cacheable> {
        if !c.pg {
            return walker::look(memory, c, va).into_iter().collect();
        }
        let since = self.pages.get(&(va >> 12)).copied().unwrap_or(self.all);
        let mut found = self.cacheable(memory, c, va, since.max(self.local));
        if c.pge && self.local > since {
            found.extend(self.cacheable(memory, c, va, since).into_iter().filter(|t| t.global));
        }
        found.retain(|t| t.serves(c, r));
        found
    }

    /// Every translation of `va` that a walk can have made after `since`.
    fn cacheable(&self, memory: &Memory, c: &Control, va: u32, since: u64) -> Vec<Cacheable> {
        let mut found = Vec::new();
        let Some(pde_at) = walker::directory_entry_at(c, va) else { return found };
        for pde in memory.past(pde_at.address, pde_at.size, since) {
            match walker::directory_entry(c, pde.value) {
                Entry::Table { address, .. } => {
                    let pte_at = walker::table_entry_at(c, address, va);
                    for pte in memory.past(pte_at.address, pte_at.size, since) {
                        if self.may_meet(pde, pte, since) {
                            found.extend(walker::combine(c, va, pde.value, pte.value));
                        }
                    }
                }
                _ if pde.until > self.large_since(c, va) => {
                    found.extend(walker::combine(c, va, pde.value, 0));
                }
                _ => {}
            }
        }
        found
    }

    /// The last INVLPG in the large page around `va`.
    fn large_since(&self, c: &Control, va: u32) -> u64 {
        let first = if c.pae { va >> 21 } else { va >> 22 << 1 };
        let last = if c.pae { first } else { first + 1 };
        (first..=last).filter_map(|region| self.regions.get(&region)).max().copied().unwrap_or(0)
    }

    /// True when one walk can have read both: the directory entry at some time, the table entry then or later,
    /// both after `since`, with no emptying of the structure caches in between.
    fn may_meet(&self, pde: Past, pte: Past, since: u64) -> bool {
        let (first, first_end) = (pde.from.max(since), pde.until);
        let (second, second_end) = (pte.from.max(since), pte.until);
        if first >= first_end || second >= second_end {
            return false;
        }
        if first.max(second) < first_end.min(second_end) {
            return true;
        }
        let last_read = first_end - 1;
        last_read < second && !self.structures.iter().any(|t| *t > last_read && *t <= second)
    }
}
