//! A vCPU with a software TLB, run as the soft backend runs one: for tests of memory that comes and goes.
//!
//! Its guest has paging off, so that a page's address is its frame's.

use std::ops::Deref;

use crate::sync::{Arc, AtomicBool, Having, Ordering, thread};
use crate::{Access, AccessKind, Gva, Miss, Mmu, Outcome, Refill, Shootdown, Shortage, TlbKind, Vcpu, Width};

/// Kicks its one vCPU by a flag.
#[derive(Debug, Default)]
pub struct Kick(pub Arc<AtomicBool>);

impl Shootdown for Kick {
    fn kick(&self, _vcpu: u32) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// It, and its thread's place in the guest or outside.
#[derive(Debug)]
pub struct SoftCpu<M> {
    mmu: M,
    vcpu: Vcpu,
    kicked: Arc<AtomicBool>,
    inside: bool,
    /// What it owes to others, inside.
    owes: Option<Having>,
    /// It flushes when it is asked to. Without that the checks must fail.
    pub obeys: bool,
    /// Closed gates slept at by one access, at most.
    pub gates_max: u64,
}

impl<M: Deref<Target = Mmu>> SoftCpu<M> {
    /// The first vCPU of `mmu`, outside the guest; who kicks it sets `kicked`.
    pub fn new(mmu: M, kind: TlbKind, kicked: Arc<AtomicBool>) -> SoftCpu<M> {
        let vcpu = mmu.soft_vcpu(0, kind);
        SoftCpu { mmu, vcpu, kicked, inside: false, owes: None, obeys: true, gates_max: 0 }
    }

    /// Leaves the guest.
    pub fn leave(&mut self) {
        self.mmu.leave(&self.vcpu);
        self.inside = false;
        self.owes = None;
    }

    /// Entries that its TLB has made so far.
    #[cfg(not(any(loom, shuttle)))]
    pub fn tlb_fills(&self) -> u64 {
        self.vcpu.tlb().map_or(0, |tlb| tlb.stats().fills)
    }

    /// Leaves the guest for good: it asks for no page any more, which others would stand back from.
    pub fn rest(&mut self) {
        self.leave();
        self.mmu.rest(&self.vcpu);
    }

    fn enter(&mut self) {
        self.inside = true;
        self.owes.get_or_insert_with(|| Having::new(self.mmu.coherence().answer(self.vcpu.id())));
        if self.obeys {
            self.mmu.tlb_enter(&self.vcpu);
        } else if self.mmu.enter(&self.vcpu) {
            let epoch = self.mmu.coherence().begin_flush();
            self.mmu.coherence().end_flush(0, epoch);
        }
    }

    /// Has the access made by the TLB; what it has not is refilled, or brought in outside.
    fn access<T>(
        &mut self,
        at: Gva,
        kind: AccessKind,
        make: impl Fn(&Mmu, &Vcpu) -> Result<T, Miss>,
    ) -> Result<T, Shortage> {
        let access = Access { kind, user: false };
        let waits = self.vcpu.stats().gate_waits;
        // A kick is heeded between two accesses, and not between a refill and the access that it is for.
        if self.kicked.swap(false, Ordering::SeqCst) {
            self.leave();
        }
        if !self.inside {
            self.enter();
        }
        let done = loop {
            match make(&self.mmu, &self.vcpu) {
                Ok(done) => break done,
                Err(Miss::Incoherent(violation)) => panic!("{violation}"),
                Err(Miss::Fault) => {}
            }
            match self.mmu.tlb_refill(&self.vcpu, at, access) {
                Refill::Done => continue,
                Refill::Beyond => self.leave(),
                Refill::Guest(fault) => panic!("{at:?}: {fault:?}"),
            }
            match self.mmu.fault_sleeping(&self.vcpu, at, access)? {
                Outcome::Fixed | Outcome::Spurious => {}
                Outcome::Again => thread::yield_now(),
                outcome => panic!("{at:?}: {outcome:?}"),
            }
            self.enter();
        };
        self.gates_max = self.gates_max.max(self.vcpu.stats().gate_waits - waits);
        Ok(done)
    }

    /// Stores to a word of a page.
    ///
    /// # Errors
    ///
    /// When no frame can be had for it.
    ///
    /// # Panics
    ///
    /// When the TLB still had what has been handed on (INV-TLB-2).
    pub fn store(&mut self, page: u32, word: u32, value: u64) -> Result<(), Shortage> {
        let at = Gva((page << 12) + word * 8);
        self.access(at, AccessKind::Write, |mmu, vcpu| mmu.tlb_store(vcpu, at, Width::B8, value, false))
    }

    /// Loads it.
    ///
    /// # Errors
    ///
    /// When no frame can be had for it.
    ///
    /// # Panics
    ///
    /// As [`SoftCpu::store`] does.
    pub fn load(&mut self, page: u32, word: u32) -> Result<u64, Shortage> {
        let at = Gva((page << 12) + word * 8);
        self.access(at, AccessKind::Read, |mmu, vcpu| mmu.tlb_load(vcpu, at, Width::B8, false))
    }
}
