//! How short of frames a guest is: what explains that it stalls.
//!
//! Story: an operator asks; nobody else does. It looks at every page that was ever touched, which takes milliseconds for a
//! large guest.
//!
//! Locks: none held by the caller; each is taken for a moment. What is counted may change meanwhile: the numbers are each
//! right, and need not add up.

use crate::Mmu;
use crate::frames::Marks;
use crate::p2m::PageState;

/// What reclaim is up against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    /// Pages of guest memory that have no frame because they read as zeros.
    pub zero: u32,
    /// Pages that a window, a device or a pool holds in their frames.
    pub pinned: u32,
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
        let (zero, pinned) = self.zero_and_pinned();
        let (wanted, failed) = self.background.state();
        Pressure {
            zero,
            pinned,
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

    fn zero_and_pinned(&self) -> (u32, u32) {
        let (mut others, mut pinned) = (0, 0);
        self.p2m.for_each(|_, state| {
            others += u32::from(state != PageState::Zero);
            if let PageState::Resident(mfn) = state {
                pinned += u32::from(self.frames.pins(mfn) != 0);
            }
        });
        (self.p2m.pages() - others, pinned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gfn;
    use crate::window::{Context, LocalStack};
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
}
