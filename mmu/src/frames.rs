//! Frames of the machine pool: who has each, and where the next one comes from.
//!
//! Story: guest memory gets a frame on first touch, shadow tables when they are built. Frames are handed out in
//! a fixed scattered order, and never one whose number equals the gfn it is for, so that code that takes one
//! world's number for the other's breaks at once instead of working by luck.
//!
//! The machine may have more frames than its owner wants to pay for: the *budget* is how many the host may have to back
//! at once. A frame that comes back is kept for the next taker as long as few are free, else the host has it back.
//!
//! ```text
//!                      +------ allocate ------+
//!                      v                      |
//!   never used --> in use ---- release ----> returned (backed, free)
//!   given back <---------------- trim ----------+
//! ```
//!
//! Of what is available the last frames are kept for those who make others free ([`Draw`]); below the *low* mark the
//! background thread is wanted, and it goes on to the *high* mark.
//!
//! Holds: INV-FRAME-2, a frame has exactly one owner ([`FrameKind`]), and the free list holds exactly the free
//! ones. INV-FRAME-3, no guest frame has mfn == gfn. INV-FRAME-4, frames in use and returned ones are no more than
//! the budget, but for the time that a cut of it takes. INV-FRAME-5, every page of low memory has its frame or can have
//! one at any time.
//!
//! Behind the pool may be a second place for each whole range of guest memory: its *block*, whose frames are contiguous and aligned as
//! the range is ([`crate::collapse`]). A frame of a block is for its own page alone and counts on the budget only while that is in it;
//! one that was left is a *stray* until the host has it back.
//!
//! Locks: the allocator's own ([`lock_order::FRAMES`]). The flags of a guest frame change only under
//! bucket(gfn); its debt is a maximum and may rise at any time.
//!
//! Limits: 24 bytes of metadata a frame here and 8 in the frame lists; none for frames that were never used.

use std::io;

use crate::addr::{Gfn, Mfn};
use crate::lock_order;
use crate::machine::Machine;
use crate::p2m::TABLE_ENTRIES;
use crate::rules::{Rule, Rules};
use crate::sync::{self, AtomicU32, AtomicU64, Lock, Ordering, raise, zeroed};

/// What a frame is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// Nobody's; the allocator has it, or it waits for a flush before it may be used again, or it is a home with no page.
    Free,
    /// Not the allocator's to give: firmware and its tables.
    Reserved,
    /// Guest memory.
    Guest(Gfn),
    /// A shadow page, by its slot.
    Shadow(u32),
    /// One of the two upper tables of a root, by the root's index.
    Root(u32),
}

/// The gfn in this frame is shadowed: writes to it must be seen.
pub const SHADOWED: u32 = 1 << 8;
/// It is shadowed as an upper-level table, so every write to it is tracked.
pub const UPPER: u32 = 1 << 9;
/// Its shadow pages are out of step: writes are not tracked until the next resynchronisation.
pub const UNSYNC: u32 = 1 << 10;
/// The VMM watches writes to it for a reason of its own (descriptor tables in native mode).
pub const WATCHED: u32 = 1 << 11;

/// Some shadow page of it is for PAE paging: its entries are 8 bytes wide.
pub const WIDE: u32 = 1 << 12;

/// It may have been written to since its contents were last known: zeros, or those of its copy in swap.
pub const DIRTY: u32 = 1 << 13;

/// Some importer may have it mapped (see external).
pub const EXTERNAL: u32 = 1 << 14;
/// Importers may write to it unseen: no table may be tracked in it.
pub const FOREIGN: u32 = 1 << 15;
/// A frame of a block that nobody has, and that the host still backs.
const STRAY: u32 = 1 << 16;

const KIND_MASK: u32 = 0xff;
/// Free frames that the host is left to back where there is no budget: shadow tables come and go.
const KEPT_UNLIMITED: u32 = 64;
/// Frames given back at once.
const TRIM_BATCH: u32 = 64;

/// Metadata of one frame: see the constants below for which word is what.
type Frame = [AtomicU32; 4];

/// Kind in the low byte, flags above.
const STATE: usize = 0;
/// Gfn, slot or root, by kind.
const OWNER: usize = 1;
/// Window mappings that hold the frame in place.
const PINS: usize = 2;
/// Generation of the code that somebody has decoded from it; 0 for none since the last store.
const CODE: usize = 3;
/// In a code mark: a store that was on its way when it was made has arrived.
pub(crate) const SETTLED: u32 = 1;
/// From one code mark to the next.
const MARK_STEP: u32 = 2;

