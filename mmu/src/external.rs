//! The external reverse map: which importer, a process of its own, may have which page of the guest in its page tables.
//!
//! Story: a *segment* is a range of guest memory that importers may ask for, page by page ([`Mmu::import_page`]). An imported
//! page lives in its *home*, a frame of the segment's own memory, which is all that an importer ever has a descriptor of. A page
//! that lives elsewhere is moved home first, an invalidation like any other; one that lost its frame comes back wherever there is
//! one, and goes home when it is next imported. Whoever takes a page away takes it from the importers too:
//!
//! ```text
//! begin, unmap    under bucket(gfn) the page loses its importers, as it loses its sptes; they go on a list
//! tell            every importer on it, before anybody is waited for, with no lock held
//! shootdown       the vCPUs
//! wait            until each has given the page up, is dead, or its deadline is over (its owner sees to that)
//! finish          the contents are copied to where they go; then the home is *fenced*: the host takes its memory away, out of
//!                 every page table of every process. Who has said nothing, or lied, reads zeros from here on
//! ```
//!
//! The fence is made each time, not for the silent alone: it is what gives the memory back, and nobody has to be believed.
//!
//! Why the gate, and why its check stands in bucket(gfn): the race of 2008, where a page is handed out between two unmappings.
//!
//! ```text
//! import                              reclaim
//! the page is at home: good
//!                                     begin, unmap: no importer, nobody to tell
//!                                     finish: written out, fenced
//! enter the importer                                       -> an importer that nobody will ever tell
//! ```
//!
//! What is said to an importer may overtake itself on the way: that it has the page, by the thread that imports, and that it must
//! give it up, by the thread that takes it away. So both carry a number of one clock ([`Mmu::import_page`] returns it,
//! [`External::tell`] has it); the importer goes by the greater.
//!
//! Importers write behind everybody's back. A page of a writable segment is [`FOREIGN`] at home, and no page that must be seen
//! written to stays there: a table that is to be shadowed is moved out first ([`Mmu::bring_in`]), and one that is to be watched leaves
//! any home ([`Mmu::watch`]). What an importer may write is dirty from the moment it is handed out.
//!
//! Holds: INV-EXT-1, who is entered for a page may have it, and the page is at home; a frame has [`EXTERNAL`] if and only if
//! somebody is entered for its page. INV-EXT-2, a home never holds another page than its own. INV-EXT-3, a caller that may not
//! sleep tells nobody. INV-EXT-4, no foreign frame holds a tracked table, and no home a watched one.
//!
//! Locks: bucket(gfn), then [`lock_order::EXTERNAL`] or [`lock_order::SEGMENTS`]. Importing may sleep.
//!
//! Limits: a page is in one segment at most. Homes count on the budget as all frames do; a move needs one frame more for as long as
//! it takes.
//!
//! See: the discussion of 2008 about sleeping notifiers for XPmem.

use rustc_hash::FxHashMap;

use crate::Mmu;
use crate::addr::{Gfn, Mfn};
use crate::bucket::Sequence;
use crate::discard::ROUNDS_MAX;
use crate::frames::{DIRTY, Draw, EXTERNAL, FOREIGN, SHADOWED, UNSYNC, UPPER, WATCHED};
use crate::invalidation::{BATCH_MAX, Caller, Closed, Held, May, Settled, Unmapped};
use crate::lock_order;
use crate::p2m::PageState;
use crate::pool;
use crate::reclaim::Shortage;
use crate::records::Cause;
use crate::rules::Rule;
use crate::scope::MemAlloc;
use crate::sync::{AtomicU32, AtomicU64, Lock, Ordering, fence, point, thread};

/// How often a closing segment's pages are waited for that are held where they are, about 3 s in all.
const CLOSING_NAPS_MAX: u32 = 20_000;

/// An importer. Its number is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImporterId(pub u32);

/// A segment. Its number is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentId(pub u32);

/// How to reach importers.
pub trait External: Send + Sync + std::fmt::Debug {
    /// Tells `importer` to give `pages` up, at `order` of the clock. Returns at once, whether or not it can be reached; called
    /// with no lock held, for each importer once, and before [`External::wait`].
    fn tell(&self, order: u64, importer: ImporterId, pages: &[Gfn]);

