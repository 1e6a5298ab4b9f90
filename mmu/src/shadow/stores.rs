//! Stores to guest tables that are under way: made, or about to be, and not applied to the shadow yet.
//!
//! Story: the VMM makes a store to a tracked table first, and then takes away what it decides. Another vCPU may see the new entry
//! in between, by a load of its guest's, and flush: it must not go on with what the entry said before, be that a link, an spte or what
//! its TLB has. So whoever flushes for the guest waits for the stores that are under way.
//!
//! ```text
//! who stores (Mmu::with_written)     who flushes (MOV CR3, INVLPG)
//! under way + 1
//! entry := new                       the guest has seen new
//! sptes taken away, stamped          under way = 0? else wait
//! under way - 1                      resynchronise, flush what is owed
//! ```
//!
//! Holds: INV-SYNC-5, a flush that the guest orders after a load of an entry finds the shadow as that entry has it, or nothing.
//!
//! Progress: who stores sleeps for nobody, and waits for locks alone, which whoever flushes has none of.
//!
//! Limits: what a device writes is told later, before the guest is told that it is there (`dma`): who looks earlier, and takes it for a
//! page table, is not waited for.

use crate::sync::{AtomicU32, Having, Ordering, Thing, Wait, spin_until, thread};

/// How many stores are under way.
#[derive(Debug, Default)]
pub(crate) struct Stores(AtomicU32);

/// A store that is under way, until it is dropped.
#[must_use]
pub(crate) struct UnderWay<'a> {
    stores: &'a Stores,
    _owed: Having,
}

impl Stores {
    /// One is about to be made.
    #[inline]
    pub fn begin(&self) -> UnderWay<'_> {
        self.0.fetch_add(1, Ordering::SeqCst);
        UnderWay { stores: self, _owed: Having::new(self.thing()) }
    }

    /// Returns once what the caller may have seen is applied. It holds no lock.
    #[inline]
    pub fn settle(&self) {
        let settled = || self.0.load(Ordering::SeqCst) == 0;
        if !settled() && !spin_until(settled) {
            while !settled() {
                thread::yield_for(|| Wait::from("stores to page tables").of(self.thing()));
            }
        }
    }

    fn thing(&self) -> Thing {
        Thing::held("a store to a page table", None, self)
    }
}

impl Drop for UnderWay<'_> {
    #[inline]
    fn drop(&mut self) {
        self.stores.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(all(test, loom))]
#[path = "../interleave/stores.rs"]
mod interleave;
