//! Collapse: a range of 2 MiB of guest memory is gathered into contiguous, aligned frames while the guest runs; and split again.
//!
//! Story: a background thread looks for ranges that are hot and mostly resident ([`Mmu::collapse_round`]) and collapses them
//! ([`Mmu::collapse`]). Each range has a *block* of frames behind the pool that is its own ([`crate::frames`]), so that none is ever too
//! scattered to be had.
//!
//! ```text
//! mark       the upper entry: Table -> Moving(ticket)
//! gather     batch by batch, each an invalidation like any other (cause collapse): its pages are copied while their gates are
//!            closed, with no lock held. A page that was never touched gets its frame in the block, one in swap is read back first
//! verify     bucket by bucket: every page is in its frame of the block, and its stores need not be seen
//! install    Moving(ticket) -> Huge(base), if the ticket still stands
//! ```
//!
//! The guest waits for a page of the batch that it touches, and for the shootdown of one batch: never for a range. What the lower entries
//! say is true at any time, so walks, fills, devices and importers need not know of any of it. Whoever takes a page from its frame, or
//! wants to see stores to it, breaks the range up first, under the page's bucket (`Mmu::break_up`). So there is an outcome for each
//! who comes in the middle:
//!
//! | who | to a page of the batch in hand | to another page | the collapse |
//! |---|---|---|---|
//! | a load or store of the guest | waits at the gate for the batch, and finds the page in its new frame | goes on | goes on |
//! | a window, a device | the same; if it came first, the page stays where it is | goes on | comes again, some times |
//! | discard, balloon | waits at the gate, then takes the page | takes it | gives up |
//! | page-out, import | the same | takes it | gives up |
//! | reclaim | passes the range by | passes it by | gives up before frames are short |
//! | a page that becomes a table, or is watched | waits at the gate | goes on | gives up |
//! | another collapse of the range | | is told that it is busy | goes on |
//!
//! A collapse that gives up leaves every page what it was; those that it has moved stay where they are now, and the next one finds them
//! there.
//!
//! The race of 2024, in which a discard meets a range whose table is detached, takes it for empty and does nothing, cannot be had
//! by an empty entry: there is none. By a page it could:
//!
//! ```text
//! collapse                              discard
//! the page: Resident(old) -> Moving
//!                                       the page has no frame: nothing to discard
//! the page: Moving -> Resident(new)                       -> what was discarded is there
//! ```
//!
//! So a page on its way is waited for (`Rule::MovingAtDiscard`). And a discard of a page that was gathered already takes the ticket away
//! (`Rule::SplitAtUnmap`): the range does not become huge over a page that is gone.
//!
//! Holds: INV-HUGE-1, in a range that is `Huge(base)` page n is resident in frame base + n, is no table, is not watched, and nobody
//! outside has it. INV-HUGE-2, a range is `Moving` only while somebody gathers it.
//!
//! Locks: none held by the caller, no window; sleeps. Within, what an invalidation takes. The word of an upper entry is changed by
//! compare-and-swap: no lock is held over a copy, nor over two pages.
//!
//! Limits: low memory is left alone, and so is what an importer has. All pages of a range that was collapsed count as dirty.
//! Blocks take as many frame numbers as the guest has pages, and no memory for them until they are used.

use std::sync::atomic::Ordering::Relaxed;

use crate::Mmu;
use crate::addr::{Gfn, Mfn};
use crate::frames::{DIRTY, Draw, EXTERNAL, SHADOWED, UNSYNC, UPPER, WATCHED};
use crate::invalidation::{Caller, Closed, Settled, Unmapped};
use crate::lock_order;
use crate::p2m::{P2m, PageState, Range, TABLE_ENTRIES, Ticket};
use crate::pool;
use crate::reclaim::Shortage;
use crate::records::Cause;
use crate::sync::{AtomicU64, thread};

/// Pages of a range.
const PAGES: u32 = TABLE_ENTRIES as u32;
/// Pages that are on their way at once.
pub const COLLAPSE_BATCH: u32 = if PAGES < 64 { 2 } else { 64 };
/// Attempts at a batch one of whose pages somebody holds.
const ROUNDS_MAX: u32 = 8;
/// Pages of a range that must be resident for it to be looked at: an eighth of it may be filled.
const RESIDENT_MIN: u32 = PAGES - PAGES / 8;
/// Pages of it that must have been used from one look to the next.
const HOT_MIN: u32 = PAGES / 8;
/// Ranges that are looked at in a round.
const LOOKS_MAX: usize = 8;
/// Marks of a frame that is left where it is.
const HELD: u32 = SHADOWED | UPPER | UNSYNC | WATCHED | EXTERNAL;