    /// Returns when everybody who was told at `order` has given its pages up, cannot be reached any more, or is late. May sleep.
    fn wait(&self, order: u64) -> Answers;
}

/// What importers made of being told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// Who was waited for when all others had answered, if there was one.
    pub slowest: Option<ImporterId>,
    /// How many have not answered in their time.
    pub late: u32,
}

/// Nobody imports.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoImporters;

impl External for NoImporters {
    fn tell(&self, _order: u64, _importer: ImporterId, _pages: &[Gfn]) {}

    fn wait(&self, _order: u64) -> Answers {
        Answers::default()
    }
}

/// Why there is no segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSegment {
    /// The machine has no frames for segments.
    #[error("this guest exports nothing")]
    Closed,
    /// No pages, or some that are not memory.
    #[error("{pages} pages from guest frame {first} on are not all memory")]
    NotMemory {
        /// The first.
        first: Gfn,
        /// How many.
        pages: u32,
    },
    /// Some are another segment's.
    #[error("{pages} pages from guest frame {first} on overlap segment {}", other.0)]
    Overlaps {
        /// The first.
        first: Gfn,
        /// How many.
        pages: u32,
        /// That one.
        other: SegmentId,
    },
}

/// Why a page was not imported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotImported {
    /// There is no such segment, or it is being removed.
    #[error("there is no segment {}", .0.0)]
    NoSegment(SegmentId),
    /// The segment does not have the page.
    #[error("guest frame {gfn} is not of segment {}", segment.0)]
    Beyond {
        /// The page.
        gfn: Gfn,
        /// The segment.
        segment: SegmentId,
    },
    /// It is for readers alone.
    #[error("segment {} is for readers", .0.0)]
    ReadOnly(SegmentId),
    /// No memory there.
    #[error("guest frame {0} is not memory")]
    Device(Gfn),
    /// It is held where it is.
    #[error("guest frame {gfn} cannot be moved: it is {why}")]
    Held {
        /// The page.
        gfn: Gfn,
        /// By what.
        why: &'static str,
    },
    /// It cannot be brought in.
    #[error(transparent)]
    Short(#[from] Shortage),
}

/// Why a segment was not closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotClosed {
    /// A page stays where it is for too long.
    #[error("guest frame {gfn} does not leave its segment: it is {why}")]
    Held {
        /// The page.
        gfn: Gfn,
        /// By what.
        why: &'static str,
    },
    /// There is no frame for one.
    #[error(transparent)]
    Short(#[from] Shortage),
}

/// Where a page is at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageReport {
    /// 0 zeros, 1 in a frame, 2 in swap, 3 given up by the guest, 4 no memory, 5 on its way.
    pub kind: u8,
    /// It may have been written to since its contents were last known.
    pub dirty: bool,
    /// It is at home.
    pub home: bool,
    /// Somebody has it.
    pub imported: bool,
}

#[derive(Clone, Copy, Debug)]
struct Holder {
    importer: ImporterId,
    write: bool,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    id: SegmentId,
    first: Gfn,
    pages: u32,
    writable: bool,
    /// Nobody imports from it any more.
    closing: bool,
    /// Calls of [`Mmu::import_page`] under way.
    users: u32,
}

impl Segment {
    fn has(&self, gfn: Gfn) -> bool {
        gfn.0.wrapping_sub(self.first.0) < self.pages
    }
}

#[derive(Debug, Default)]
struct Segments {
    list: Vec<Segment>,
    /// The last number given out.
    last: u32,
}

/// What the mmu knows of importers.
#[derive(Debug)]
pub(crate) struct Exports {
    pub outside: Box<dyn External>,
    /// The first home: page n's is n after it.
    first: Mfn,
    /// How many there are: none, or one for each page of guest memory.
    homes: u32,
    holders: Lock<FxHashMap<Gfn, Vec<Holder>>>,
    segments: Lock<Segments>,
    /// Pages with a holder.
    held: AtomicU32,
    order: AtomicU64,
}

impl Exports {
    pub fn new(first: Mfn, homes: u32) -> Exports {
        Exports {
            outside: Box::new(NoImporters),
            first,
            homes,
            holders: Lock::new(lock_order::EXTERNAL, FxHashMap::default()),
            segments: Lock::new(lock_order::SEGMENTS, Segments::default()),
            held: AtomicU32::new(0),
            order: AtomicU64::new(0),
        }
    }