/// What gives frames back to the host.
pub trait Host: Send + Sync + std::fmt::Debug {
    /// The host may take these frames' memory; they read as zeros from now on. Called with no lock held.
    ///
    /// # Errors
    ///
    /// When the host refuses: all of them stay as they are.
    fn give_back(&self, frames: &[Mfn]) -> io::Result<()>;
}

/// A machine that has no host: its twin for tests.
#[derive(Debug)]
pub(crate) struct NoHost(pub Machine);

impl Host for NoHost {
    fn give_back(&self, frames: &[Mfn]) -> io::Result<()> {
        frames.iter().for_each(|mfn| self.0.clear(*mfn));
        Ok(())
    }
}

/// How far somebody may go who wants a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Draw {
    /// Leaves the reserve alone.
    Ordinary,
    /// May take half of it: shadow tables, without which nobody gets on.
    Tables,
    /// May take all of it: whoever makes frames free.
    Reserve,
}

/// A frame just taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fresh {
    /// Which.
    pub mfn: Mfn,
    /// It is all zeros; else it has what its last owner left.
    pub zeroed: bool,
    /// Few frames are left: the background thread is wanted.
    pub low: bool,
}

/// How many free frames mean what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Kept for those who make frames free.
    pub reserve: u32,
    /// Below it the background thread is wanted.
    pub low: u32,
    /// It goes on to this one.
    pub high: u32,
}

impl Marks {
    /// The marks of a budget.
    pub fn of(budget: u32) -> Marks {
        let reserve = (budget / 64).clamp(8, 512);
        Marks { reserve, low: 2 * reserve, high: 4 * reserve }
    }
}

/// Apart from what fills read of the frames.
#[derive(Debug)]
#[repr(align(64))]
struct FreeList {
    /// How many of the scattered order have never been handed out yet: the next is `scatter(next)`.
    next: u32,
    /// Free and backed by the host: the contents are the last owner's.
    returned: Vec<Mfn>,
    /// Free, used before, and given back to the host: zeros.
    given_back: Vec<Mfn>,
    /// Frames of blocks that were left, and that the host still backs. Nobody can have them.
    strays: Vec<Mfn>,
    /// In use, returned or stray.
    backed: u32,
    budget: u32,
    marks: Marks,
    /// Frames promised to low memory that has none yet.
    promised: u32,
}

/// What the allocator has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameCounts {
    /// The most frames that the host may have to back.
    pub budget: u32,
    /// Those that it may be backing: in use, or free and kept.
    pub backed: u32,
    /// What an ordinary taker could still have.
    pub available: u32,
    /// The marks in force.
    pub marks: Marks,
}

/// All frames of a machine.
#[derive(Debug)]
pub struct Frames {
    rules: Rules,
    frames: Box<[Frame]>,
    /// Flush clock of the last removal of an spte to each frame (see coherence).
    debts: Box<[AtomicU64]>,
    /// Frames that are the allocator's. Behind them are blocks, for each whole range of guest memory one or none at all.
    pool: u32,
    /// Behind those are homes, one for each page of guest memory or none at all.
    first_home: u32,
    first: u32,
    stride: u64,
    /// Guest pages below this one are low memory.
    low: u32,
    /// The last code generation given out.
    code_clock: AtomicU32,
    /// How often a simulation has a frame refused.
    refuse_one_in: AtomicU32,
    free: Lock<FreeList>,
}

impl Frames {
    /// Frames `reserved..total` are free, those below are [`FrameKind::Reserved`]. The first `low` guest pages will have
    /// a frame whenever they want one. The budget is all there is.
    pub fn new(total: u32, reserved: u32, low: u32) -> Frames {
        Frames::with_areas(total, reserved, low, (0, 0))
    }

