//! Reclaim: how frames become free again, and how pages that have none get one back.
//!
//! Story: the background thread is wanted when few frames are left, and goes on until there are enough
//! ([`Mmu::background_round`]). A vCPU that finds none left reclaims for itself ([`Mmu::bring_in`], which also reads a
//! swapped page back). Both take batches of the least recently used frames off the lists and walk the road of every
//! invalidation; what differs from page to page is how it is settled:
//!
//! | the page | becomes | costs |
//! |---|---|---|
//! | never written to | `Zero` | nothing |
//! | read back from swap, and not written to since | `Swapped`, in the slot it has | nothing |
//! | all zeros by now | `Zero` | a look at it |
//! | anything else | `Swapped` | a write, with its neighbours |
//!
//! Jobs: (1) choose victims; (2) settle them; (3) make room; (4) bring a page in; (5) the background's rounds.
//!
//! Holds: INV-SWAP-2, a page's frame is free only after its contents are on the device. INV-WAIT-1 (invalidation).
//!
//! Locks: none held by the caller; every entry here may sleep, but for [`Mmu::page_out_atomic`].
//!
//! See: the wait table in docs/ARCHITECTURE.md.

use std::io;
use std::sync::atomic::Ordering::Relaxed;

use crate::Mmu;
use crate::addr::{Gfn, Mfn, PAGE_SIZE};
use crate::frames::{DIRTY, Draw, EXTERNAL, FrameKind, SHADOWED, UNSYNC, UPPER, WATCHED};
use crate::invalidation::{Caller, Closed, Held, May, Settled, Settling, Unmapped, WouldBlock};
use crate::lock_order;
use crate::lru::List;
use crate::machine::Machine;
use crate::p2m::{PageState, Range};
use crate::pool;
use crate::records::{Cause, GateWait};
use crate::rules::Rule;
use crate::scope::{MemAlloc, NoIo, NoSleep};
use crate::swap::{CLUSTER, READ_AHEAD, SwapSlot};
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Lock, Monitor, Ordering, Wait, thread};

/// Batches of direct reclaim without a frame made free, after which there is none to be had: these, and as many as it takes to look
/// at every page so often. Where all have just been used, the first look only finds that out.
const FRUITLESS_MAX: u32 = 64;
const LOOKS: u32 = 2;
/// How many of them count as one while somebody else has pages in hand.
const PATIENCE: u32 = 1024;
/// Bytes of a page.
const PAGE: usize = PAGE_SIZE as usize;

/// Why a page cannot be had: the end of the run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Shortage {
    /// No frame, and none could be made free.
    #[error(
        "no machine frame is left for guest frame {gfn}: of {budget} frames {available} are free and {inactive} can be \
         reclaimed, swap has {slots_free} of {slots} slots free; give the guest more frames (--frames) or more swap (--swap)"
    )]
    Frames {
        /// The page.
        gfn: Gfn,
        /// The budget.
        budget: u32,
        /// Frames free.
        available: u32,
        /// Frames on the lists.
        inactive: u32,
        /// Slots free.
        slots_free: u32,
        /// Slots there are.
        slots: u32,
    },
    /// The swap device failed. Nothing is lost but what was in it.
    #[error("{0}")]
    Swap(#[from] SwapFailed),
}

/// An operation on the swap device has failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "swap: {what} {pages} pages at slot {} failed: {why}; the guest is stopped before it can see wrong data", slot.0
)]
pub struct SwapFailed {
    /// "reading" or "writing".
    pub what: &'static str,
    /// The first slot.
    pub slot: SwapSlot,
    /// How many pages.
    pub pages: usize,
    /// What the device said.
    pub why: String,
}

