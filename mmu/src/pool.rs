//! The persistent pool: window mappings that outlive a call, and may be passed from thread to thread.
//!
//! Story: a device keeps a page in place while a request is under way. There is one pool of slots for all; each mapping of
//! a page counts on the page's slot, and the last to go leaves the slot *idle*: still pinned, so that who wants the page
//! again has it without work. Idle slots are given up together, in a sweep, when a slot is wanted and none is free; and one
//! by one, when somebody wants to take the page away.
//!
//! ```text
//!           first taker                last mapping dropped
//!   free ----------------> taken (n) ------------------------> idle
//!    ^                        ^                                | |
//!    |                        +---------- taken again ---------+ |
//!    +------------- a sweep, or the page's invalidation ---------+
//! ```
//!
//! Who wants several pages together, all or none, takes them one after the other and lets go of all when one cannot be had. Two
//! of that kind could undo each other's work for ever, and so could reclaim. Whoever has lost for a while therefore waits for
//! its turn (`Turn`): one at a time has free slots kept for it, and its pages left alone as those of a starving fill are.
//!
//! Page tables are never reached through here: a walk must not wait for a device.
//!
//! Holds: INV-POOL-1, a slot in use, idle or not, has exactly one pin of its page's frame, and shows it. INV-POOL-2, who
//! sleeps for a slot or for a page holds none, nor a local mapping, nor a lock (debug builds). INV-POOL-3, idle slots block
//! no invalidation. INV-POOL-4, slots are kept for one turn at most.
//!
//! Locks: the pool's own ([`lock_order::SLEEPERS`]), a leaf but for the view's. It is held for a few lookups, and for a sweep.
//!
//! Limits: [`SLOTS`] pages at once. What is written is told to the shadow when the mapping goes, or before
//! ([`PersistentMap::tell`]).

use std::cell::Cell;

use rustc_hash::FxHashMap;
use vm_memory::{VolatileMemoryError, VolatileSlice};

use crate::Mmu;
use crate::addr::{Gfn, Mfn};
use crate::bucket::Asker;
use crate::lock_order;
use crate::p2m::PageState;
use crate::physical::{NotReached, Width};
use crate::sync::{Having, Monitor, MonitorGuard, Thing, Wait, point};
use crate::window::Intent;

/// Slots of a pool: fewer than the frames that the smallest budget leaves to high memory.
pub const SLOTS: u32 = 64;

/// Why a page was not mapped by a caller that does not sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// No memory there: a device or nothing.
    #[error("guest frame {0} is not memory")]
    Device(Gfn),
    /// The page has no frame now: [`Mmu::bring_in`], and again.
    #[error("guest frame {0} is not in memory")]
    Need(Gfn),
    /// Every slot of the pool is taken.
    #[error("all slots of the window's pool are taken")]
    Full,
}

/// What the pool has, and has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowStats {
    /// Slots there are.
    pub slots: u32,
    /// Slots with a mapping now.
    pub taken: u32,
    /// Slots that only wait to be taken again.
    pub idle: u32,
    /// Threads that sleep for a slot.
    pub waiters: u32,
    /// Sweeps so far.
    pub sweeps: u64,
    /// Idle slots given up so far, by sweeps and for invalidations.
    pub swept: u64,
    /// Times so far that somebody slept for a slot.
    pub waits: u64,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    gfn: Gfn,
    mfn: Mfn,
    /// Where in the windows' memory it is seen.
    shown: Mfn,
    mappings: u32,
}

#[derive(Debug)]
struct Slots {
    /// Those in use.
    by_gfn: FxHashMap<Gfn, u32>,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    /// Slots kept for whoever has the turn.
    kept: u32,
    /// Somebody has the turn.
    turn: bool,
    stats: WindowStats,
}

/// The slots of one guest.
#[derive(Debug)]
pub(crate) struct Pool {
    /// How many slots there are.
    pub size: u32,
    slots: Monitor<Slots>,
}

/// What is waited for.
const A_SLOT: &str = "a window slot";