    /// The same, with so many frames of blocks behind, and behind those so many homes (see external).
    pub fn with_areas(total: u32, reserved: u32, low: u32, (blocks, homes): (u32, u32)) -> Frames {
        let first_home = total.saturating_add(blocks);
        let all = first_home as usize + homes as usize;
        let frames: Box<[Frame]> = zeroed(all);
        for frame in frames.iter().take(reserved as usize) {
            frame[STATE].store(1, Ordering::Relaxed);
        }
        let first = reserved.min(total);
        let budget = total - first;
        let free = FreeList {
            next: 0,
            returned: Vec::new(),
            given_back: Vec::new(),
            strays: Vec::new(),
            backed: 0,
            budget,
            marks: Marks::default(),
            promised: low.min(budget),
        };
        Frames {
            rules: Rules::default(),
            frames,
            debts: zeroed(all),
            pool: total,
            first_home,
            first,
            stride: scatter_stride(u64::from(budget)),
            low,
            code_clock: AtomicU32::new(0),
            refuse_one_in: AtomicU32::new(0),
            free: Lock::new(lock_order::FRAMES, free),
        }
    }

    pub(crate) fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// How many frames the machine has, blocks and homes not among them.
    pub fn total(&self) -> u32 {
        self.pool
    }

    /// The same, with the blocks and the homes.
    pub(crate) fn total_with_areas(&self) -> u32 {
        self.frames.len() as u32
    }

    /// The frame is a page's home.
    #[inline]
    pub fn is_home(&self, mfn: Mfn) -> bool {
        mfn.0 >= self.first_home
    }

    /// The block of the range that begins with `first`, if there are blocks and the range is whole.
    pub(crate) fn block(&self, first: Gfn) -> Option<Mfn> {
        let blocks = self.first_home - self.pool;
        let end = first.0.checked_add(TABLE_ENTRIES as u32)?;
        (first.0.is_multiple_of(TABLE_ENTRIES as u32) && end <= blocks).then(|| Mfn(self.pool + first.0))
    }

    /// The first page of the range whose block the frame is of, if it is of one.
    pub(crate) fn range_of(&self, mfn: Mfn) -> Option<Gfn> {
        let of_block = (self.pool..self.first_home).contains(&mfn.0);
        of_block.then(|| Gfn((mfn.0 - self.pool) / TABLE_ENTRIES as u32 * TABLE_ENTRIES as u32))
    }

    /// There are frames that the host backs and nobody can have.
    pub(crate) fn has_strays(&self) -> bool {
        !self.free.lock().strays.is_empty()
    }

    /// There are homes.
    pub(crate) fn has_homes(&self) -> bool {
        self.frames.len() as u32 > self.first_home
    }

    /// How many are nobody's now, however many of them the budget allows to be used.
    pub fn free_count(&self) -> u32 {
        let free = self.free.lock();
        self.total() - self.first - free.next + (free.returned.len() + free.given_back.len()) as u32
    }

    /// What there is.
    pub fn counts(&self) -> FrameCounts {
        let free = self.free.lock();
        let available = self.available(&free).max(0) as u32;
        FrameCounts { budget: free.budget, backed: free.backed, available, marks: free.marks }
    }

    /// All that there are for the guest and its tables.
    pub fn budget_max(&self) -> u32 {
        self.total() - self.first
    }

    /// Sets the budget. Frames over it stay in use until somebody makes them free ([`Frames::trim`]). All there are, or
    /// more, means no limit: then nothing is reserved either.
    pub fn set_budget(&self, frames: u32) {
        let all = self.budget_max();
        let mut free = self.free.lock();
        free.budget = frames.min(all);
        free.marks = if frames < all { Marks::of(frames) } else { Marks::default() };
    }

    /// Takes a free frame for `kind` (not `Free`). `None` when none is left for `draw`; low memory is always served.
    pub fn allocate(&self, kind: FrameKind, draw: Draw) -> Option<Fresh> {
        self.allocate_with(kind, draw, self.is_promised(kind))
    }

    /// The same for a page that has a frame, and leaves it: what low memory was promised, it has had.
    pub(crate) fn allocate_for_move(&self, gfn: Gfn, draw: Draw) -> Option<Fresh> {
        self.allocate_with(FrameKind::Guest(gfn), draw, false)
    }

    /// Takes a home for its page, which has another frame, and leaves it; or the page's frame in a block. False when no frame is left
    /// for `draw`, or this one is taken, or the host still has to take it: somebody else moves the page, or just did.
    pub(crate) fn claim(&self, home: Mfn, gfn: Gfn, draw: Draw) -> bool {
        let mut free = self.free.lock();
        let available = self.available(&free);
        let idle = self.kind(home) == FrameKind::Free && self.flags(home) & STRAY == 0;
        if !idle || available <= kept(&free, draw) {
            return false;
        }
        free.backed += 1;
        self.set_kind(home, FrameKind::Guest(gfn));
        true
    }