    /// Some page has an importer.
    #[inline]
    pub fn is_any_held(&self) -> bool {
        self.held.load(Ordering::Relaxed) > 0
    }

    /// The next number of the clock.
    pub fn advance(&self) -> u64 {
        self.order.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Takes everybody off a page. Caller holds its bucket, and takes the frame's flag.
    fn take_holders(&self, gfn: Gfn) -> Vec<Holder> {
        let taken = self.holders.lock().remove(&gfn).unwrap_or_default();
        self.held.fetch_sub(u32::from(!taken.is_empty()), Ordering::Relaxed);
        taken
    }

    fn home(&self, gfn: Gfn) -> Option<Mfn> {
        (gfn.0 < self.homes).then(|| Mfn(self.first.0 + gfn.0))
    }

    /// Enters a segment, which is not removed until the guard goes.
    fn enter(&self, id: SegmentId) -> Option<Entered<'_>> {
        let mut segments = self.segments.lock();
        let segment = segments.list.iter_mut().find(|segment| segment.id == id && !segment.closing)?;
        segment.users += 1;
        Some(Entered { exports: self, segment: *segment })
    }
}

struct Entered<'a> {
    exports: &'a Exports,
    segment: Segment,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut segments = self.exports.segments.lock();
        if let Some(segment) = segments.list.iter_mut().find(|other| other.id == self.segment.id) {
            segment.users -= 1;
        }
    }
}

/// Segments.
impl Mmu {
    /// Makes a segment of `pages` pages from `first` on. Its homes are the frames [`Mmu::homes_of`] says, in which no page is until
    /// somebody imports it: their memory is the caller's to put there, before anybody can know the number.
    ///
    /// # Errors
    ///
    /// When they are not all memory, or of another segment.
    pub fn make_segment(&self, first: Gfn, pages: u32, writable: bool) -> Result<SegmentId, NoSegment> {
        if self.exports.homes == 0 {
            return Err(NoSegment::Closed);
        }
        let end = first.0.checked_add(pages).filter(|end| *end <= self.p2m.pages() && pages > 0);
        let end = end.ok_or(NoSegment::NotMemory { first, pages })?;
        if (first.0..end).any(|gfn| self.p2m.lookup(Gfn(gfn)) == PageState::Device) {
            return Err(NoSegment::NotMemory { first, pages });
        }
        let mut segments = self.exports.segments.lock();
        let overlaps = |other: &&Segment| other.first.0 < end && first.0 < other.first.0 + other.pages;
        if let Some(other) = segments.list.iter().find(overlaps) {
            return Err(NoSegment::Overlaps { first, pages, other: other.id });
        }
        segments.last += 1;
        let id = SegmentId(segments.last);
        segments.list.push(Segment { id, first, pages, writable, closing: false, users: 0 });
        Ok(id)
    }

    /// The first home of the pages from `first` on, if there are any homes.
    pub fn homes_of(&self, first: Gfn) -> Option<Mfn> {
        self.exports.home(first)
    }

    /// Takes a segment from all importers and moves its pages out of their homes, which nobody uses when this returns. Its pages
    /// may be made a segment again after [`Mmu::forget_segment`]. Called with no lock held and nothing mapped, by no vCPU; sleeps.
    ///
    /// # Errors
    ///
    /// When there is no frame for a page, or it is pinned for long: the segment is closed to importers, and the call can be made again.
    pub fn close_segment(&self, id: SegmentId) -> Result<(), NotClosed> {
        pool::assert_none_held();
        let Some(segment) = self.shut(id) else { return Ok(()) };
        let mut naps = 0;
        let pages: Vec<Gfn> = (segment.first.0..segment.first.0 + segment.pages).map(Gfn).collect();
        pages.chunks(BATCH_MAX).for_each(|batch| self.revoke(batch));
        for gfn in pages {
            let Some(home) = self.exports.home(gfn) else { continue };
            // By the frame: a page that somebody else takes away is gone before its home is.
            while self.frames.gfn(home).is_some() {
                let at_home = self.p2m.lookup(gfn) == PageState::Resident(home);
                if at_home && self.move_out(None, gfn)? {
                    continue;
                }
                if naps == CLOSING_NAPS_MAX {
                    return Err(NotClosed::Held { gfn, why: self.held_by(gfn) });
                }
                naps += 1;
                self.buckets.wait(gfn);
                thread::nap();
            }
        }
        Ok(())
    }

