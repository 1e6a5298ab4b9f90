//! Invalidation: the one road by which a guest page loses its frame.
//!
//! Story: reclaim, balloon, discard and budget cuts all walk it, one batch of pages at a time:
//!
//! ```text
//! begin       close the gates: no spte of these pages can be made from here on
//! unmap       bucket by bucket: Resident -> Moving, every spte zapped. A pinned page goes back: the caller has less
//! shootdown   no vCPU can use what was zapped, now or earlier (TLB debt)
//! external    importers are all told before the shootdown, and all awaited after it (see external)
//! finish      the ledger is asked, once more; the page is settled: swapped, zero, ballooned, or put back
//! end         open the gates, wake who sleeps at them
//! ```
//!
//! The order is the types' business: `Closed` becomes `Unmapped` becomes `Settling`. Dropping any of them puts
//! back what is not settled and opens the gates.
//!
//! Why a gate, and why the check of it stands in bucket(gfn):
//!
//! ```text
//! vCPU (fill)                       reclaim
//! gate is open: good
//!                                   begin, unmap: no spte, nothing to zap; vCPU outside: counts as flushed
//!                                   finish: frame freed
//! store spte, link                                                         -> an spte to a freed frame
//! ```
//!
//! A page that becomes a shadowed table, or is watched, loses only the right to be written: that is an invalidation of
//! another kind, whose gate is the mark on the frame (`Mmu::shoot_down_protected`).
//!
//! Holds: INV-COH-1 (coherence). INV-GATE-1 (bucket). INV-P2M-3, a page is `Moving` only while an invalidation or a swap-in
//! holds its gate closed. INV-WAIT-1, an invalidation for reclaim waits for nobody but vCPUs: pages that are pinned,
//! gated or asked for by somebody who starves are left alone.
//!
//! Locks: bucket(gfn), one at a time. The caller holds none, no window, and no other invalidation: it sleeps.
//!
//! See: design notes of KVM's mmu_notifier sequence; the 2008 XPmem thread on sleeping notifiers.

use smallvec::SmallVec;

use crate::Mmu;
use crate::addr::{Gfn, Mfn};
use crate::external::ImporterId;
use crate::frames::{EXTERNAL, SHADOWED, UNSYNC, UPPER, WATCHED};
use crate::lock_order;
use crate::p2m::{PageState, Range, Ticket};
use crate::records::{Cause, Record};
use crate::rules::Rule;
use crate::shadow::leaf::Protected;
use crate::spte::Spte;
use crate::swap::SwapSlot;
use crate::sync::{Ordering, spin_until, thread};

/// The most pages of one invalidation.
pub const BATCH_MAX: usize = 512;

/// Pages, of which there is often one: a few need no memory of their own.
pub(crate) type Few<T> = SmallVec<[T; 4]>;

/// How often the gates of starving fills are left open, for one [`Caller`], before they are closed all the same: their vCPUs
/// may have stopped. A vCPU that has lost its CPU to other work has it again in a fraction of the time that these take, about 0.3 s.
const NAPS_MAX: u32 = 2000;
/// Instead of the first of every so many of them, vCPUs are made to leave the guest.
const NAPS_A_KICK: u32 = 8;

/// A page in the hands of an invalidation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub gfn: Gfn,
    pub mfn: Mfn,
    /// A good copy of it in swap.
    pub copy: Option<SwapSlot>,
}

/// What becomes of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// It is in swap.
    Swapped(SwapSlot),
    /// It reads as zeros.
    Zero,
    /// The guest has given it up.
    Ballooned,
    /// It is in this frame, which the caller has made ready.
    Moved(Mfn),
}

/// A caller that may not sleep would have had to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a vCPU that runs guest code, a fill that starves, an importer, a write to swap, or somebody who has a page in hand would \
     have to be waited for, and the caller may not sleep"
)]
pub struct WouldBlock;