    /// Refuses a frame once in so many times, though there is one, where who asks is an actor of a simulation and has no right to the
    /// reserve: 0 for never.
    pub(crate) fn refuse_one_in(&self, times: u32) {
        self.refuse_one_in.store(times, Ordering::Relaxed);
    }

    fn allocate_with(&self, kind: FrameKind, draw: Draw, promised: bool) -> Option<Fresh> {
        if draw == Draw::Ordinary && sync::strikes(self.refuse_one_in.load(Ordering::Relaxed)) {
            return None;
        }
        let mut free = self.free.lock();
        let available = self.available(&free) + i64::from(promised);
        if available <= if promised { 0 } else { kept(&free, draw) } {
            return None;
        }
        let (mut mfn, mut zeroed) = self.take(&mut free)?;
        if kind == FrameKind::Guest(Gfn(mfn.0)) {
            let other = self.take(&mut free);
            free.put_back(mfn, zeroed);
            (mfn, zeroed) = other?;
        }
        free.promised -= u32::from(promised);
        self.set_kind(mfn, kind);
        Some(Fresh { mfn, zeroed, low: available <= i64::from(free.marks.low) })
    }

    /// Gives a frame back. The caller vouches that no translation to it is left anywhere (coherence ledger).
    pub fn release(&self, mfn: Mfn) {
        self.release_all(&[mfn]);
    }

    /// The same for several.
    pub fn release_all(&self, frames: &[Mfn]) {
        let mut free = self.free.lock();
        for mfn in frames {
            free.promised += u32::from(self.is_promised(self.kind(*mfn)));
            self.put_back(&mut free, *mfn);
        }
    }

    /// The same for frames whose pages have another.
    pub(crate) fn release_for_move(&self, frames: &[Mfn]) {
        let mut free = self.free.lock();
        frames.iter().for_each(|mfn| self.put_back(&mut free, *mfn));
    }

    /// The host does not back a home that nobody is in, nor for long a frame of a block.
    fn put_back(&self, free: &mut FreeList, mfn: Mfn) {
        self.set_kind(mfn, FrameKind::Free);
        if self.is_home(mfn) {
            free.backed -= 1;
        } else if mfn.0 < self.pool {
            free.returned.push(mfn);
        } else {
            self.change_flags(mfn, 0, STRAY);
            free.strays.push(mfn);
        }
    }

    /// Gives the host back what is stray, free and over the budget, or free in numbers; returns how many frames. Called with no
    /// lock held.
    ///
    /// # Errors
    ///
    /// When the host refuses: the frames stay free, and backed.
    pub fn trim(&self, host: &dyn Host) -> io::Result<u32> {
        lock_order::assert_may_sleep();
        let mut given = 0;
        loop {
            let surplus = self.take_surplus();
            if surplus.is_empty() {
                return Ok(given);
            }
            let done = host.give_back(&surplus);
            let mut free = self.free.lock();
            let are_strays = surplus[0].0 >= self.pool;
            if let Err(error) = done {
                free.backed += surplus.len() as u32;
                if are_strays { &mut free.strays } else { &mut free.returned }.extend_from_slice(&surplus);
                return Err(error);
            }
            if are_strays {
                surplus.iter().for_each(|mfn| self.change_flags(*mfn, STRAY, 0));
            } else {
                free.given_back.extend_from_slice(&surplus);
            }
            given += surplus.len() as u32;
        }
    }

    /// Some of the strays, or of the returned frames that are too many. They count as given back from here on, so that nobody
    /// reclaims for want of what the host is just being given.
    fn take_surplus(&self) -> Vec<Mfn> {
        let mut free = self.free.lock();
        let strays = free.strays.len();
        if strays > 0 {
            let count = strays.min(TRIM_BATCH as usize);
            free.backed -= count as u32;
            return free.strays.split_off(strays - count);
        }
        let returned = free.returned.len() as u32;
        let limited = free.budget < self.total() - self.first;
        let kept = if limited { free.marks.high } else { KEPT_UNLIMITED };
        let idle = returned.saturating_sub(kept);
        let over = free.backed.saturating_sub(free.budget).min(returned);
        let count = idle.max(over).min(TRIM_BATCH);
        free.backed -= count;
        free.returned.split_off((returned - count) as usize)
    }