/// What reclaim has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReclaimStats {
    /// Frames looked at.
    pub scanned: u64,
    /// Frames made free.
    pub reclaimed: u64,
    /// Pages dropped that swap had a good copy of.
    pub clean_drops: u64,
    /// Pages dropped that were zeros.
    pub zero_drops: u64,
    /// Pages read back because somebody wanted them.
    pub refaults: u64,
    /// Pages read back beside those.
    pub read_ahead: u64,
    /// Times that a vCPU had to reclaim for itself.
    pub direct: u64,
    /// Times that a vCPU slept at the gate of a page that was changing hands.
    pub gate_waits: u64,
    /// Times that a vCPU waited for a page to be brought in: for whoever had it, for swap, or to reclaim for itself.
    pub page_waits: u64,
    /// Guest tables taken out of the shadow to be reclaimed.
    pub unshadowed: u64,
    /// Frames that the host has back.
    pub given_back: u64,
    /// The longest that anybody waited for a page to be brought in, in nanoseconds.
    pub stall_nanos_max: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    scanned: AtomicU64,
    reclaimed: AtomicU64,
    clean_drops: AtomicU64,
    zero_drops: AtomicU64,
    refaults: AtomicU64,
    read_ahead: AtomicU64,
    direct: AtomicU64,
    pub gate_waits: AtomicU64,
    page_waits: AtomicU64,
    unshadowed: AtomicU64,
    given_back: AtomicU64,
    stall_nanos_max: AtomicU64,
}

/// The background's bed.
#[derive(Debug)]
pub(crate) struct Background {
    /// Somebody wants it. Looked at without the lock, so that who takes a frame does not pay for it.
    wanted: AtomicBool,
    stop: Monitor<bool>,
    /// Its batches since the last that freed something.
    fruitless: AtomicU32,
    failed: Lock<Option<SwapFailed>>,
    pub counters: Counters,
}

impl Background {
    pub fn new() -> Background {
        Background {
            wanted: AtomicBool::new(false),
            stop: Monitor::new(lock_order::SLEEPERS, false),
            fruitless: AtomicU32::new(0),
            failed: Lock::new(lock_order::FAILED, None),
            counters: Counters::default(),
        }
    }

    /// Wakes the background thread, if it sleeps.
    pub fn want(&self) {
        if !self.wanted.swap(true, Ordering::SeqCst) {
            drop(self.stop.lock());
            self.stop.notify_all();
        }
    }

    /// Whether its thread has been woken and has not begun; whether swap has failed.
    pub fn state(&self) -> (bool, bool) {
        (self.wanted.load(Ordering::SeqCst), self.failed.lock().is_some())
    }
}

/// (1) Victims.
impl Mmu {
    /// Takes the frames of these very pages, however they are used: those that can be had. Returns how many are free.
    /// `own` is the caller's vCPU, which is outside; nothing is locked or mapped.
    ///
    /// # Errors
    ///
    /// When swap fails: nothing is lost, but the guest must not go on.
    pub fn page_out(&self, own: Option<u32>, pages: &[Gfn]) -> Result<u32, SwapFailed> {
        let _scope = MemAlloc::enter();
        let mut freed = 0;
        for batch in pages.chunks(CLUSTER as usize) {
            let mut batch: Vec<Gfn> =
                batch.iter().copied().filter(|gfn| gfn.0 >= self.config.low_pages).collect();
            batch.sort_unstable();
            batch.dedup();
            batch.iter().for_each(|gfn| self.unshadow(*gfn));
            freed += self.evict_pages(&batch, Cause::PageOut, own)?;
        }
        Ok(freed)
    }

    /// The same without sleep: what needs no write goes, pages of zeros and those that swap has a good copy of. At most
    /// [`crate::invalidation::BATCH_MAX`] pages. Pinned pages are left, as by [`Mmu::page_out`]. The request is counted, by cause
    /// ([`crate::records::Totals::atomic`]).
    ///
    /// # Errors
    ///
    /// [`WouldBlock`] where a vCPU or an importer would have to be waited for: nothing has changed. Also where a page would have to
    /// be written, or is a table that would have to be taken out of the shadow: it stays, and the others have gone.
    pub fn page_out_atomic(&self, own: Option<u32>, pages: &[Gfn]) -> Result<u32, WouldBlock> {
        let _scope = NoSleep::enter();
        let mut batch: Vec<Gfn> =
            pages.iter().copied().filter(|gfn| gfn.0 >= self.config.low_pages).collect();
        batch.sort_unstable();
        batch.dedup();
        let done = self.drop_clean(&batch, own);
        self.records.note_atomic(Cause::PageOut, done.is_err());
        done
    }