/// Why a range was not collapsed. All its pages are what they were.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotCollapsed {
    /// It is no whole range of high memory, or there are no blocks.
    #[error("there is no block for the range of guest frame {0}")]
    NoBlock(Gfn),
    /// It is huge, nobody has ever touched it, or somebody else collapses it.
    #[error("the range of guest frame {0} is not one of pages that nobody gathers")]
    NotATable(Gfn),
    /// A page is not memory, or the guest has given it up.
    #[error("guest frame {0} has nothing to be gathered")]
    Absent(Gfn),
    /// A page is held in its place.
    #[error("guest frame {gfn} cannot be moved: it is {why}")]
    Held {
        /// The page.
        gfn: Gfn,
        /// By what.
        why: &'static str,
    },
    /// Somebody has taken a page meanwhile, or wants to see stores to it.
    #[error("a page of the range of guest frame {0} was taken meanwhile")]
    Hit(Gfn),
    /// Frames are few, and there are others who want them.
    #[error("frames are short")]
    Short,
    /// A page cannot be read back.
    #[error(transparent)]
    Failed(#[from] Shortage),
}

/// What has become of ranges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HugeStats {
    /// Those that are huge now.
    pub huge: u32,
    /// Collapses so far.
    pub collapsed: u64,
    /// Huge ranges so far that were split again.
    pub split: u64,
    /// Collapses so far that gave up because a page was taken.
    pub hit: u64,
    /// Those that did because a page was held.
    pub held: u64,
    /// Those that did because frames were short.
    pub short: u64,
    /// Pages moved.
    pub moved: u64,
    /// Pages filled that had never been touched.
    pub filled: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Collapses {
    collapsed: AtomicU64,
    split: AtomicU64,
    hit: AtomicU64,
    held: AtomicU64,
    short: AtomicU64,
    moved: AtomicU64,
    filled: AtomicU64,
    /// Ranges that are being gathered.
    gathering: AtomicU64,
}

impl Collapses {
    /// Pages of some range are passed by, for as long as it takes whoever gathers it to get on, or to give up.
    pub(crate) fn is_gathering(&self) -> bool {
        self.gathering.load(Relaxed) > 0
    }
}

/// Who looks for ranges to collapse: where it has got to, and which it has looked at once.
#[derive(Clone, Debug, Default)]
pub struct Collapser {
    next: u32,
    looked_at: Vec<Gfn>,
}

/// A range that is being gathered; dropped, it is none any more.
struct Gathering<'m> {
    p2m: &'m P2m,
    first: Gfn,
    base: Mfn,
    ticket: Ticket,
}

impl Gathering<'_> {
    /// Nobody has taken a page of it, or wants to see stores to it.
    fn stands(&self) -> Result<(), NotCollapsed> {
        match self.p2m.range(self.first) == Range::Moving(self.ticket) {
            true => Ok(()),
            false => Err(NotCollapsed::Hit(self.first)),
        }
    }

    /// The frame that the page is to have.
    fn place(&self, gfn: Gfn) -> Mfn {
        Mfn(self.base.0 + (gfn.0 - self.first.0))
    }
}

impl Drop for Gathering<'_> {
    fn drop(&mut self) {
        self.p2m.end_collapse(self.first, self.ticket, Range::Table);
    }
}

/// One range.
impl Mmu {
    /// Gathers the range of `gfn` into its block, and makes it huge. Called with no lock held and nothing mapped, by no vCPU, and by one
    /// thread at a time; sleeps.
    ///
    /// # Errors
    ///
    /// [`NotCollapsed`]. What has happened to the pages meanwhile has happened to them; nothing else has.
    pub fn collapse(&self, gfn: Gfn) -> Result<(), NotCollapsed> {
        lock_order::assert_may_sleep();
        pool::assert_none_held();
        self.collapses.gathering.fetch_add(1, Relaxed);
        let done = self.collapse_range(Gfn(gfn.0 / PAGES * PAGES));
        self.collapses.gathering.fetch_sub(1, Relaxed);
        let counter = match &done {
            Ok(()) => Some(&self.collapses.collapsed),
            Err(NotCollapsed::Hit(_)) => Some(&self.collapses.hit),
            Err(NotCollapsed::Held { .. } | NotCollapsed::Absent(_)) => Some(&self.collapses.held),
            Err(NotCollapsed::Short) => Some(&self.collapses.short),
            Err(_) => None,
        };
        counter.into_iter().for_each(|counter| {
            counter.fetch_add(1, Relaxed);
        });
        done
    }