    /// What is left for anybody; less than nothing while the budget is overdrawn.
    fn available(&self, free: &FreeList) -> i64 {
        let unbacked = self.total() - self.first - free.next + free.given_back.len() as u32;
        let room = (i64::from(free.budget) - i64::from(free.backed)).min(i64::from(unbacked));
        free.returned.len() as i64 + room - i64::from(free.promised)
    }

    fn is_promised(&self, kind: FrameKind) -> bool {
        matches!(kind, FrameKind::Guest(gfn) if gfn.0 < self.low)
    }

    /// Who has the frame.
    #[inline]
    pub fn kind(&self, mfn: Mfn) -> FrameKind {
        let frame = &self.frames[mfn.0 as usize];
        let owner = frame[OWNER].load(Ordering::Relaxed);
        match frame[STATE].load(Ordering::Acquire) & KIND_MASK {
            0 => FrameKind::Free,
            1 => FrameKind::Reserved,
            2 => FrameKind::Guest(Gfn(owner)),
            3 => FrameKind::Shadow(owner),
            _ => FrameKind::Root(owner),
        }
    }

    /// The gfn a guest frame holds, else `None`.
    #[inline]
    pub fn gfn(&self, mfn: Mfn) -> Option<Gfn> {
        match self.kind(mfn) {
            FrameKind::Guest(gfn) => Some(gfn),
            _ => None,
        }
    }

    /// Flags of a guest frame ([`SHADOWED`] and its kin).
    #[inline]
    pub fn flags(&self, mfn: Mfn) -> u32 {
        self.frames[mfn.0 as usize][STATE].load(Ordering::Acquire) & !KIND_MASK
    }

    /// Changes flags of a guest frame. Caller holds bucket(gfn).
    pub(crate) fn change_flags(&self, mfn: Mfn, clear: u32, set: u32) {
        let state = &self.frames[mfn.0 as usize][STATE];
        let old = state.load(Ordering::Relaxed);
        state.store(old & !clear | set, Ordering::Release);
    }

    /// Notes that an spte to the frame was removed or narrowed at flush clock `stamp`.
    pub(crate) fn owe(&self, mfn: Mfn, stamp: u64) {
        let debt = &self.debts[mfn.0 as usize];
        if debt.load(Ordering::Acquire) < stamp {
            raise(debt, stamp);
        }
    }

    /// Every translation to the frame, by whatever vCPU, is gone: its debt is paid. The caller has it to itself.
    pub(crate) fn forgive(&self, mfn: Mfn) {
        self.debts[mfn.0 as usize].store(0, Ordering::SeqCst);
    }

    /// The flush clock of the last removal of an spte to the frame.
    pub fn debt(&self, mfn: Mfn) -> u64 {
        self.debts[mfn.0 as usize].load(Ordering::Acquire)
    }

    /// Holds the frame in place.
    #[inline]
    pub(crate) fn pin(&self, mfn: Mfn) {
        self.frames[mfn.0 as usize][PINS].fetch_add(1, Ordering::SeqCst);
    }

    /// Lets go of it.
    #[inline]
    pub(crate) fn unpin(&self, mfn: Mfn) {
        let before = self.frames[mfn.0 as usize][PINS].fetch_sub(1, Ordering::SeqCst);
        debug_assert!(before > 0, "INV-WINDOW-1: {mfn} unpinned more often than pinned");
    }

    /// How many window mappings hold the frame.
    pub fn pins(&self, mfn: Mfn) -> u32 {
        self.frames[mfn.0 as usize][PINS].load(Ordering::SeqCst)
    }

    /// Marks the frame, with `barrier` called before anybody may read its code by a mark that is new; returns the generation of what
    /// is read from now on. `barrier` is a [`crate::Shootdown::settle_stores`].
    pub(crate) fn generation_to_decode(&self, mfn: Mfn, barrier: impl FnOnce()) -> u32 {
        let mark = self.mark_code(mfn);
        if mark & SETTLED != 0 {
            return mark;
        }
        barrier();
        self.settle_code(mfn, mark)
    }