    fn drop_clean(&self, batch: &[Gfn], own: Option<u32>) -> Result<u32, WouldBlock> {
        let has_tables = batch.iter().any(|gfn| self.is_flagged(*gfn, SHADOWED | UPPER | UNSYNC));
        let closed = self.begin(Cause::PageOut, batch, &mut Caller::new(own, May::NotSleep))?;
        let mut settling = closed.unmap()?.shoot_down()?;
        self.settle_clean(&mut settling);
        let is_done = settling.pages().is_empty();
        let freed = settling.end();
        // The host hears of the frames from who may sleep.
        self.background.want();
        if is_done && !has_tables { Ok(freed) } else { Err(WouldBlock) }
    }

    /// Takes the frames of up to `want` of the least recently used pages, a batch at most; returns how many are free. `own`
    /// is the caller's vCPU, which is outside; nothing is locked or mapped.
    ///
    /// # Errors
    ///
    /// When swap fails: nothing is lost, but the guest must not go on.
    pub fn reclaim(&self, want: u32, cause: Cause, own: Option<u32>) -> Result<u32, SwapFailed> {
        self.reclaim_from(want, cause, own, Whose::Anybodys).map(|batch| batch.freed)
    }

    /// A batch of direct reclaim, of pages that importers have too or not.
    #[cfg(all(test, not(any(loom, shuttle))))]
    pub(crate) fn reclaim_from_for_test(&self, imported: bool) -> Result<u32, SwapFailed> {
        let whose = if imported { Whose::Anybodys } else { Whose::TheGuests };
        self.reclaim_from(CLUSTER, Cause::DirectReclaim, None, whose).map(|batch| batch.freed)
    }

    fn reclaim_from(
        &self,
        want: u32,
        cause: Cause,
        own: Option<u32>,
        whose: Whose,
    ) -> Result<Batch, SwapFailed> {
        lock_order::assert_may_sleep();
        let _scope = MemAlloc::enter();
        self.age(want);
        let mut isolated = Vec::with_capacity(CLUSTER as usize);
        self.lru.isolate(List::Inactive, want.min(CLUSTER), &mut isolated);
        self.background.counters.scanned.fetch_add(isolated.len() as u64, Relaxed);
        let (mut victims, mut used, mut busy) = (Vec::new(), Vec::new(), Vec::new());
        let mut cleared = false;
        for mfn in isolated {
            let Some(gfn) = self.frames.gfn(mfn) else { continue };
            match self.judge_frame(gfn, mfn, &mut cleared, whose) {
                Verdict::Victim => victims.push((gfn, mfn)),
                Verdict::Used => used.push(mfn),
                Verdict::Busy => busy.push(mfn),
            }
        }
        let in_use = used.len() as u32;
        self.lru.put_back(List::Active, used);
        self.lru.put_back(List::Inactive, busy);
        if cleared {
            self.ask_to_flush_young();
        }
        victims.sort_unstable();
        let gfns: Vec<Gfn> = victims.iter().map(|(gfn, _)| *gfn).collect();
        let freed = self.evict_pages(&gfns, cause, own);
        // Those that were not taken after all are still isolated.
        self.lru.put_back(List::Inactive, victims.into_iter().map(|(_, mfn)| mfn));
        let freed = freed?;
        self.background.counters.reclaimed.fetch_add(u64::from(freed), Relaxed);
        Ok(Batch { freed, used: in_use })
    }