impl Pool {
    pub fn new(size: u32) -> Pool {
        let slots = Slots {
            by_gfn: FxHashMap::default(),
            slots: vec![None; size as usize],
            free: (0..size).collect(),
            kept: 0,
            turn: false,
            stats: WindowStats { slots: size, ..WindowStats::default() },
        };
        Pool { size, slots: Monitor::new(lock_order::SLEEPERS, slots) }
    }

    /// The turn, for who waits for it.
    fn turn(&self) -> Thing {
        Thing::held("the turn", None, self)
    }

    /// Sleeps until it is so.
    fn wait_until(&self, wait: Wait, is_so: impl Fn(&Slots) -> bool) -> MonitorGuard<'_, Slots> {
        let mut slots = self.slots.lock();
        slots.stats.waits += u64::from(!is_so(&slots));
        while !is_so(&slots) {
            slots.stats.waiters += 1;
            slots = slots.wait(wait);
            slots.stats.waiters -= 1;
        }
        slots
    }

    /// The pages that idle slots hold in place, for the audit; and those that mappings do.
    pub fn held(&self) -> Vec<(Gfn, Mfn, u32)> {
        let slots = self.slots.lock();
        slots.slots.iter().flatten().map(|slot| (slot.gfn, slot.mfn, slot.mappings)).collect()
    }
}

impl Slots {
    /// Slots without a mapping.
    fn not_taken(&self) -> u32 {
        self.stats.slots - self.stats.taken
    }

    /// Counts one more slot as taken, by whoever has the turn or by another.
    fn count_taken(&mut self, by: By) -> Result<(), NotTaken> {
        let kept = if by == By::Turn { 0 } else { self.kept };
        if self.not_taken() <= kept {
            return Err(NotTaken::Full);
        }
        self.kept = self.kept.saturating_sub(u32::from(by == By::Turn));
        self.stats.taken += 1;
        Ok(())
    }

    /// One more mapping of a page, if it has a slot.
    fn take_again(&mut self, gfn: Gfn, by: By) -> Result<Option<(u32, Slot)>, NotTaken> {
        let Some(index) = self.by_gfn.get(&gfn).copied() else { return Ok(None) };
        let Some(slot) = self.slots[index as usize] else { return Ok(None) };
        if slot.mappings == 0 {
            self.count_taken(by)?;
            self.stats.idle -= 1;
        }
        let slot = Slot { mappings: slot.mappings + 1, ..slot };
        self.slots[index as usize] = Some(slot);
        Ok(Some((index, slot)))
    }

    /// Frees an idle slot; the caller lets go of what it held ([`Mmu::let_go`]).
    fn give_up(&mut self, index: u32) -> Option<Slot> {
        let slot = self.slots[index as usize].take_if(|slot| slot.mappings == 0)?;
        self.by_gfn.remove(&slot.gfn);
        self.free.push(index);
        self.stats.idle -= 1;
        self.stats.swept += 1;
        Some(slot)
    }
}