    /// Takes these pages, [`BATCH_MAX`] at most and each once, from importers, all of them at once: who is late is waited for once. They
    /// stay in their frames, and may be imported again at once. Called with no lock held and nothing mapped; sleeps.
    pub fn revoke(&self, pages: &[Gfn]) {
        let imported: Vec<Gfn> =
            pages.iter().copied().filter(|gfn| self.is_flagged(*gfn, EXTERNAL)).collect();
        if imported.is_empty() {
            return;
        }
        let closed = self.begin(Cause::Revoke, &imported, &mut Caller::new(None, May::Sleep));
        // Nothing is settled: they stay where they are, and nobody outside has them.
        if let Ok(settling) = closed.and_then(Closed::unmap).and_then(Unmapped::shoot_down) {
            settling.end();
        }
    }

    /// Closes a segment to importers, and waits for those that are at it.
    fn shut(&self, id: SegmentId) -> Option<Segment> {
        loop {
            let mut segments = self.exports.segments.lock();
            let segment = segments.list.iter_mut().find(|segment| segment.id == id)?;
            segment.closing = true;
            if segment.users == 0 {
                return Some(*segment);
            }
            drop(segments);
            thread::nap();
        }
    }

    /// Ends a segment that is closed.
    pub fn forget_segment(&self, id: SegmentId) {
        self.exports.segments.lock().list.retain(|segment| segment.id != id);
    }

    /// Pages that importers have now.
    pub fn imported_pages(&self) -> u32 {
        self.exports.held.load(Ordering::Relaxed)
    }
}

/// Pages.
impl Mmu {
    /// Hands a page of a segment to an importer: it is at home from now on, until the importer is told to give it up with a greater
    /// number than the one returned. Called with no lock held and nothing mapped, by no vCPU; may sleep.
    ///
    /// # Errors
    ///
    /// When the segment does not have it, or it cannot be had.
    pub fn import_page(
        &self,
        importer: ImporterId,
        segment: SegmentId,
        gfn: Gfn,
        write: bool,
    ) -> Result<u64, NotImported> {
        pool::assert_none_held();
        let entered = self.exports.enter(segment).ok_or(NotImported::NoSegment(segment))?;
        let Segment { writable, .. } = entered.segment;
        let home = self.exports.home(gfn).filter(|_| entered.segment.has(gfn));
        let home = home.ok_or(NotImported::Beyond { gfn, segment })?;
        if write && !writable {
            return Err(NotImported::ReadOnly(segment));
        }
        for _ in 0..ROUNDS_MAX {
            let seen = self.buckets.sequence();
            let state = self.p2m.lookup(gfn);
            point();
            match state {
                PageState::Resident(at) if at == home => {
                    if let Some(order) = self.enter_importer(importer, gfn, home, write, seen) {
                        return Ok(order);
                    }
                    self.buckets.wait(gfn);
                }
                PageState::Resident(_) if self.is_flagged(gfn, WATCHED) => break,
                PageState::Resident(_) => {
                    if !self.move_in(gfn, home, writable)? {
                        self.buckets.wait(gfn);
                        thread::yield_now();
                    }
                }
                PageState::Device => return Err(NotImported::Device(gfn)),
                _ => {
                    self.bring_in(None, gfn)?;
                    self.resident(gfn);
                }
            }
        }
        Err(NotImported::Held { gfn, why: self.held_by(gfn) })
    }

    /// Enters an importer for a page that was at home at `seen`; `None` if it may not be any more.
    fn enter_importer(
        &self,
        importer: ImporterId,
        gfn: Gfn,
        home: Mfn,
        write: bool,
        seen: Sequence,
    ) -> Option<u64> {
        let bucket = self.buckets.lock(gfn);
        if !bucket.admits(seen) && self.rules.keep(Rule::GateAtImport) {
            return None;
        }
        self.frames.change_flags(home, 0, EXTERNAL);
        let mut holders = self.exports.holders.lock();
        let list = holders.entry(gfn).or_default();
        self.exports.held.fetch_add(u32::from(list.is_empty()), Ordering::Relaxed);
        match list.iter_mut().find(|holder| holder.importer == importer) {
            Some(holder) => holder.write |= write,
            None => list.push(Holder { importer, write }),
        }
        drop(holders);
        if write {
            self.mark_dirty(&bucket, gfn, home);
        }
        Some(self.exports.advance())
    }