    /// Moves frames from the active to the inactive list while that is the shorter one.
    fn age(&self, want: u32) {
        let (inactive, active) = self.lru.lengths();
        if inactive > active / 2 && inactive >= want {
            return;
        }
        let mut oldest = Vec::with_capacity(CLUSTER as usize);
        self.lru.isolate(List::Active, CLUSTER, &mut oldest);
        let mut cleared = false;
        let (used, idle): (Vec<Mfn>, Vec<Mfn>) = oldest.into_iter().partition(|mfn| {
            self.frames.gfn(*mfn).is_some_and(|gfn| self.clear_young(gfn, *mfn, &mut cleared))
        });
        if cleared {
            self.ask_to_flush_young();
        }
        let only_used = idle.is_empty();
        self.lru.put_back(List::Inactive, idle);
        // Where all are in use, some must go all the same.
        self.lru.put_back(if only_used && inactive < want { List::Inactive } else { List::Active }, used);
    }

    /// An accessed bit comes back only when the TLB has forgotten; nobody waits for that.
    pub(crate) fn ask_to_flush_young(&self) {
        if self.rules.keep(Rule::RequestAfterAging) {
            self.coherence.request_flush_of_all();
        }
    }

    fn judge_frame(&self, gfn: Gfn, mfn: Mfn, cleared: &mut bool, whose: Whose) -> Verdict {
        let flags = self.frames.flags(mfn);
        if whose == Whose::TheGuests && flags & EXTERNAL != 0 {
            return Verdict::Busy;
        }
        if flags & WATCHED != 0 || self.pins_of(gfn, mfn) != 0 || self.buckets.is_closed(gfn) {
            return Verdict::Busy;
        }
        // Whoever gathers it gives up before frames are short, once it gets to run.
        if matches!(self.p2m.range(gfn), Range::Moving(_)) {
            return Verdict::Busy;
        }
        if self.clear_young(gfn, mfn, cleared) {
            return Verdict::Used;
        }
        if flags & SHADOWED != 0 {
            if self.is_table_in_use(gfn) {
                return Verdict::Used;
            }
            self.unshadow(gfn);
            self.background.counters.unshadowed.fetch_add(1, Relaxed);
        }
        Verdict::Victim
    }

    /// Was the page used since this was last asked? Clears the accessed bits of its sptes.
    pub(crate) fn clear_young(&self, gfn: Gfn, mfn: Mfn, cleared: &mut bool) -> bool {
        let bucket = self.buckets.lock(gfn);
        if self.p2m.lookup(gfn) != PageState::Resident(mfn) {
            return false;
        }
        let mut young = false;
        for link in bucket.links_of(gfn) {
            if self.spte(link.spte()).is_accessed() {
                self.clear_accessed(link.spte());
                young = true;
            }
        }
        *cleared |= young;
        self.clear_young_large(gfn, cleared) || young
    }
}

/// What a batch came to.
struct Batch {
    /// Frames made free.
    freed: u32,
    /// Pages that were in use, and are left alone for now.
    used: u32,
}

/// Which pages are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Anybodys,
    /// Those that no importer has: nobody outside is waited for.
    TheGuests,
}

enum Verdict {
    Victim,
    Used,
    Busy,
}

/// (2) Settled.
impl Mmu {
    /// Takes the frames of those of `gfns` that can be had; returns how many are free. Pages that importers have go apart: whoever
    /// wants one of the others does not wait for an importer.
    fn evict_pages(&self, gfns: &[Gfn], cause: Cause, own: Option<u32>) -> Result<u32, SwapFailed> {
        if !self.exports.is_any_held() {
            return self.evict_batch(gfns, cause, own);
        }
        let (imported, others): (Vec<Gfn>, Vec<Gfn>) =
            gfns.iter().partition(|gfn| self.is_flagged(**gfn, EXTERNAL));
        let freed = self.evict_batch(&others, cause, own)?;
        Ok(freed + self.evict_batch(&imported, cause, own)?)
    }

