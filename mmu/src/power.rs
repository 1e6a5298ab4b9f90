//! Power-on again: the guest is forgotten, and what it had is free.
//!
//! Story: whoever resets the machine has stopped its vCPUs. Each forgets its own paging ([`Mmu::reset_vcpu`]); then one of them has
//! the memory forgotten ([`Mmu::forget_guest`]). Pages go by the road of every invalidation, as a discard, so that importers are told
//! and swap slots, frames and homes come back. Counters, budget, segments and the flush clock go on.
//!
//! Holds: after that every page is `Zero` (or `Device`), nothing is shadowed, and no root can be found that was there before. What
//! others do meanwhile (an importer, an operator, background reclaim) they do to pages of zeros.
//!
//! Locks: none held by the caller, no window. Sleeps: for whoever has a page in hand, and for importers.

use crate::Mmu;
use crate::discard::{Discard, NotDiscarded};
use crate::events::EventRing;
use crate::format::{Mode, Pdpte};
use crate::invalidation::May;
use crate::p2m::PageState;
use crate::vcpu::Vcpu;

impl Mmu {
    /// The vCPU, which is outside, is as [`Mmu::vcpu`] made it: paging off, no root loaded, no event to tell of. Its TLBs, of either
    /// kind, are flushed before it runs guest code again. Its counters go on.
    pub fn reset_vcpu(&self, vcpu: &mut Vcpu) {
        self.rest(vcpu);
        self.unload_roots(vcpu);
        (vcpu.mode, vcpu.cr3, vcpu.pdptes) = (Mode::default(), 0, [Pdpte::default(); 4]);
        vcpu.events.replace(EventRing::new());
        self.coherence.request_flush(vcpu.id);
    }