    fn collapse_range(&self, first: Gfn) -> Result<(), NotCollapsed> {
        let block = self.frames.block(first).filter(|_| first.0 >= self.config.low_pages);
        let base = block.ok_or(NotCollapsed::NoBlock(first))?;
        let ticket = self.p2m.begin_collapse(first).ok_or(NotCollapsed::NotATable(first))?;
        let range = Gathering { p2m: &self.p2m, first, base, ticket };
        // Frames of the block that were left before.
        self.trim();
        for batch in (first.0..first.0 + PAGES).step_by(COLLAPSE_BATCH as usize) {
            self.gather(&range, batch..batch + COLLAPSE_BATCH)?;
        }
        let whole = self.is_gathered(first, base);
        if whole && self.p2m.end_collapse(first, ticket, Range::Huge(base)) {
            return Ok(());
        }
        Err(NotCollapsed::Hit(first))
    }

    /// Has every page of the batch in its place.
    fn gather(&self, range: &Gathering<'_>, batch: std::ops::Range<u32>) -> Result<(), NotCollapsed> {
        let mut held = range.first;
        for round in 0..ROUNDS_MAX {
            range.stands()?;
            let counts = self.frames.counts();
            if counts.available <= counts.marks.low + COLLAPSE_BATCH {
                return Err(NotCollapsed::Short);
            }
            if round > 0 {
                thread::nap();
            }
            let (mut scattered, mut others) = (Vec::new(), false);
            for gfn in batch.clone().map(Gfn) {
                match self.p2m.lookup(gfn) {
                    PageState::Resident(mfn) if mfn == range.place(gfn) => {}
                    PageState::Resident(mfn) if self.frames.flags(mfn) & HELD != 0 => {
                        return Err(NotCollapsed::Held { gfn, why: self.held_by(gfn) });
                    }
                    PageState::Resident(_) => scattered.push(gfn),
                    PageState::Zero => others |= !self.fill(gfn, range.place(gfn)),
                    PageState::Swapped(_) => {
                        self.bring_in(None, gfn)?;
                        scattered.push(gfn);
                    }
                    PageState::Moving => {
                        self.buckets.wait(gfn);
                        others = true;
                    }
                    PageState::Ballooned | PageState::Device => return Err(NotCollapsed::Absent(gfn)),
                }
                others.then(|| held = gfn);
            }
            scattered.first().into_iter().for_each(|gfn| held = *gfn);
            let moved = self.move_to_block(range, &scattered);
            if moved == scattered.len() && !others {
                return Ok(());
            }
        }
        Err(NotCollapsed::Held { gfn: held, why: self.held_by(held) })
    }

    /// Gives a page that was never touched its frame of zeros, at `place`. False where it is not to be had, or the page has been
    /// touched meanwhile.
    fn fill(&self, gfn: Gfn, place: Mfn) -> bool {
        if !self.frames.claim(place, gfn, Draw::Ordinary) {
            return false;
        }
        // Nobody else knows of the frame yet.
        self.frames.change_flags(place, 0, DIRTY);
        self.lru.add(place);
        let filled = self.p2m.transition(gfn, PageState::Zero, PageState::Resident(place));
        if filled {
            self.collapses.filled.fetch_add(1, Relaxed);
        } else {
            self.lru.remove([place]);
            self.frames.release_for_move(&[place]);
        }
        filled
    }

    /// Moves pages to their places, those that can be had; says how many. Their old frames are free.
    fn move_to_block(&self, range: &Gathering<'_>, pages: &[Gfn]) -> usize {
        if pages.is_empty() {
            return 0;
        }
        let mut moved = 0;
        let closed = self.begin(Cause::Collapse, pages, &mut Caller::collapsing(range.ticket));
        if let Ok(mut settling) = closed.and_then(Closed::unmap).and_then(Unmapped::shoot_down) {
            settling.settle(|page| {
                let place = range.place(page.gfn);
                // An importer, or whoever shares the range, may have been faster.
                if self.frames.is_home(page.mfn) || !self.frames.claim(place, page.gfn, Draw::Ordinary) {
                    return None;
                }
                self.copy_page(page, place);
                self.frames.change_flags(place, 0, DIRTY);
                moved += 1;
                Some(Settled::Moved(place))
            });
            settling.end();
        }
        self.collapses.moved.fetch_add(moved as u64, Relaxed);
        moved
    }