/// Whether a caller may wait for vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum May {
    /// It may.
    Sleep,
    /// It may not, and takes [`WouldBlock`] for an answer.
    NotSleep,
}

/// On whose behalf pages are taken, by one invalidation or several.
#[derive(Debug)]
pub(crate) struct Caller {
    /// Its vCPU, which is outside.
    own: Option<u32>,
    may: May,
    /// How often it may still leave a gate open for a starving fill.
    naps: u32,
    /// It gathers a range, and takes pages of it only while this stands.
    ticket: Option<Ticket>,
}

impl Caller {
    pub fn new(own: Option<u32>, may: May) -> Caller {
        Caller { own, may, naps: NAPS_MAX, ticket: None }
    }

    /// Who gathers a range: a thread that is no vCPU's.
    pub fn collapsing(ticket: Ticket) -> Caller {
        Caller { ticket: Some(ticket), ..Caller::new(None, May::Sleep) }
    }

    pub fn may_sleep(&self) -> bool {
        self.may == May::Sleep
    }
}

/// Gates closed, pages held, time measured: what every stage has, in one place from the first to the last. Dropped, it undoes what
/// is not done.
struct Hold<'m> {
    mmu: &'m Mmu,
    own: Option<u32>,
    may: May,
    ticket: Option<Ticket>,
    gates: Few<Gfn>,
    held: Few<Held>,
    /// Frames of pages that are settled.
    freed: Few<Mfn>,
    /// Those whose pages have another.
    vacated: Vec<Mfn>,
    /// The host has taken these very frames away from all vCPUs: what the ledger says of other frames is no matter.
    notified: bool,
    /// Who had which of them outside.
    importers: Vec<(ImporterId, Gfn)>,
    /// Clock of the last removal of an spte to a held page.
    stamp: u64,
    record: Record,
    began: u64,
    lap: u64,
}

/// Gates are closed.
#[must_use]
pub(crate) struct Closed<'m>(Box<Hold<'m>>);

/// Nothing maps the pages any more, but a TLB may.
#[must_use]
pub(crate) struct Unmapped<'m>(Box<Hold<'m>>);

/// Nobody can reach them.
#[must_use]
pub(crate) struct Settling<'m>(Box<Hold<'m>>);