    /// Forgets all that the guest has: shadow, roots, memory. `own` is the caller's vCPU; all vCPUs are outside and have been reset,
    /// and nobody watches a page.
    ///
    /// # Errors
    ///
    /// When somebody holds a page in its place for long: pages before it are forgotten, and the call can be made again.
    pub fn forget_guest(&self, own: u32) -> Result<(), NotDiscarded> {
        self.guest_tlb().into_iter().for_each(|model| model.reset());
        self.unlink_roots();
        self.evict(usize::MAX);
        while self.give_back_dead(Some(own)) {}
        let mut pages = Vec::new();
        self.p2m.for_each(|gfn, state| {
            if !matches!(state, PageState::Zero | PageState::Device) {
                pages.push(gfn.0);
            }
        });
        self.discard(Some(own), pages, Discard::Zero, May::Sleep)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::addr::{Gfn, Gva};
    use crate::paging::Flush;
    use crate::swap::MemorySwap;
    use crate::tlb::TlbKind;
    use crate::window::{Context, Intent, LocalStack};
    use crate::{Access, Config, Machine, NoVcpus, Outcome};

    const PAGES: u32 = 700;
    /// The guest's page directory, its page table, and the pages that it maps.
    const DIRECTORY: u32 = 16;
    const TABLE: u32 = 17;
    const FIRST: u32 = 20;
    const MAPPED: u32 = 40;

    fn mmu() -> Mmu {
        let config = Config { low_pages: 8, roots_max: 4, ..Config::of_pages(PAGES) };
        let mmu = Mmu::new(Machine::anonymous(1400), config, Box::new(NoVcpus));
        mmu.with_swap(Box::new(MemorySwap::new(PAGES)))
    }

    fn write(mmu: &Mmu, gfn: u32, at: u32, bytes: &[u8]) {
        mmu.write_bytes(&LocalStack::new(Context::Host), Gfn(gfn).at(at), bytes).expect("a frame");
    }

    /// A guest with paging on that has used its pages, all kinds of them.
    fn use_all(mmu: &Mmu, vcpu: &mut Vcpu) {
        write(mmu, DIRECTORY, 0, &(TABLE << 12 | 3).to_le_bytes());
        for page in 0..MAPPED {
            write(mmu, TABLE, page * 4, &((FIRST + page) << 12 | 3).to_le_bytes());
            write(mmu, FIRST + page, 0, &[page as u8 + 1]);
        }
        write(mmu, 3, 0, b"low");
        // With paging off first, by shadow pages that are of no table.
        let done = mmu.fault_sleeping(vcpu, Gva(FIRST << 12), Access::write(false)).expect("frames are left");
        assert!(matches!(done, Outcome::Fixed), "{done:?}");
        let paged = Mode { paging: true, ..Mode::default() };
        mmu.set_paging(vcpu, paged, DIRECTORY << 12, Flush::Yes).expect("no PDPTEs");
        for page in 0..MAPPED {
            let done =
                mmu.fault_sleeping(vcpu, Gva(page << 12), Access::write(false)).expect("frames are left");
            assert!(matches!(done, Outcome::Fixed), "{done:?}");
        }
        mmu.discard(None, [FIRST + 30], Discard::Balloon, May::Sleep).expect("nobody holds it");
        assert_eq!(mmu.page_out(None, &[Gfn(FIRST + 31), Gfn(FIRST + 32)]), Ok(2));
    }

    #[test]
    fn a_forgotten_guest_has_left_nothing_and_another_finds_zeros() {
        let mmu = mmu();
        let before = mmu.usage();
        for round in 0..20 {
            let mut vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
            use_all(&mmu, &mut vcpu);
            let used = mmu.usage();
            assert!(
                used.shadow_pages > 0
                    && used.swapped > 0
                    && used.ballooned > 0
                    && !mmu.live_roots().is_empty()
            );
            mmu.reset_vcpu(&mut vcpu);
            mmu.forget_guest(0).expect("nobody holds a page");
            let after = mmu.usage();
            assert_eq!(
                (after.resident, after.swapped, after.ballooned, after.shadow_pages, after.unsync),
                (0, 0, 0, 0, 0),
                "round {round}"
            );
            assert_eq!((mmu.live_roots().len(), mmu.pressure().swap_used), (0, 0));
            // Roots keep their frames, and there are few.
            assert!(
                after.frames_free + 2 * mmu.config().roots_max >= before.frames_free,
                "{before:?} {after:?}"
            );
            assert!(mmu.audit().is_empty(), "{:?}", mmu.audit());
            let mut byte = [7];
            mmu.read_bytes(&LocalStack::new(Context::Host), Gfn(FIRST + 31).at(0), &mut byte)
                .expect("memory");
            assert_eq!((byte, vcpu.mode(), vcpu.cr3()), ([0], Mode::default(), 0));
        }
    }

    #[test]
    fn a_vcpu_that_was_reset_flushes_before_it_runs() {
        let mmu = mmu();
        let mut vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
        use_all(&mmu, &mut vcpu);
        // What is owed for the pages that were taken it flushes first.
        mmu.tlb_enter(&vcpu);
        mmu.leave(&vcpu);
        assert!(!mmu.tlb_enter(&vcpu));
        mmu.leave(&vcpu);
        mmu.reset_vcpu(&mut vcpu);
        assert!(mmu.tlb_enter(&vcpu), "what it has seen it has forgotten");
        mmu.leave(&vcpu);
        assert_eq!((vcpu.tlb_tag(false), vcpu.tlb_tag(true)), (0, 0));
        assert_eq!(vcpu.events.borrow().last(Gva(0)), None, "an event of the guest before");
    }

    #[test]
    fn a_page_that_somebody_holds_is_named_and_forgotten_later() {
        let mmu = mmu();
        let mut vcpu = mmu.soft_vcpu(0, TlbKind::Sized);
        use_all(&mmu, &mut vcpu);
        let held = mmu.try_take_page(Gfn(FIRST + 5), Intent::Read).expect("resident");
        mmu.reset_vcpu(&mut vcpu);
        let refused = mmu.forget_guest(0);
        assert!(
            matches!(refused, Err(NotDiscarded::Held { gfn, .. }) if gfn == Gfn(FIRST + 5)),
            "{refused:?}"
        );
        drop(held);
        assert_eq!(mmu.forget_guest(0), Ok(()));
        assert_eq!(mmu.usage().resident, 0);
    }
}