    /// Marks the frame as one that code is about to be decoded from. Returns the mark, new or as it was: while it is without
    /// [`SETTLED`], a store by another vCPU that is on its way may miss it.
    pub(crate) fn mark_code(&self, mfn: Mfn) -> u32 {
        let code = &self.frames[mfn.0 as usize][CODE];
        let now = code.load(Ordering::SeqCst);
        if now != 0 {
            return now;
        }
        let step = || self.code_clock.fetch_add(MARK_STEP, Ordering::Relaxed).wrapping_add(MARK_STEP);
        let next = match step() {
            0 => step(),
            clock => clock,
        };
        // Another may have been faster. Its mark serves both; a store would make stale what the other has decoded. Not often: once
        // for each time that a frame of code was stored to.
        match code.compare_exchange(0, next, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => next,
            Err(now) => now,
        }
    }

    /// Nobody's store misses `mark` any more. Returns the generation of the frame's contents: unless it is still that, what is
    /// decoded from now on is stale.
    pub(crate) fn settle_code(&self, mfn: Mfn, mark: u32) -> u32 {
        let code = &self.frames[mfn.0 as usize][CODE];
        // Another may have done so, or it is gone: then no block of this generation is current.
        let _ = code.compare_exchange(mark, mark | SETTLED, Ordering::SeqCst, Ordering::SeqCst);
        mark | SETTLED
    }

    /// The code generation, 0 when there is none or no such frame, and none that is in use without [`SETTLED`].
    #[inline]
    pub(crate) fn code(&self, mfn: Mfn) -> u32 {
        self.frames.get(mfn.0 as usize).map_or(0, |frame| frame[CODE].load(Ordering::Acquire))
    }

    /// Notes a store to the frame, already made: code decoded from it is stale.
    #[inline]
    pub(crate) fn code_written(&self, mfn: Mfn) {
        let code = &self.frames[mfn.0 as usize][CODE];
        if code.load(Ordering::Relaxed) != 0 && self.rules.keep(Rule::CodeAtStore) {
            // On x86 a store is the same XCHG, and would do. But loom's store may come before what its thread has read.
            code.swap(0, Ordering::SeqCst);
        }
    }

    fn set_kind(&self, mfn: Mfn, kind: FrameKind) {
        let frame = &self.frames[mfn.0 as usize];
        frame[CODE].store(0, Ordering::Relaxed);
        let (code, owner) = match kind {
            FrameKind::Free => (0, 0),
            FrameKind::Reserved => (1, 0),
            FrameKind::Guest(gfn) => (2, gfn.0),
            FrameKind::Shadow(slot) => (3, slot),
            FrameKind::Root(root) => (4, root),
        };
        frame[OWNER].store(owner, Ordering::Relaxed);
        frame[STATE].store(code, Ordering::Release);
    }

    /// The next free frame, and whether it is all zeros.
    fn take(&self, free: &mut FreeList) -> Option<(Mfn, bool)> {
        if let Some(mfn) = free.returned.pop() {
            return Some((mfn, false));
        }
        let count = u64::from(self.total() - self.first);
        let mfn = match free.given_back.pop() {
            Some(mfn) => mfn,
            None if u64::from(free.next) == count => return None,
            None => {
                let at = u64::from(free.next) * self.stride % count;
                free.next += 1;
                Mfn(self.first + at as u32)
            }
        };
        free.backed += 1;
        Some((mfn, true))
    }
}

impl FreeList {
    /// Undoes a `take`.
    fn put_back(&mut self, mfn: Mfn, zeroed: bool) {
        if zeroed {
            self.backed -= 1;
            self.given_back.push(mfn);
        } else {
            self.returned.push(mfn);
        }
    }
}

/// Frames that `draw` leaves to others.
fn kept(free: &FreeList, draw: Draw) -> i64 {
    i64::from(match draw {
        Draw::Ordinary => free.marks.reserve,
        Draw::Tables => free.marks.reserve / 2,
        Draw::Reserve => 0,
    })
}

/// A step coprime to `count` near its golden section: `i * step % count` visits every frame once, far apart.
fn scatter_stride(count: u64) -> u64 {
    let mut stride = (count * 618 / 1000).max(1);
    while gcd(stride, count) > 1 {
        stride += 1;
    }
    stride
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
#[path = "frames_tests.rs"]
mod tests;