    fn evict_batch(&self, gfns: &[Gfn], cause: Cause, own: Option<u32>) -> Result<u32, SwapFailed> {
        if gfns.is_empty() {
            return Ok(0);
        }
        let closed = self.begin(cause, gfns, &mut Caller::new(own, May::Sleep));
        let Ok(mut settling) = closed.and_then(Closed::unmap).and_then(Unmapped::shoot_down) else {
            return Ok(0);
        };
        self.settle_clean(&mut settling);
        let may_write = !(NoIo::is_entered() && self.rules.keep(Rule::NoIoInScope));
        let written = if may_write { self.write_out(&mut settling) } else { Ok(()) };
        let freed = settling.end();
        written.map(|()| freed)
    }

    /// Settles what needs no write: pages of zeros, and those that swap has a good copy of.
    fn settle_clean(&self, settling: &mut Settling<'_>) {
        let counters = &self.background.counters;
        let (mut clean, mut zero) = (0, 0);
        settling.settle(|page| match page.copy {
            _ if self.frames.flags(page.mfn) & DIRTY != 0 => {
                let empty = self.windows.with_frame(page.mfn, Machine::is_zero);
                zero += u64::from(empty);
                empty.then_some(Settled::Zero)
            }
            Some(slot) => {
                clean += 1;
                Some(Settled::Swapped(slot))
            }
            None => {
                zero += 1;
                Some(Settled::Zero)
            }
        });
        counters.clean_drops.fetch_add(clean, Relaxed);
        counters.zero_drops.fetch_add(zero, Relaxed);
    }

    /// Writes what is left to swap, in runs of adjacent slots. Where swap is full the rest stays.
    fn write_out(&self, settling: &mut Settling<'_>) -> Result<(), SwapFailed> {
        self.swap.discard_abandoned();
        let pages: Vec<Held> = settling.pages().to_vec();
        let gfns: Vec<Gfn> = pages.iter().map(|page| page.gfn).collect();
        let mut buffer = Vec::new();
        let mut done = 0;
        while done < pages.len() {
            let most = if self.rules.keep(Rule::WriteTogether) { pages.len() - done } else { 1 };
            let Some(run) = self.swap.take_run(&gfns[done..done + most]) else { return Ok(()) };
            let batch = &pages[done..done + run.len()];
            buffer.resize(run.len() * PAGE, 0);
            for (page, bytes) in batch.iter().zip(buffer.chunks_exact_mut(PAGE)) {
                self.windows.with_frame(page.mfn, |memory, at| memory.read(at.at(0), bytes));
            }
            let first = SwapSlot(run.start);
            if let Err(error) = self.swap.write(first, &buffer) {
                self.swap.free(run);
                return Err(self.fail("writing", first, batch.len(), &error));
            }
            settling.settle(|page| {
                let at = batch.iter().position(|written| written.gfn == page.gfn)?;
                Some(Settled::Swapped(SwapSlot(first.0 + at as u32)))
            });
            done += run.len();
        }
        Ok(())
    }

    /// Notes that swap has failed, for the background's owner.
    fn fail(&self, what: &'static str, slot: SwapSlot, pages: usize, error: &io::Error) -> SwapFailed {
        let failed = SwapFailed { what, slot, pages, why: error.to_string() };
        self.background.failed.lock().get_or_insert_with(|| failed.clone());
        failed
    }
}