    /// Every page of the range is in its frame of the block at `base`, and its stores need not be seen. Comes to the bucket of each:
    /// who takes or marks one after that finds the range as the caller has left it.
    pub(crate) fn is_gathered(&self, first: Gfn, base: Mfn) -> bool {
        (0..PAGES).all(|n| {
            let (gfn, mfn) = (Gfn(first.0 + n), Mfn(base.0 + n));
            let _bucket = self.buckets.lock(gfn);
            self.p2m.lookup(gfn) == PageState::Resident(mfn) && self.frames.flags(mfn) & HELD == 0
        })
    }

    /// The range of `gfn` is not huge any more, if it was: its pages stay where they are. True if it was.
    pub fn split(&self, gfn: Gfn) -> bool {
        let _bucket = self.buckets.lock(gfn);
        matches!(self.break_up(gfn), Range::Huge(_))
    }

    /// Counts a huge range that was split.
    pub(crate) fn note_split(&self, split: bool) {
        self.collapses.split.fetch_add(u64::from(split), Relaxed);
    }

    /// What has become of ranges so far.
    pub fn huge_stats(&self) -> HugeStats {
        let c = &self.collapses;
        let firsts = (0..self.p2m.pages()).step_by(TABLE_ENTRIES).map(Gfn);
        HugeStats {
            huge: firsts.filter(|first| matches!(self.p2m.range(*first), Range::Huge(_))).count() as u32,
            collapsed: c.collapsed.load(Relaxed),
            split: c.split.load(Relaxed),
            hit: c.hit.load(Relaxed),
            held: c.held.load(Relaxed),
            short: c.short.load(Relaxed),
            moved: c.moved.load(Relaxed),
            filled: c.filled.load(Relaxed),
        }
    }
}

/// Which range.
impl Mmu {
    /// One round of the background: collapses those of the ranges looked at in the last round that were hot since, and looks at some
    /// more. Returns how many it has collapsed. From one round to the next guest code should have run for a while; no vCPU's thread
    /// calls this.
    ///
    /// # Errors
    ///
    /// When swap has failed: the guest must not go on.
    pub fn collapse_round(&self, by: &mut Collapser) -> Result<u32, Shortage> {
        let mut cleared = false;
        let mut collapsed = 0;
        for first in std::mem::take(&mut by.looked_at) {
            if !self.is_plenty() || self.use_since(first, &mut cleared) < HOT_MIN {
                continue;
            }
            match self.collapse(first) {
                Ok(()) => collapsed += 1,
                Err(NotCollapsed::Failed(failed @ Shortage::Swap(_))) => return Err(failed),
                Err(why) => log::debug!("range of guest frame {first} not collapsed: {why}"),
            }
        }
        let ranges = self.p2m.pages() / PAGES;
        for _ in 0..ranges {
            if by.looked_at.len() == LOOKS_MAX || !self.is_plenty() {
                break;
            }
            let first = Gfn(by.next % ranges * PAGES);
            by.next = (by.next + 1) % ranges;
            if self.is_mostly_resident(first) {
                self.use_since(first, &mut cleared);
                by.looked_at.push(first);
            }
        }
        if cleared {
            self.ask_to_flush_young();
        }
        Ok(collapsed)
    }

    /// So many frames are free that a range may be filled.
    fn is_plenty(&self) -> bool {
        let counts = self.frames.counts();
        counts.available > counts.marks.high + PAGES / 8 + COLLAPSE_BATCH
    }

    /// Nearly all pages of the range have a frame, and none is held where it is for good.
    fn is_mostly_resident(&self, first: Gfn) -> bool {
        if first.0 < self.config.low_pages || self.p2m.range(first) != Range::Table {
            return false;
        }
        let mut resident = 0;
        for gfn in (first.0..first.0 + PAGES).map(Gfn) {
            match self.p2m.lookup(gfn) {
                PageState::Resident(mfn) if self.frames.flags(mfn) & HELD == 0 => resident += 1,
                PageState::Zero | PageState::Swapped(_) => {}
                _ => return false,
            }
        }
        resident >= RESIDENT_MIN
    }

    /// How many pages of the range were used since this was last asked.
    fn use_since(&self, first: Gfn, cleared: &mut bool) -> u32 {
        let mut is_young = |gfn: &Gfn| match self.p2m.lookup(*gfn) {
            PageState::Resident(mfn) => self.clear_young(*gfn, mfn, cleared),
            _ => false,
        };
        (first.0..first.0 + PAGES).map(Gfn).filter(|gfn| is_young(gfn)).count() as u32
    }
}
