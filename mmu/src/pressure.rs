//! How short of frames a guest is: what explains that it stalls.
//!
//! Story: an operator asks; nobody else does. It looks at every page that was ever touched, which takes milliseconds for a
//! large guest.
//!
//! Locks: none held by the caller; each is taken for a moment. What is counted may change meanwhile: the numbers are each
//! right, and need not add up.

use crate::Mmu;
use crate::frames::{DIRTY, Marks};
use crate::p2m::PageState;

/// What reclaim is up against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    /// Pages of guest memory that have no frame because they read as zeros.
    pub zero: u32,
    /// Pages that reclaim might take, but that a window or a device holds in their frames.
    pub pinned: u32,
    /// Pages that reclaim might take, and that swap has no good copy of: they need a slot to go.
    pub dirty: u32,
    /// Frames on the inactive list: the next to go.
    pub inactive: u32,
    /// Frames on the active list.
    pub active: u32,
    /// How many free frames mean what.
    pub marks: Marks,
    /// Frames that the host backs beyond the budget.
    pub over: u32,
    /// Fewer frames are free than the background thread would have.
    pub short: bool,
    /// The background thread has been woken and has not begun.
    pub wanted: bool,
    /// Swap has failed: the run is about to end.
    pub failed: bool,
    /// Slots of the swap device.
    pub swap_slots: u32,
    /// Those in use, copies of resident pages among them.
    pub swap_used: u32,
}

impl Mmu {
    /// How short of frames the guest is.
    pub fn pressure(&self) -> Pressure {
        let (counts, swap) = (self.frames.counts(), self.swap.stats());
        let (inactive, active) = self.lru.lengths();
        let Pages { others, pinned, dirty } = self.pages_by_need();
        let (wanted, failed) = self.background.state();
        Pressure {
            zero: self.p2m.pages() - others,
            pinned,
            dirty,
            inactive,
            active,
            marks: counts.marks,
            over: counts.backed.saturating_sub(counts.budget),
            short: counts.available < counts.marks.high,
            wanted,
            failed,
            swap_slots: swap.slots,
            swap_used: swap.slots_used,
        }
    }

    fn pages_by_need(&self) -> Pages {
        let mut pages = Pages::default();
        self.p2m.for_each(|gfn, state| {
            pages.others += u32::from(state != PageState::Zero);
            // Low memory is on no list: nobody takes it, pinned or not.
            if let PageState::Resident(mfn) = state
                && gfn.0 >= self.config.low_pages
            {
                match self.is_held(gfn, mfn) {
                    true => pages.pinned += 1,
                    false => pages.dirty += u32::from(self.frames.flags(mfn) & DIRTY != 0),
                }
            }
        });
        pages
    }
}

#[derive(Default)]
struct Pages {
    /// Those that do not read as zeros without a frame.
    others: u32,
    pinned: u32,
    dirty: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gfn;
    use crate::swap::MemorySwap;
    use crate::window::{Context, Intent, LocalStack};
    use crate::{Config, Machine, NoVcpus};

    #[test]
    fn pages_are_counted_where_they_are() {
        let config = Config::of_pages(600);
        let mmu = Mmu::new(Machine::anonymous(1200), config, Box::new(NoVcpus));
        assert!(mmu.make_device(Gfn(599)));
        let stack = LocalStack::new(Context::Host);
        (0..5).for_each(|page| mmu.write_bytes(&stack, Gfn(page).at(0), &[1]).expect("a frame"));
        let pressure = mmu.pressure();
        assert_eq!((pressure.zero, pressure.pinned), (594, 0));
        assert_eq!((pressure.inactive + pressure.active, pressure.short, pressure.over), (5, false, 0));
        mmu.set_budget(mmu.budget_min()).expect("the least");
        let pressure = mmu.pressure();
        assert!(pressure.wanted && pressure.marks.high > 0 && !pressure.failed);
    }

    #[test]
    fn pinned_and_dirty_are_what_keeps_a_page_that_could_be_taken() {
        let config = Config { low_pages: 8, ..Config::of_pages(600) };
        let mmu = Mmu::new(Machine::anonymous(1200), config, Box::new(NoVcpus));
        let mmu = mmu.with_swap(Box::new(MemorySwap::new(600)));
        let (stack, seen) = (LocalStack::new(Context::Host), || mmu.pressure());
        let write = |page: u32| mmu.write_bytes(&stack, Gfn(page).at(0), &[1]).expect("a frame");
        (0..20).for_each(write);
        assert_eq!((seen().pinned, seen().dirty), (0, 12), "those of low memory stay, whatever they are");
        let maps = [7, 10].map(|page| mmu.try_take_page(Gfn(page), Intent::Read).expect("resident"));
        assert_eq!((seen().pinned, seen().dirty), (1, 11));
        drop(maps);
        assert_eq!((seen().pinned, seen().dirty), (0, 12), "an idle slot keeps nobody");
        assert_eq!(mmu.page_out(None, &[Gfn(10), Gfn(11)]), Ok(2));
        mmu.bring_in(None, Gfn(10)).expect("frames are left");
        assert_eq!(seen().dirty, 10, "swap has a copy");
        write(10);
        assert_eq!(seen().dirty, 11);
    }
}