/// (3) Room.
impl Mmu {
    /// Returns when an ordinary taker can have a frame for `gfn`, having made some free if need be: true if so.
    pub(crate) fn make_room(&self, own: Option<u32>, gfn: Gfn) -> Result<bool, Shortage> {
        let mut fruitless = 0;
        let mut waited = false;
        let (inactive, active) = self.lru.lengths();
        let batches = FRUITLESS_MAX + LOOKS * (inactive + active).div_ceil(CLUSTER);
        loop {
            let counts = self.frames.counts();
            if counts.available > counts.marks.reserve || (MemAlloc::is_entered() && counts.available > 0) {
                return Ok(waited);
            }
            self.background.want();
            // Devices wait as well: what is counted is vCPUs that could not run.
            if !waited && own.is_some() {
                self.background.counters.direct.fetch_add(1, Relaxed);
            }
            waited = true;
            // An importer may take its time: it is for the background to wait for it, as long as there is anything else.
            let desperate = fruitless >= FRUITLESS_MAX / 2 * PATIENCE;
            let whose = if desperate { Whose::Anybodys } else { Whose::TheGuests };
            let batch = self.reclaim_from(CLUSTER, Cause::DirectReclaim, own, whose)?;
            let freed = self.freed_with_tables(batch.freed, own);
            if counts.backed > counts.budget || self.frames.has_strays() {
                self.trim();
            }
            // What others have in hand may come free, and they may have lost their CPU for a while.
            let in_hand = self.buckets.is_any_closed() || self.collapses.is_gathering();
            let weight = if in_hand { 1 } else { PATIENCE };
            fruitless = if freed > 0 { 0 } else { fruitless + weight };
            if fruitless >= batches.saturating_mul(PATIENCE) {
                return Err(self.shortage(gfn));
            }
            if freed == 0 {
                thread::yield_now();
            }
        }
    }

    /// Frames free, of pages and of tables: of those over their limit, and, where there are no others, of one that shadows nothing.
    fn freed_with_tables(&self, of_pages: u32, own: Option<u32>) -> u32 {
        let freed = of_pages + self.shrink_shadow(own);
        if freed > 0 { freed } else { u32::from(self.give_back_dead(own)) }
    }

    fn shortage(&self, gfn: Gfn) -> Shortage {
        let (counts, swap, lists) = (self.frames.counts(), self.swap.stats(), self.lru.lengths());
        Shortage::Frames {
            gfn,
            budget: counts.budget,
            available: counts.available,
            inactive: lists.0 + lists.1,
            slots_free: swap.slots - swap.slots_used,
            slots: swap.slots,
        }
    }
}

/// (4) In again.
impl Mmu {
    /// Sees to it that `gfn` can be made resident: what [`crate::Outcome::Need`] and its kin ask for. The caller tries
    /// again after. Called with no lock held and nothing mapped, by a vCPU (`own`) that is outside or by another thread;
    /// may sleep.
    ///
    /// # Errors
    ///
    /// When no frame can be made free, or swap fails: the guest cannot go on.
    pub fn bring_in(&self, own: Option<u32>, gfn: Gfn) -> Result<(), Shortage> {
        pool::assert_none_held();
        let began = self.clock.now();
        let done = self.try_bring_in(own, gfn);
        let counters = &self.background.counters;
        counters.stall_nanos_max.fetch_max(self.clock.now() - began, Relaxed);
        let waited = done?;
        counters.page_waits.fetch_add(u64::from(waited && own.is_some()), Relaxed);
        Ok(())
    }

    /// True if something was waited for.
    fn try_bring_in(&self, own: Option<u32>, gfn: Gfn) -> Result<bool, Shortage> {
        let mut waited = false;
        loop {
            match self.p2m.lookup(gfn) {
                PageState::Moving => {
                    waited = true;
                    self.wait_while_moving_for(own, gfn);
                }
                PageState::Swapped(slot) => {
                    waited = true;
                    self.make_room(own, gfn)?;
                    if self.swap_in(gfn, slot)? {
                        return Ok(true);
                    }
                }
                PageState::Ballooned => {
                    self.p2m.transition(gfn, PageState::Ballooned, PageState::Zero);
                }
                // Somebody wants to see stores to it, and importers' are not seen.
                PageState::Resident(mfn) if self.is_foreign(mfn) => {
                    return Ok(self.move_out(own, gfn)? || waited);
                }
                PageState::Zero | PageState::Resident(_) => return Ok(self.make_room(own, gfn)? || waited),
                PageState::Device => return Ok(waited),
            }
        }
    }

