//! Discard: pages whose contents are not wanted any more, or that the guest gives up.
//!
//! Story: the guest's balloon, and an operator, name pages; each becomes `Zero` or `Ballooned`, from whatever it was. What
//! cannot be had at once (pinned by a window, being read back) is tried again a number of times, and named then. The frames go
//! back to the host, but for a few.
//!
//! Holds: INV-WAIT-2, where the caller may not sleep nothing here does: what a sleeper would have waited for is
//! [`WouldBlock`], and the host and the swap device hear from the background thread.
//!
//! Locks: none held by the caller; no window. May sleep, unless it was told not to.

use crate::Mmu;
use crate::addr::Gfn;
use crate::frames::{SHADOWED, UNSYNC, UPPER, WATCHED};
use crate::invalidation::{BATCH_MAX, Caller, Few, May, Settled, Settling, WouldBlock};
use crate::p2m::PageState;
use crate::records::Cause;
use crate::rules::Rule;
use crate::scope::NoSleep;
use crate::sync::thread;

/// Attempts at a batch before the pages that are left are named.
pub const ROUNDS_MAX: u32 = 1000;

/// What becomes of the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// They read as zeros.
    Zero,
    /// They are not the guest's any more, until it touches them.
    Balloon,
}

impl Discard {
    fn cause(self) -> Cause {
        match self {
            Discard::Zero => Cause::Discard,
            Discard::Balloon => Cause::Balloon,
        }
    }
}

/// Why pages were not discarded. Those before them are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotDiscarded {
    /// The caller may not sleep, and would have to: for a vCPU, or for whoever has a page in hand.
    #[error(transparent)]
    WouldBlock(#[from] WouldBlock),
    /// A page is held in its place.
    #[error("guest frame {gfn} cannot be taken: it is {why}")]
    Held {
        /// The first such page.
        gfn: Gfn,
        /// By what.
        why: &'static str,
    },
}

impl Mmu {
    /// Discards `pages`, which come in order and each once; what is no memory is passed over. `own` is the caller's vCPU, which
    /// is outside. Where it may sleep, it waits for vCPUs to flush, for others that have a page in hand, and a while, once, for fills that starve.
    ///
    /// # Errors
    ///
    /// When a page cannot be had, or the caller may not sleep and would have to: pages before it are discarded, and others of
    /// its batch may be. Requests that may not sleep are counted, by cause ([`crate::records::Totals::atomic`]).
    pub fn discard(
        &self,
        own: Option<u32>,
        pages: impl IntoIterator<Item = u32>,
        what: Discard,
        may: May,
    ) -> Result<(), NotDiscarded> {
        if may == May::Sleep {
            return self.discard_pages(own, pages, what, may);
        }
        let _scope = NoSleep::enter();
        let done = self.discard_pages(own, pages, what, may);
        self.records.note_atomic(what.cause(), matches!(done, Err(NotDiscarded::WouldBlock(_))));
        done
    }

    fn discard_pages(
        &self,
        own: Option<u32>,
        pages: impl IntoIterator<Item = u32>,
        what: Discard,
        may: May,
    ) -> Result<(), NotDiscarded> {
        let (memory, mut caller) = (self.p2m.pages(), Caller::new(own, may));
        let mut pages = pages.into_iter().take_while(|page| *page < memory).map(Gfn);
        loop {
            let mut left: Few<Gfn> = pages.by_ref().take(BATCH_MAX).collect();
            if left.is_empty() {
                break;
            }
            debug_assert!(left.is_sorted_by(|a, b| a < b), "in order, and each once");
            for _ in 0..ROUNDS_MAX {
                let done = self.discard_batch(&left, what, &mut caller)?;
                let mut done = done.iter().peekable();
                // A page that was touched again after it was discarded has been all the same.
                left.retain(|gfn| done.next_if_eq(&&*gfn).is_none() && !self.is_discarded(*gfn, what));
                if left.is_empty() || may == May::NotSleep {
                    break;
                }
                // What another has in hand comes back; whoever has it may have lost its CPU. A pin just goes.
                match left.iter().find(|gfn| self.buckets.is_closed(**gfn)) {
                    Some(gfn) => self.wait_while_moving(*gfn),
                    None => thread::yield_now(),
                }
            }
            if let Some(gfn) = left.first() {
                // Watched tables stay where they are however long one waits.
                let waits = may == May::NotSleep && left.iter().any(|gfn| !self.is_flagged(*gfn, WATCHED));
                return Err(match waits {
                    true => WouldBlock.into(),
                    false => NotDiscarded::Held { gfn: *gfn, why: self.held_by(*gfn) },
                });
            }
        }
        match may {
            May::Sleep => self.give_back(),
            // Swap slots and frames are given up by who may sleep.
            May::NotSleep => self.background.want(),
        }
        Ok(())
    }