impl Mmu {
    /// Begins the invalidation of `gfns` (at most [`BATCH_MAX`], each once). A cause that can do without a page leaves it to
    /// a fill that starves; one that must have it waits until the fill is fed, which takes one walk, a fill with the gate
    /// open, and a stretch of guest code, or until the caller's patience is at an end.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`] where it would have to wait so, and may not.
    pub(crate) fn begin(
        &self,
        cause: Cause,
        gfns: &[Gfn],
        caller: &mut Caller,
    ) -> Result<Closed<'_>, WouldBlock> {
        if caller.may_sleep() {
            lock_order::assert_may_sleep();
        }
        debug_assert!(gfns.len() <= BATCH_MAX, "{} pages in one invalidation", gfns.len());
        let began = self.clock.now();
        let mut gates = Few::with_capacity(gfns.len());
        for gfn in gfns {
            if !cause.may_skip() {
                self.stand_back(*gfn, caller)?;
            } else if self.buckets.is_starving(*gfn) || self.buckets.is_closed(*gfn) {
                continue;
            }
            gates.push(*gfn);
        }
        self.buckets.close_all(&gates);
        let mut hold = Box::new(Hold {
            mmu: self,
            own: caller.own,
            may: caller.may,
            ticket: caller.ticket,
            held: Few::with_capacity(gates.len()),
            freed: Few::new(),
            vacated: Vec::new(),
            notified: false,
            record: Record { own: caller.own, ..Record::new(cause, gfns) },
            gates,
            importers: Vec::new(),
            stamp: 0,
            began,
            lap: began,
        });
        hold.record.gate = hold.lap();
        Ok(Closed(hold))
    }

    /// The shootdown of an invalidation of kind [`crate::records::Kind::WriteProtect`]. Its gate is the frame's mark, set
    /// under the bucket in which its sptes were protected: no fill makes a writable one after. May sleep.
    pub(crate) fn shoot_down_protected(&self, cause: Cause, protected: &Protected, own: u32) {
        let began = self.clock.now();
        let rule = if cause == Cause::Watch { Rule::ShootdownAtWatch } else { Rule::ShootdownAtTracking };
        let kicked = if self.rules.keep(rule) { self.coherence.shoot_down(Some(own)) } else { 0 };
        self.finish_protected(protected);
        let nanos = self.clock.now() - began;
        let record = Record {
            at: began,
            pages: 1,
            own: Some(own),
            stamp: protected.debt(),
            kicked,
            shootdown: nanos,
            total: nanos,
            ..Record::new(cause, &[protected.gfn()])
        };
        self.records.push(&record);
    }

    /// Waits for a fill that starves, while the caller has patience.
    fn stand_back(&self, gfn: Gfn, caller: &mut Caller) -> Result<(), WouldBlock> {
        let is_starving = || self.buckets.is_starving_beside(caller.own, gfn);
        if caller.may == May::NotSleep {
            return if is_starving() { Err(WouldBlock) } else { Ok(()) };
        }
        while caller.naps > 0 && is_starving() && !spin_until(|| !is_starving()) {
            // A vCPU that runs with the page is fed when it leaves the guest.
            match caller.naps % NAPS_A_KICK {
                0 if self.rules.keep(Rule::KickOfStarving) => self.coherence.kick_out(),
                _ => thread::nap(),
            }
            caller.naps -= 1;
        }
        Ok(())
    }
}

impl<'m> Closed<'m> {
    /// Takes the pages: those that are resident, not pinned, and neither shadowed nor watched.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`] where the caller may not sleep and its own vCPU is not the only one that runs guest code, or an importer has
    /// one of the pages.
    pub fn unmap(self) -> Result<Unmapped<'m>, WouldBlock> {
        let mut hold = self.0;
        let blocked = hold.may == May::NotSleep && hold.mmu.coherence.is_anyone_inside(hold.own);
        if blocked && hold.has_mappings() {
            return Err(WouldBlock);
        }
        let mmu = hold.mmu;
        let removal = mmu.coherence.removal();
        let mut zapped = false;
        let taken = (0..hold.gates.len()).try_for_each(|index| {
            zapped |= hold.take(hold.gates[index])?;
            Ok(())
        });
        let removal = removal.by(Rule::DebtOfUnmap).filter(|_| zapped);
        let stamp = removal.map_or(0, |it| it.stamp_leaves(hold.held.iter().map(|page| page.mfn)));
        hold.stamp = hold.stamp.max(stamp);
        hold.record.pages = hold.held.len() as u32;
        hold.record.unmap = hold.lap();
        taken.map(|()| Unmapped(hold))
    }
}

impl<'m> Unmapped<'m> {
    /// Returns when no vCPU can reach the pages.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`] where the caller may not sleep and a vCPU has not flushed: the pages are put back.
    pub fn shoot_down(self) -> Result<Settling<'m>, WouldBlock> {
        let mut hold = self.0;
        let order = hold.tell_importers();
        if order.is_some() {
            hold.record.tell = hold.lap();
        }
        let ledger = &hold.mmu.coherence;
        hold.record.stamp = hold.stamp;
        if hold.mmu.rules.keep(Rule::ShootdownAtInvalidation) && !ledger.covered(hold.stamp) {
            match hold.may {
                May::Sleep => {
                    (hold.record.kicked, hold.notified) = ledger.shoot_down_frames(hold.own, &hold.held);
                }
                May::NotSleep => {
                    if hold.mmu.rules.keep(Rule::RequestWithoutSleep) {
                        ledger.request_flush_of_all();
                    }
                    if !ledger.covered(hold.stamp) {
                        return Err(WouldBlock);
                    }
                }
            }
        }
        hold.record.shootdown = hold.lap();
        if let Some(order) = order.filter(|_| hold.mmu.rules.keep(Rule::AwaitImporters)) {
            hold.await_importers(order);
        }
        hold.freed.reserve(hold.held.len());
        Ok(Settling(hold))
    }
}