    /// Sleeps at the gate of a page that is on its way. Only a vCPU's sleep is recorded.
    fn wait_while_moving_for(&self, own: Option<u32>, gfn: Gfn) {
        let at = self.clock.now();
        let has_slept = self.buckets.wait(gfn);
        if let Some(vcpu) = own.filter(|_| has_slept) {
            self.records.push_wait(GateWait { vcpu, gfn, at, nanos: self.clock.now() - at });
        }
    }

    /// Reads a page back, and its neighbours in the cluster where frames are plenty. False when the page was not there
    /// any more, or no frame was left after all: look again.
    fn swap_in(&self, gfn: Gfn, slot: SwapSlot) -> Result<bool, SwapFailed> {
        let counts = self.frames.counts();
        let plenty = counts.available > counts.marks.reserve + READ_AHEAD;
        let around = if plenty { self.swap.neighbours(slot) } else { vec![(slot, gfn)] };
        let gates: Vec<Gfn> = around.iter().map(|(_, gfn)| *gfn).collect();
        self.buckets.close_all(&gates);
        let mut claimed = Vec::with_capacity(around.len());
        for (slot, gfn) in around {
            if let Some(frame) = self.claim_for_swap_in(gfn, slot) {
                claimed.push((slot, gfn, frame));
            }
        }
        let read = match claimed.iter().position(|(_, other, _)| *other == gfn) {
            Some(at) => self.read_claimed(&claimed).map(|()| Some(at)),
            None => Ok(None),
        };
        let (wanted, read) = match read {
            Ok(wanted) => (wanted.is_some(), Ok(wanted.is_some())),
            Err(error) => (false, Err(error)),
        };
        for (slot, other, mfn) in &claimed {
            self.finish_swap_in(*slot, *other, *mfn, wanted);
        }
        if !self.rules.keep(Rule::OpenBeforeWait) {
            self.buckets.wait(gfn);
        }
        self.buckets.open_all(&gates);
        if wanted {
            self.background.counters.refaults.fetch_add(1, Relaxed);
            self.background.counters.read_ahead.fetch_add(claimed.len() as u64 - 1, Relaxed);
        }
        read
    }

    /// A frame for a swapped page that is ours now.
    fn claim_for_swap_in(&self, gfn: Gfn, slot: SwapSlot) -> Option<Mfn> {
        if self.p2m.lookup(gfn) != PageState::Swapped(slot) {
            return None;
        }
        let draw = if MemAlloc::is_entered() { Draw::Reserve } else { Draw::Ordinary };
        let fresh = self.frames.allocate(FrameKind::Guest(gfn), draw)?;
        if fresh.low {
            self.background.want();
        }
        if self.p2m.claim(gfn, PageState::Swapped(slot)).is_none() {
            self.frames.release(fresh.mfn);
            return None;
        }
        Some(fresh.mfn)
    }

    /// Reads the claimed pages, those of adjacent slots at once.
    fn read_claimed(&self, claimed: &[(SwapSlot, Gfn, Mfn)]) -> Result<(), SwapFailed> {
        let mut buffer = Vec::new();
        for run in claimed.chunk_by(|a, b| a.0.0 + 1 == b.0.0) {
            buffer.resize(run.len() * PAGE, 0);
            let first = run[0].0;
            if let Err(error) = self.swap.read(first, &mut buffer) {
                return Err(self.fail("reading", first, run.len(), &error));
            }
            for ((_, _, mfn), bytes) in run.iter().zip(buffer.chunks_exact(PAGE)) {
                self.windows.with_frame(*mfn, |memory, at| memory.write(at.at(0), bytes));
            }
        }
        Ok(())
    }

    /// The page is resident, with its copy; or stays swapped where it could not be read.
    fn finish_swap_in(&self, slot: SwapSlot, gfn: Gfn, mfn: Mfn, good: bool) {
        if good {
            self.lru_add(gfn, mfn);
            self.p2m.transition_with(gfn, PageState::Moving, PageState::Resident(mfn), Some(slot));
        } else {
            self.p2m.transition(gfn, PageState::Moving, PageState::Swapped(slot));
            self.frames.release(mfn);
        }
    }