impl Mmu {
    /// Maps a page of guest memory through the pool, bringing it in and sleeping for a slot if need be. Called with no
    /// lock held and nothing mapped, neither here nor on a local stack, by a vCPU (`own`) that is outside or by another
    /// thread.
    ///
    /// # Errors
    ///
    /// When it is no memory, or cannot be brought in.
    pub fn take_page(
        &self,
        gfn: Gfn,
        intent: Intent,
        own: Option<u32>,
    ) -> Result<PersistentMap<'_>, NotReached> {
        assert_none_held();
        loop {
            match self.try_take_page(gfn, intent) {
                Ok(map) => return Ok(map),
                Err(NotTaken::Device(gfn)) => return Err(NotReached::Device(gfn.at(0))),
                Err(NotTaken::Need(gfn)) => self.bring_in(own, gfn)?,
                Err(NotTaken::Full) => {
                    drop(self.pool.wait_until(A_SLOT.into(), |slots| slots.not_taken() > slots.kept))
                }
            }
        }
    }

    /// The same, never sleeping.
    ///
    /// # Errors
    ///
    /// When it is no memory, not in memory now, or every slot is taken.
    pub fn try_take_page(&self, gfn: Gfn, intent: Intent) -> Result<PersistentMap<'_>, NotTaken> {
        self.try_take(gfn, intent, By::Anybody)
    }

    fn try_take(&self, gfn: Gfn, intent: Intent, by: By) -> Result<PersistentMap<'_>, NotTaken> {
        // By statements: the lock is let go of before the page is looked for.
        let again = self.pool.slots.lock().take_again(gfn, by)?;
        let (slot, Slot { mfn, shown, .. }) = match again {
            Some(taken) => taken,
            None => self.take_anew(gfn, by)?,
        };
        let map = PersistentMap {
            mmu: self,
            gfn,
            mfn,
            shown,
            slot,
            intent: Cell::new(Intent::Read),
            written: Cell::new(NOTHING),
            holder: holders::Holder::new(),
        };
        if intent == Intent::Write {
            map.make_writable();
        }
        Ok(map)
    }

    fn take_anew(&self, gfn: Gfn, by: By) -> Result<(u32, Slot), NotTaken> {
        let mfn = self.pin_page(gfn).map_err(|state| match state {
            PageState::Device => NotTaken::Device(gfn),
            _ => NotTaken::Need(gfn),
        })?;
        let taken = self.give_slot(gfn, mfn, by);
        if taken.is_err() {
            self.frames.unpin(mfn);
        }
        taken
    }

    /// Gives a slot to a page that the caller has pinned.
    fn give_slot(&self, gfn: Gfn, mfn: Mfn, by: By) -> Result<(u32, Slot), NotTaken> {
        let mut slots = self.pool.slots.lock();
        if let Some(taken) = slots.take_again(gfn, by)? {
            // Somebody was faster; the slot has its pin.
            self.frames.unpin(mfn);
            return Ok(taken);
        }
        slots.count_taken(by)?;
        if slots.free.is_empty() {
            self.sweep(&mut slots);
        }
        let index = slots.free.pop().expect("INV-POOL-1: a slot that is not taken is free or was idle");
        let slot = Slot { gfn, mfn, shown: self.windows.show(mfn), mappings: 1 };
        slots.slots[index as usize] = Some(slot);
        slots.by_gfn.insert(gfn, index);
        Ok((index, slot))
    }

    /// Gives all idle slots up.
    fn sweep(&self, slots: &mut MonitorGuard<'_, Slots>) {
        if slots.stats.idle == 0 {
            return;
        }
        slots.stats.sweeps += 1;
        for index in 0..slots.stats.slots {
            slots.give_up(index).iter().for_each(|slot| self.let_go(slot));
        }
    }

    /// Lets go of what an idle slot held.
    fn let_go(&self, slot: &Slot) {
        self.windows.hide(slot.shown);
        self.frames.unpin(slot.mfn);
    }

    /// How many mappings hold a page's frame in place, an idle slot not among them: that one is given up. For whoever
    /// wants to take the page.
    #[inline]
    pub(crate) fn pins_of(&self, gfn: Gfn, mfn: Mfn) -> u32 {
        match self.frames.pins(mfn) {
            0 => 0,
            _ => self.pins_beside_idle(gfn, mfn),
        }
    }

    #[cold]
    fn pins_beside_idle(&self, gfn: Gfn, mfn: Mfn) -> u32 {
        let mut slots = self.pool.slots.lock();
        let index = slots.by_gfn.get(&gfn).copied();
        if let Some(slot) = index.and_then(|index| slots.give_up(index)) {
            self.let_go(&slot);
        }
        drop(slots);
        self.frames.pins(mfn)
    }

    /// Mappings hold the page's frame in place, an idle slot not counted: as [`Mmu::pins_of`], for who only looks.
    pub(crate) fn is_held(&self, gfn: Gfn, mfn: Mfn) -> bool {
        match self.frames.pins(mfn) {
            0 => false,
            1 => {
                let slots = self.pool.slots.lock();
                let slot = slots.by_gfn.get(&gfn).and_then(|index| slots.slots[*index as usize].as_ref());
                slot.is_none_or(|slot| slot.mappings != 0)
            }
            _ => true,
        }
    }

    /// What the pool has, and has done.
    pub fn window_stats(&self) -> WindowStats {
        self.pool.slots.lock().stats
    }
}

/// Who takes a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// Whoever has the turn, out of those that are kept.
    Turn,
    Anybody,
}