impl Settling<'_> {
    /// Every page asked for that was not left alone from the beginning: their gates are closed.
    pub fn gates(&self) -> &[Gfn] {
        &self.0.gates
    }

    /// The pages that are not settled yet.
    pub fn pages(&self) -> &[Held] {
        &self.0.held
    }

    /// Settles every page for which `what` has an answer: its frame is free. The others are put back at the end.
    ///
    /// # Panics
    ///
    /// INV-COH-1: when the ledger says that a vCPU may still reach a page.
    pub fn settle(&mut self, mut what: impl FnMut(&Held) -> Option<Settled>) {
        let hold = &mut *self.0;
        let (mmu, stamp) = (hold.mmu, hold.stamp);
        let reached = !hold.notified && !mmu.coherence.covered(stamp);
        assert!(!reached, "INV-COH-1: a frame changes hands, removal {stamp} is not covered");
        let (freed, vacated) = (&mut hold.freed, &mut hold.vacated);
        let mut settler = mmu.p2m.settler();
        hold.held.retain(|page| {
            let Some(settled) = what(page) else { return true };
            let state = match settled {
                Settled::Swapped(slot) => PageState::Swapped(slot),
                Settled::Zero => PageState::Zero,
                Settled::Ballooned => PageState::Ballooned,
                Settled::Moved(to) => PageState::Resident(to),
            };
            settler.settle(page.gfn, state);
            if matches!(settled, Settled::Moved(_)) {
                vacated.push(page.mfn)
            } else {
                freed.push(page.mfn)
            }
            false
        });
    }

    /// Frees the frames of what was settled, puts the rest back, opens the gates; returns how many frames are free.
    pub fn end(self) -> u32 {
        let mut hold = self.0;
        let Hold { mmu, freed, vacated, .. } = &*hold;
        if hold.notified {
            freed.iter().chain(vacated).for_each(|mfn| mmu.frames.forgive(*mfn));
        }
        mmu.fence_homes(freed);
        mmu.fence_homes(vacated);
        mmu.lru.remove(freed.iter().chain(vacated).copied());
        mmu.frames.release_all(freed);
        mmu.frames.release_for_move(vacated);
        hold.record.freed = freed.len() as u32;
        hold.record.freed
    }
}