    /// Enters a frame that has just got a page into the lists. Low memory stays out of them.
    pub(crate) fn lru_add(&self, gfn: Gfn, mfn: Mfn) {
        if gfn.0 >= self.config.low_pages {
            self.lru.add(mfn);
        }
    }
}

/// (5) The background.
impl Mmu {
    /// One batch of background reclaim; true while there is more to do that it could do. The thread that calls this is
    /// no vCPU's.
    ///
    /// # Errors
    ///
    /// When swap has failed, here or on a vCPU's thread: the guest must not go on.
    pub fn background_round(&self) -> Result<bool, SwapFailed> {
        if let Some(failed) = self.background.failed.lock().clone() {
            return Err(failed);
        }
        if self.frames.has_strays() {
            self.trim();
        }
        let counts = self.frames.counts();
        let over = counts.backed.saturating_sub(counts.budget);
        let short = counts.available < counts.marks.high;
        let fruitless = &self.background.fruitless;
        let mut goes_on = false;
        if over > 0 || short {
            let batch = self.reclaim_from(CLUSTER, Cause::Reclaim, None, Whose::Anybodys)?;
            let freed = self.freed_with_tables(batch.freed, None);
            let (inactive, active) = self.lru.lengths();
            let looks = LOOKS * (inactive + active).div_ceil(CLUSTER);
            // What was in use when it was looked at may be idle when it is looked at again.
            goes_on = freed > 0 || batch.used > 0 && fruitless.fetch_add(1, Relaxed) < looks;
            if freed > 0 || !goes_on {
                fruitless.store(0, Relaxed);
            }
        }
        self.give_back();
        Ok(goes_on)
    }

    /// The host backs more frames than the budget has: background reclaim may have found all pages in use, and is to look again.
    pub fn is_over_budget(&self) -> bool {
        let counts = self.frames.counts();
        counts.backed > counts.budget
    }

    /// Gives up what others have left to whoever may sleep: swap slots that nobody wants, frames that are free in numbers.
    pub(crate) fn give_back(&self) {
        self.swap.discard_abandoned();
        self.trim();
    }

    /// Gives the host back what is free in numbers.
    pub(crate) fn trim(&self) {
        match self.frames.trim(&*self.host) {
            Ok(given) => {
                self.background.counters.given_back.fetch_add(u64::from(given), Relaxed);
            }
            Err(error) => log::warn!("the host does not take frames back: {error}"),
        }
    }

    /// Has background reclaim look again.
    pub fn want_background(&self) {
        self.background.want();
    }

    /// Sleeps until background reclaim is wanted; false when it is to stop ([`Mmu::stop_background`]).
    pub fn wait_for_background_work(&self) -> bool {
        let mut stop = self.background.stop.lock();
        loop {
            if *stop {
                return false;
            }
            if self.background.wanted.swap(false, Ordering::SeqCst) {
                return true;
            }
            stop = stop.wait(Wait::idle("work"));
        }
    }

    /// Ends [`Mmu::wait_for_background_work`], now and from now on.
    pub fn stop_background(&self) {
        *self.background.stop.lock() = true;
        self.background.stop.notify_all();
    }

    /// What reclaim has done so far.
    pub fn reclaim_stats(&self) -> ReclaimStats {
        let c = &self.background.counters;
        ReclaimStats {
            scanned: c.scanned.load(Relaxed),
            reclaimed: c.reclaimed.load(Relaxed),
            clean_drops: c.clean_drops.load(Relaxed),
            zero_drops: c.zero_drops.load(Relaxed),
            refaults: c.refaults.load(Relaxed),
            read_ahead: c.read_ahead.load(Relaxed),
            direct: c.direct.load(Relaxed),
            gate_waits: c.gate_waits.load(Relaxed),
            page_waits: c.page_waits.load(Relaxed),
            unshadowed: c.unshadowed.load(Relaxed),
            given_back: c.given_back.load(Relaxed),
            stall_nanos_max: c.stall_nanos_max.load(Relaxed),
        }
    }
}
