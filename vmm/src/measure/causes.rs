//! How pages are taken from the guest, and which.
//!
//! Story: each start takes a few pages in one of these ways. What takes contents away is for a guest that does not mind
//! ([`super::guest`]); the others leave every byte what it is.

use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use umbra_mmu::discard::{Discard, NotDiscarded};
use umbra_mmu::invalidation::May;
use umbra_mmu::p2m::PageState;
use umbra_mmu::records::Cause;
use umbra_mmu::swap::CLUSTER;
use umbra_mmu::{Gfn, Mmu, SwapFailed};

use crate::vm::Beside;

/// How often a cut budget is looked at, and for how long at most.
const LOOK: Duration = Duration::from_micros(20);
const LOOKS_FOR: Duration = Duration::from_millis(100);
/// Batches of reclaim for one start: the first ones may find that all was just used.
const BATCHES_MAX: u32 = 64;

/// How pages are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Asked {
    /// Their contents go.
    Discard,
    /// These very pages go to swap.
    PageOut,
    /// As if the guest had given them up.
    Balloon,
    /// The budget is cut by as many frames and, once the host has them, is what it was.
    Budget,
    /// The least recently used go to swap, as many.
    Reclaim,
    /// Importers lose them, and the guest keeps them where they are. Needs --importers.
    Revoke,
}

/// What a start came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// All of it.
    Done,
    /// It could not be had.
    Failed(&'static str),
}

impl Asked {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Asked::Discard => "discard",
            Asked::PageOut => "page-out",
            Asked::Balloon => "balloon",
            Asked::Budget => "budget",
            Asked::Reclaim => "reclaim",
            Asked::Revoke => "revoke",
        }
    }

    /// Pages come back as zeros.
    pub fn takes_contents(self) -> bool {
        matches!(self, Asked::Discard | Asked::Balloon)
    }

    /// What the MMU writes into its records.
    pub fn recorded(self) -> Cause {
        match self {
            Asked::Discard => Cause::Discard,
            Asked::PageOut => Cause::PageOut,
            Asked::Balloon => Cause::Balloon,
            Asked::Budget | Asked::Reclaim => Cause::Reclaim,
            Asked::Revoke => Cause::Revoke,
        }
    }

    /// Takes `pages`. May sleep; holds nothing.
    ///
    /// # Errors
    ///
    /// When swap fails: the guest must not go on.
    pub fn take(self, beside: &Beside, pages: &[Gfn]) -> Result<Came, SwapFailed> {
        let mmu = &*beside.mmu;
        match self {
            Asked::Discard => Ok(discard(mmu, pages, Discard::Zero)),
            Asked::Balloon => Ok(discard(mmu, pages, Discard::Balloon)),
            Asked::PageOut => mmu.page_out(None, pages).map(|_| Came::Done),
            Asked::Reclaim => reclaim(mmu, pages.len() as u32),
            Asked::Budget => Ok(cut(beside, pages.len() as u32)),
            Asked::Revoke => {
                mmu.revoke(pages);
                Ok(Came::Done)
            }
        }
    }
}

fn discard(mmu: &Mmu, pages: &[Gfn], what: Discard) -> Came {
    match mmu.discard(None, pages.iter().map(|gfn| gfn.0), what, May::Sleep) {
        Ok(()) => Came::Done,
        Err(NotDiscarded::Held { why, .. }) => Came::Failed(why),
        Err(NotDiscarded::WouldBlock(_)) => Came::Failed("somebody would have had to be waited for"),
    }
}

fn reclaim(mmu: &Mmu, want: u32) -> Result<Came, SwapFailed> {
    let mut freed = 0;
    for _ in 0..BATCHES_MAX {
        freed += mmu.reclaim((want - freed).min(CLUSTER), Cause::Reclaim, None)?;
        if freed >= want {
            return Ok(Came::Done);
        }
    }
    Ok(Came::Failed("fewer pages than that were not in use"))
}

/// Cuts the budget below what is used, and sets it back when the host has the difference.
fn cut(beside: &Beside, pages: u32) -> Came {
    let mmu = &*beside.mmu;
    let usage = mmu.usage();
    let target = usage.frames_used.saturating_sub(pages);
    if target < mmu.budget_min() || mmu.set_budget(target).is_err() {
        return Came::Failed("the budget would be too small for this guest");
    }
    let is_met = || mmu.usage().frames_used <= target || beside.has_ended();
    let (mut met, patience) = (is_met(), Instant::now() + LOOKS_FOR);
    while !met && Instant::now() < patience {
        thread::sleep(LOOK);
        met = is_met();
    }
    // What it was can be had again.
    let back = mmu.set_budget(usage.budget);
    match (met, back) {
        (true, Ok(())) => Came::Done,
        (false, Ok(())) => Came::Failed("the background thread has not made it in 100 ms"),
        (_, Err(_)) => Came::Failed("the budget cannot be what it was"),
    }
}

/// Which pages are taken: those of a guest that does not mind, one after the other, or whichever have frames.
#[derive(Clone, Debug)]
pub struct Targets {
    /// The first page and how many there are; `None` for all that reclaim may take.
    range: Option<(u32, u32)>,
    /// Where to go on.
    cursor: u32,
}

impl Targets {
    /// `pages` pages from `first` on.
    pub fn range(first: u32, pages: u32) -> Targets {
        Targets { range: Some((first, pages)), cursor: 0 }
    }

    /// Whichever have frames and may go to swap.
    pub fn resident() -> Targets {
        Targets { range: None, cursor: 0 }
    }

    /// The first of a range of pages and how many there are, if they are one.
    pub fn as_range(&self) -> Option<(u32, u32)> {
        self.range
    }

    /// True once the guest has all of them: it is under way.
    pub fn are_resident(&self, mmu: &Mmu) -> bool {
        let is_resident = |page| matches!(mmu.p2m().lookup(Gfn(page)), PageState::Resident(_));
        self.range.is_none_or(|(first, pages)| (first..first + pages).all(is_resident))
    }

    /// The next `want` of them, in order and each once; fewer where there are not as many. It looks at each page once at most.
    pub fn next(&mut self, mmu: &Mmu, want: u32) -> Vec<Gfn> {
        let low = mmu.config().low_pages;
        let (first, pages) = self.range.unwrap_or((low, mmu.p2m().pages().saturating_sub(low)));
        let (mut found, mut looked) = (Vec::with_capacity(want as usize), 0);
        while (found.len() as u32) < want && looked < pages {
            let gfn = Gfn(first + self.cursor % pages);
            let wrapped = found.last().is_some_and(|last: &Gfn| *last > gfn);
            if wrapped && self.range.is_some() {
                // The rest comes with the next ones: neighbours stay together.
                found.clear();
            }
            let is_good = self.range.is_some() || matches!(mmu.p2m().lookup(gfn), PageState::Resident(_));
            if is_good {
                found.push(gfn);
            }
            self.cursor = (self.cursor + 1) % pages;
            looked += 1;
        }
        found.sort_unstable();
        found
    }
}