impl Hold<'_> {
    /// Nanoseconds since the last one.
    fn lap(&mut self) -> u64 {
        let now = self.mmu.clock.now();
        now - std::mem::replace(&mut self.lap, now)
    }

    /// Some vCPU may have one of the pages in its TLB.
    fn has_mappings(&self) -> bool {
        self.gates.iter().any(|gfn| {
            let PageState::Resident(mfn) = self.mmu.p2m.lookup(*gfn) else { return false };
            let owed = !self.mmu.coherence.covered(self.mmu.frames.debt(mfn));
            let linked = self.mmu.buckets.lock(*gfn).links_of(*gfn).next().is_some();
            owed || linked || self.mmu.is_mapped_large(*gfn)
        })
    }

    /// Tells everybody who had one of the pages, each once; when by their clock, if there is anybody.
    fn tell_importers(&mut self) -> Option<u64> {
        if self.importers.is_empty() {
            return None;
        }
        lock_order::assert_may_sleep();
        self.importers.sort_unstable();
        let exports = &self.mmu.exports;
        let order = exports.advance();
        for of_one in self.importers.chunk_by(|a, b| a.0 == b.0) {
            let pages: Vec<Gfn> = of_one.iter().map(|(_, gfn)| *gfn).collect();
            if self.mmu.rules.keep(Rule::TellImporters) {
                exports.outside.tell(order, of_one[0].0, &pages);
            }
            self.record.told += 1;
        }
        Some(order)
    }

    /// Returns when nobody who was told has a page any more, or has had its time.
    fn await_importers(&mut self, order: u64) {
        let answers = self.mmu.exports.outside.wait(order);
        (self.record.slowest, self.record.late) = (answers.slowest, answers.late);
        self.record.external = self.lap();
    }

    /// Takes one page, if it can be had: whether an spte was zapped, or [`WouldBlock`] where an importer has it and would have to
    /// be waited for.
    fn take(&mut self, gfn: Gfn) -> Result<bool, WouldBlock> {
        let mmu = self.mmu;
        let mut bucket = mmu.buckets.lock(gfn);
        let PageState::Resident(mfn) = mmu.p2m.lookup(gfn) else { return Ok(false) };
        // Marks and watches change under the bucket alone, and only where the gate is open.
        let flags = mmu.frames.flags(mfn);
        if flags & (SHADOWED | UPPER | UNSYNC | WATCHED) != 0 && mmu.rules.keep(Rule::TablesAtUnmap) {
            self.record.skipped += 1;
            return Ok(false);
        }
        // Not before: one that found the gate open may have been entered since it was closed, and none is after this.
        if self.may == May::NotSleep && flags & EXTERNAL != 0 && mmu.rules.keep(Rule::AskFirst) {
            return Err(WouldBlock);
        }
        // Its range is somebody else's by now, or nobody's.
        if self.ticket.is_some_and(|ticket| mmu.p2m.range(gfn) != Range::Moving(ticket)) {
            self.record.skipped += 1;
            return Ok(false);
        }
        let Some(copy) = mmu.p2m.claim(gfn, PageState::Resident(mfn)) else { return Ok(false) };
        // Claimed, then looked for pins; who pins looks at the page's state after: one sees the other.
        if mmu.pins_of(gfn, mfn) != 0 && mmu.rules.keep(Rule::PinsAtUnmap) {
            mmu.p2m.transition_with(gfn, PageState::Moving, PageState::Resident(mfn), copy);
            self.record.skipped += 1;
            return Ok(false);
        }
        if self.ticket.is_none() && mmu.rules.keep(Rule::SplitAtUnmap) {
            mmu.break_up(gfn);
        }
        let mut zapped = false;
        bucket.unlink_all(gfn, |link| {
            mmu.machine.word64(link.spte()).store(Spte::ABSENT.0, Ordering::Release);
            zapped = true;
        });
        if flags & EXTERNAL != 0 {
            self.importers.extend(mmu.take_importers(gfn, mfn).map(|importer| (importer, gfn)));
        }
        if mmu.rules.keep(Rule::DebtAtUnmap) {
            self.stamp = self.stamp.max(mmu.frames.debt(mfn));
        }
        self.held.push(Held { gfn, mfn, copy });
        Ok(zapped)
    }

    /// Gives back what was not settled: the page stays where it was, with the debt of its zapped sptes.
    fn put_back(&mut self) {
        for page in self.held.drain(..) {
            if self.mmu.rules.keep(Rule::DebtOfPutBack) {
                self.mmu.frames.owe(page.mfn, self.stamp);
            }
            let resident = PageState::Resident(page.mfn);
            let back = self.mmu.p2m.transition_with(page.gfn, PageState::Moving, resident, page.copy);
            debug_assert!(back, "INV-P2M-3: {} was moved by another", page.gfn);
        }
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.put_back();
        self.mmu.buckets.open_all(&self.gates);
        self.record.finish = self.lap();
        self.record.total = self.lap - self.began;
        self.record.at = self.began;
        self.mmu.records.push(&self.record);
    }
}
