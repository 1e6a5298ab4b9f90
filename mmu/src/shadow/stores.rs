//! Stores of the VMM's to guest memory that are under way: made, or about to be, and not applied to the shadow yet.
//!
//! Story: a store to a tracked table is made first, and then what it decides is taken away. Another vCPU may see the new entry
//! in between, by a load of its guest's, and flush: it must not go on with what the entry said before, be that a link, an spte or what
//! its TLB has. So whoever flushes for the guest waits for the stores that are under way. All are counted, not those to tables alone:
//! a page may become a table between a look at its marks and the store.
//!
//! ```text
//! who stores (Mmu::with_written)     who flushes (MOV CR3, INVLPG)
//! under way, in this phase, + 1
//! entry := new                       the guest has seen new
//! sptes taken away, stamped          nothing under way? else: the next phase; wait for the end of the last
//! under way, in that phase, - 1      resynchronise, flush what is owed
//! ```
//!
//! Holds: INV-SYNC-5, a flush that the guest orders after a load of an entry finds the shadow as that entry has it, or nothing there.
//!
//! Progress: who stores waits for locks alone, of which who flushes has none. Who flushes waits for the stores of one phase, and for those
//! who flushed before it: for none that begins later.
//!
//! Limits: what a device writes is told later, before the guest is told that it is there (`dma`): who looks earlier, and takes it for a
//! page table, is not waited for. Nor is he who sets A or D of a two-level entry at the moment in which its table becomes one of PAE too.
//!
//! See: McKenney, "Sleepable RCU", LWN 2006, for two counts in turn.

use crate::lock_order;
use crate::sync::{AtomicBool, AtomicU32, Having, Ordering, Thing, Wait, spin_until, thread};

/// How many stores are under way. A line of its own: each flush reads it.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Stores {
    phase: AtomicU32,
    /// By the lowest bit of the phase that they began in.
    under_way: [AtomicU32; 2],
    /// Somebody waits for the end of a phase.
    turned: AtomicBool,
}

/// A store that is under way, until it is dropped.
#[must_use]
pub(crate) struct UnderWay<'a> {
    stores: &'a Stores,
    phase: u32,
    _had: Having,
}

impl Stores {
    /// One is about to be made.
    #[inline]
    pub fn begin(&self) -> UnderWay<'_> {
        loop {
            let phase = self.phase.load(Ordering::SeqCst);
            self.of(phase).fetch_add(1, Ordering::SeqCst);
            // Who turned the phase over meanwhile may have looked before this one was counted.
            if self.phase.load(Ordering::SeqCst) == phase {
                return UnderWay { stores: self, phase, _had: Having::new(self.thing()) };
            }
            self.of(phase).fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Returns once what the caller may have seen is applied. It holds no lock, and has no store under way.
    #[inline]
    pub fn wait(&self) {
        lock_order::assert_may_sleep();
        if self.under_way.iter().any(|count| count.load(Ordering::SeqCst) != 0) {
            self.wait_for_phase();
        }
    }

    /// What began before the last phase is over: whoever turned that over has waited for it.
    #[cold]
    fn wait_for_phase(&self) {
        let take = || !self.turned.swap(true, Ordering::SeqCst);
        self.until(take);
        let phase = self.phase.fetch_add(1, Ordering::SeqCst);
        self.until(|| self.of(phase).load(Ordering::SeqCst) == 0);
        self.turned.store(false, Ordering::SeqCst);
    }

    fn until(&self, is_so: impl Fn() -> bool) {
        if !spin_until(&is_so) {
            while !is_so() {
                thread::yield_for(|| Wait::from("stores to page tables").of(self.thing()));
            }
        }
    }

    fn of(&self, phase: u32) -> &AtomicU32 {
        &self.under_way[phase as usize & 1]
    }

    fn thing(&self) -> Thing {
        Thing::held("a store to a page table", None, self)
    }
}

impl Drop for UnderWay<'_> {
    #[inline]
    fn drop(&mut self) {
        self.stores.of(self.phase).fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(all(test, loom))]
#[path = "../interleave/stores.rs"]
mod interleave;