/// The turn of somebody who wants all of these pages at once. While it lives, who can do without them leaves them alone.
#[derive(Debug)]
#[must_use]
pub(crate) struct Turn<'m> {
    mmu: &'m Mmu,
    pages: Vec<Gfn>,
    _has: Having,
}

impl<'m> Turn<'m> {
    /// Sleeps until nobody else has the turn. The caller holds nothing; the pages are no more than there are slots.
    pub fn wait(mmu: &'m Mmu, pages: Vec<Gfn>) -> Turn<'m> {
        assert_none_held();
        let turn = Wait::from(A_SLOT).of(mmu.pool.turn());
        mmu.pool.wait_until(turn, |slots| !slots.turn).turn = true;
        let has = Having::new(mmu.pool.turn());
        pages.iter().for_each(|gfn| mmu.buckets.starve(Asker::Turn, *gfn));
        Turn { mmu, pages, _has: has }
    }

    /// Sleeps until there is a slot for each of the pages, whoever else may have them; they are kept as they come free. The
    /// caller holds nothing.
    pub fn claim(&self) {
        assert_none_held();
        let (pool, want) = (&self.mmu.pool, self.pages.len() as u32);
        pool.slots.lock().kept = want;
        drop(pool.wait_until(A_SLOT.into(), |slots| slots.not_taken() >= want));
    }

    /// [`Mmu::try_take_page`] of one of the pages, out of the slots that were claimed.
    pub fn try_take_page(&self, gfn: Gfn, intent: Intent) -> Result<PersistentMap<'m>, NotTaken> {
        self.mmu.try_take(gfn, intent, By::Turn)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.pages.iter().for_each(|gfn| self.mmu.buckets.fed(Asker::Turn, *gfn));
        let mut slots = self.mmu.pool.slots.lock();
        (slots.turn, slots.kept) = (false, 0);
        drop(slots);
        self.mmu.pool.slots.notify_all();
    }
}

/// Asserts (debug builds) that this thread may sleep for a slot or a page (INV-POOL-2): it holds no mapping of the pool, nor a lock.
#[inline]
pub(crate) fn assert_none_held() {
    lock_order::assert_may_sleep();
    holders::assert_none();
}

/// Bytes written through a mapping, from the first to behind the last.
type Written = (u32, u32);
const NOTHING: Written = (u32::MAX, 0);

/// A guest page, mapped and pinned until this is dropped, by whatever thread.
#[derive(Debug)]
pub struct PersistentMap<'m> {
    mmu: &'m Mmu,
    gfn: Gfn,
    mfn: Mfn,
    /// Where in the windows' memory it is seen.
    shown: Mfn,
    slot: u32,
    intent: Cell<Intent>,
    written: Cell<Written>,
    holder: holders::Holder,
}