    /// An importer gives a page up of itself. Nobody else need know.
    pub fn give_up_page(&self, importer: ImporterId, gfn: Gfn) {
        let Some(home) = self.exports.home(gfn) else { return };
        let _bucket = self.buckets.lock(gfn);
        let mut holders = self.exports.holders.lock();
        let Some(list) = holders.get_mut(&gfn) else { return };
        let Some(at) = list.iter().position(|holder| holder.importer == importer) else { return };
        let holder = list.swap_remove(at);
        if list.is_empty() {
            holders.remove(&gfn);
            self.exports.held.fetch_sub(1, Ordering::Relaxed);
            self.frames.change_flags(home, EXTERNAL, 0);
        }
        drop(holders);
        self.tell_written(home, holder);
    }

    /// An importer is no more.
    pub fn forget_importer(&self, importer: ImporterId) {
        let holders = self.exports.holders.lock();
        let has = |list: &[Holder]| list.iter().any(|holder| holder.importer == importer);
        let held: Vec<Gfn> = holders.iter().filter(|(_, list)| has(list)).map(|(gfn, _)| *gfn).collect();
        drop(holders);
        held.into_iter().for_each(|gfn| self.give_up_page(importer, gfn));
    }

    /// Takes the importers off a page that is being taken away, for [`External::tell`]. Caller holds its bucket and has claimed it.
    pub(crate) fn take_importers(&self, gfn: Gfn, mfn: Mfn) -> impl Iterator<Item = ImporterId> {
        self.frames.change_flags(mfn, EXTERNAL, 0);
        let holders = self.exports.take_holders(gfn);
        holders.iter().for_each(|holder| self.tell_written(mfn, *holder));
        holders.into_iter().map(|holder| holder.importer)
    }

    /// What an importer may have written: code that was decoded there is stale.
    fn tell_written(&self, mfn: Mfn, holder: Holder) {
        if holder.write {
            fence(Ordering::SeqCst);
            self.frames.code_written(mfn);
        }
    }

    /// The importers of a page, for explanations and the audit.
    pub fn importers_of(&self, gfn: Gfn) -> Vec<ImporterId> {
        let holders = self.exports.holders.lock();
        holders.get(&gfn).into_iter().flatten().map(|holder| holder.importer).collect()
    }

    /// Where a page is, as whoever may import it is told.
    pub fn page_report(&self, gfn: Gfn) -> PageReport {
        let (kind, mfn) = match self.p2m.lookup(gfn) {
            PageState::Zero => (0, None),
            PageState::Resident(mfn) => (1, Some(mfn)),
            PageState::Swapped(_) => (2, None),
            PageState::Ballooned => (3, None),
            PageState::Device => (4, None),
            PageState::Moving => (5, None),
        };
        let flags = mfn.map_or(0, |mfn| self.frames.flags(mfn));
        PageReport {
            kind,
            dirty: flags & DIRTY != 0,
            home: mfn.is_some_and(|mfn| self.frames.is_home(mfn)),
            imported: flags & EXTERNAL != 0,
        }
    }

    /// Pages with an importer, for the audit.
    pub(crate) fn all_imported(&self) -> Vec<Gfn> {
        self.exports.holders.lock().keys().copied().collect()
    }
}

/// Moves.
impl Mmu {
    /// Moves a page to its home: true if it did. False where it cannot be had just now.
    fn move_in(&self, gfn: Gfn, home: Mfn, writable: bool) -> Result<bool, Shortage> {
        self.make_room(None, gfn)?;
        if !self.frames.claim(home, gfn, self.draw()) {
            return Ok(false);
        }
        if writable {
            self.frames.change_flags(home, 0, FOREIGN);
        }
        Ok(self.move_page(Cause::Import, None, gfn, home))
    }