    /// Discards what can be had of `gfns`, which are in order; returns those that had a frame, in that order.
    fn discard_batch(
        &self,
        gfns: &[Gfn],
        what: Discard,
        caller: &mut Caller,
    ) -> Result<Few<Gfn>, WouldBlock> {
        let settled = match what {
            Discard::Zero => Settled::Zero,
            Discard::Balloon => Settled::Ballooned,
        };
        if caller.may_sleep() {
            let tables = gfns.iter().filter(|gfn| self.is_flagged(**gfn, SHADOWED | UPPER | UNSYNC));
            tables.for_each(|gfn| self.unshadow(*gfn));
        }
        let mut settling = self.begin(what.cause(), gfns, caller)?.unmap()?.shoot_down()?;
        let mut done = Few::with_capacity(gfns.len());
        settling.settle(|page| {
            done.push(page.gfn);
            page.copy.into_iter().for_each(|slot| self.swap.abandon(slot));
            Some(settled)
        });
        if done.len() < settling.gates().len() {
            self.discard_absent(&settling, what);
        }
        settling.end();
        if let (Some(model), Discard::Balloon) = (self.guest_tlb(), what) {
            gfns.iter().for_each(|gfn| model.given_up(*gfn));
        }
        Ok(done)
    }

    /// Sleeps until the page's gate has been opened, and on while the page is still on its way: others who share its bucket
    /// open the gate as well.
    fn wait_while_moving(&self, gfn: Gfn) {
        self.buckets.wait(gfn);
        while self.p2m.lookup(gfn) == PageState::Moving {
            self.buckets.wait(gfn);
        }
    }

    /// Pages of the batch that have no frame.
    fn discard_absent(&self, settling: &Settling<'_>, what: Discard) {
        for gfn in settling.gates() {
            let to = match what {
                Discard::Zero => PageState::Zero,
                Discard::Balloon => PageState::Ballooned,
            };
            match self.p2m.lookup(*gfn) {
                PageState::Swapped(slot) if self.p2m.claim(*gfn, PageState::Swapped(slot)).is_some() => {
                    self.p2m.transition(*gfn, PageState::Moving, to);
                    self.swap.abandon(slot);
                }
                PageState::Zero if what == Discard::Balloon => {
                    self.p2m.transition(*gfn, PageState::Zero, to);
                }
                PageState::Ballooned if what == Discard::Zero => {
                    self.p2m.transition(*gfn, PageState::Ballooned, to);
                }
                _ => {}
            }
        }
    }

    fn is_discarded(&self, gfn: Gfn, what: Discard) -> bool {
        match self.p2m.lookup(gfn) {
            PageState::Device => true,
            PageState::Zero => what == Discard::Zero,
            PageState::Ballooned => what == Discard::Balloon,
            PageState::Moving => !self.rules.keep(Rule::MovingAtDiscard),
            PageState::Resident(_) | PageState::Swapped(_) => false,
        }
    }
}