impl PersistentMap<'_> {
    /// The page it shows.
    pub fn gfn(&self) -> Gfn {
        self.gfn
    }

    /// What it was taken for.
    pub(crate) fn intent(&self) -> Intent {
        self.intent.get()
    }

    /// Says that the mapping goes to another thread: the one that took it does not hold it any more, and may take another.
    #[must_use]
    pub fn pass_on(mut self) -> Self {
        self.holder.forget();
        self
    }

    /// Copies out; `offset + buffer.len()` is at most a page.
    pub fn read(&self, offset: u32, buffer: &mut [u8]) {
        self.mmu.windows.memory().read(self.shown.at(offset), buffer);
    }

    /// Copies in; `offset + data.len()` is at most a page. The mapping was taken to write.
    pub fn write(&self, offset: u32, data: &[u8]) {
        self.note(offset, data.len() as u32);
        self.mmu.windows.memory().write(self.shown.at(offset), data);
    }

    /// `length` bytes from `offset`, all of them in the page, for `vm-memory`'s traits. To be written, they count as written from
    /// now on: whoever has them may store at any time until the mapping goes. The mapping was taken to write then. Never sleeps.
    ///
    /// # Errors
    ///
    /// When the range goes past the page.
    pub fn slice(
        &self,
        offset: u32,
        length: u32,
        intent: Intent,
    ) -> Result<VolatileSlice<'_>, VolatileMemoryError> {
        let page = self.mmu.windows.memory().frame(self.shown);
        let slice = page.subslice(offset as usize, length as usize)?;
        if intent == Intent::Write {
            self.note(offset, length);
        }
        // Whoever asks for it makes its access later.
        point();
        Ok(slice)
    }

    /// Makes of a mapping to read one to write; what swap has of the page is no good any more. Never sleeps.
    pub fn make_writable(&self) {
        self.intent.set(Intent::Write);
        self.mmu.will_write(self.gfn, self.mfn);
    }

    /// [`crate::Machine::load`] at byte `offset`.
    #[inline]
    pub fn load(&self, offset: u32, width: Width) -> u64 {
        self.mmu.windows.memory().load(self.shown.at(offset), width)
    }

    /// [`crate::Machine::store`] at byte `offset`. The mapping was taken to write.
    #[inline]
    pub fn store(&self, offset: u32, width: Width, value: u64) {
        self.note(offset, width.bytes());
        self.mmu.windows.memory().store(self.shown.at(offset), width, value);
    }

    /// Tells the shadow, and decoded code, what was written so far. No slice is in use: what is written from now on is told later.
    pub fn tell(&mut self) {
        let (first, end) = self.written.replace(NOTHING);
        if first < end {
            self.mmu.table_written(self.gfn, self.mfn, first, end - first);
            if let Some(model) = self.mmu.guest_tlb() {
                model.device_wrote(self.gfn);
            }
        }
    }

    #[inline]
    fn note(&self, offset: u32, length: u32) {
        debug_assert_eq!(self.intent.get(), Intent::Write, "INV-DIRTY-1: {} was taken to be read", self.gfn);
        let (first, end) = self.written.get();
        self.written.set((first.min(offset), end.max(offset + length)));
    }
}

impl Drop for PersistentMap<'_> {
    fn drop(&mut self) {
        self.tell();
        let mut slots = self.mmu.pool.slots.lock();
        let Some(slot) = slots.slots[self.slot as usize].as_mut() else { return };
        slot.mappings -= 1;
        if slot.mappings > 0 {
            return;
        }
        slots.stats.taken -= 1;
        slots.stats.idle += 1;
        let sleepers = slots.stats.waiters > 0;
        drop(slots);
        if sleepers {
            self.mmu.pool.slots.notify_all();
        }
    }
}

/// How many mappings each thread holds: who holds one must not sleep for another. Debug builds alone, and not under a model
/// checker, whose threads are one of the system's.
mod holders {
    #[cfg(all(debug_assertions, not(any(loom, shuttle))))]
    mod counts {
        use crate::sync::{Arc, AtomicU32, Ordering};

        thread_local! {
            static HELD: Arc<AtomicU32> = Arc::default();
        }

        /// The taker's count, which whoever drops the mapping lowers.
        #[derive(Debug)]
        pub struct Holder(Option<Arc<AtomicU32>>);

        impl Holder {
            pub fn new() -> Holder {
                let held = HELD.with(Arc::clone);
                held.fetch_add(1, Ordering::Relaxed);
                Holder(Some(held))
            }

            pub fn forget(&mut self) {
                self.0.take().into_iter().for_each(|held| {
                    held.fetch_sub(1, Ordering::Relaxed);
                });
            }
        }

        impl Drop for Holder {
            fn drop(&mut self) {
                self.forget();
            }
        }

        pub fn assert_none() {
            let held = HELD.with(|held| held.load(Ordering::Relaxed));
            assert_eq!(held, 0, "INV-POOL-2: about to sleep holding {held} of the window's slots");
        }
    }

    #[cfg(not(all(debug_assertions, not(any(loom, shuttle)))))]
    mod counts {
        #[derive(Debug)]
        pub struct Holder;

        impl Holder {
            pub fn new() -> Holder {
                Holder
            }

            pub fn forget(&mut self) {}
        }

        pub fn assert_none() {}
    }

    pub use counts::{Holder, assert_none};
}

#[cfg(all(test, not(any(loom, shuttle))))]
#[path = "pool_tests.rs"]
mod tests;