    /// Moves a page out of its home, if it is there: true if it did. `own` is the caller's vCPU, which is outside.
    pub(crate) fn move_out(&self, own: Option<u32>, gfn: Gfn) -> Result<bool, Shortage> {
        self.make_room(own, gfn)?;
        let Some(fresh) = self.frames.allocate_for_move(gfn, self.draw()) else { return Ok(false) };
        if fresh.low {
            self.background.want();
        }
        Ok(self.move_page(Cause::Revoke, own, gfn, fresh.mfn))
    }

    fn draw(&self) -> Draw {
        if MemAlloc::is_entered() { Draw::Reserve } else { Draw::Ordinary }
    }

    /// Moves a page to `to`, which the caller has taken for it, and which is free again where it cannot be moved.
    fn move_page(&self, cause: Cause, own: Option<u32>, gfn: Gfn, to: Mfn) -> bool {
        if self.is_flagged(gfn, SHADOWED | UPPER | UNSYNC) {
            self.unshadow(gfn);
        }
        let mut moved = false;
        let closed = self.begin(cause, &[gfn], &mut Caller::new(own, May::Sleep));
        if let Ok(mut settling) = closed.and_then(Closed::unmap).and_then(Unmapped::shoot_down) {
            settling.settle(|page| {
                // Somebody else may have moved it there.
                moved = page.mfn != to && (self.frames.is_home(page.mfn) != self.frames.is_home(to));
                moved.then(|| {
                    self.copy_page(page, to);
                    Settled::Moved(to)
                })
            });
            settling.end();
        }
        if !moved {
            self.frames.release_for_move(&[to]);
        }
        moved
    }

    /// Makes `to` the frame of a page that nobody can reach, all but in the p2m. What swap has of it is not kept.
    pub(crate) fn copy_page(&self, page: &Held, to: Mfn) {
        let mut bytes = [0; crate::PAGE_SIZE as usize];
        self.windows.with_frame(page.mfn, |memory, at| memory.read(at.at(0), &mut bytes));
        self.windows.with_frame(to, |memory, at| memory.write(at.at(0), &bytes));
        if self.frames.flags(page.mfn) & DIRTY != 0 || page.copy.is_some() {
            self.frames.change_flags(to, 0, DIRTY);
        }
        page.copy.into_iter().for_each(|slot| self.swap.abandon(slot));
        self.lru_add(page.gfn, to);
    }

    /// Takes the memory of homes away from everybody: they are zeros from here on, for importers too. May sleep.
    pub(crate) fn fence_homes(&self, frames: &[Mfn]) {
        if !(self.frames.has_homes() && self.rules.keep(Rule::FenceHomes)) {
            return;
        }
        let homes: Vec<Mfn> = frames.iter().copied().filter(|mfn| self.frames.is_home(*mfn)).collect();
        if homes.is_empty() {
            return;
        }
        if let Err(error) = self.host.give_back(&homes) {
            log::error!("the host does not take back what importers had: {error}; it is cleared instead");
            homes.iter().for_each(|mfn| self.windows.with_frame(*mfn, crate::Machine::clear));
        }
    }

    /// The page must not stay in its home, where an importer could write to it unseen, and somebody wants to see that.
    pub(crate) fn is_foreign(&self, mfn: Mfn) -> bool {
        self.frames.flags(mfn) & FOREIGN != 0
    }

    /// The page has a frame with one of these flags now.
    pub(crate) fn is_flagged(&self, gfn: Gfn, flags: u32) -> bool {
        match self.p2m.lookup(gfn) {
            PageState::Resident(mfn) => self.frames.flags(mfn) & flags != 0,
            _ => false,
        }
    }

    /// Why a page is where it is.
    pub(crate) fn held_by(&self, gfn: Gfn) -> &'static str {
        match self.p2m.lookup(gfn) {
            PageState::Resident(mfn) if self.frames.flags(mfn) & WATCHED != 0 => {
                "a descriptor table of the guest, watched"
            }
            PageState::Resident(mfn) if self.frames.pins(mfn) != 0 => "pinned by a window",
            PageState::Resident(_) => "in use as a page table, or has been touched again",
            _ => "on its way to or from swap",
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
#[path = "external_tests.rs"]
mod tests;

#[cfg(all(test, loom))]
#[path = "interleave/external.rs"]
mod interleave;
