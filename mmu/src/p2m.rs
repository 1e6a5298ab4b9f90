//! The p2m: guest frame number -> where that page is now. Two levels.
//!
//! Story: guest-physical space exists here and nowhere else. An upper entry covers 2 MiB (512 gfns); a lower one
//! is a page. Lookups take no lock: both levels are atomics.
//!
//! ```text
//!            populate                    an invalidation's begin
//!   Zero ----------------> Resident ------------------------------> Moving --+--> Resident   put back
//!    |  ^                                   swap-in: claimed          ^ | | |
//!    |  +---------------------------------------------------- Zero <-+-+ | +--> Ballooned
//!    +--> Ballooned --> Zero               Swapped ------------------+   +----> Swapped
//! ```
//!
//! A `Moving` page belongs to whoever moved it there, who also holds its gate closed: everybody else waits at the
//! gate. A resident page may have a *copy* in swap that is still good; its slot stands beside the frame, and goes when
//! the page is first written to.
//!
//! Holds: INV-P2M-1, a `Resident(mfn)` entry's frame names that gfn as its owner. INV-P2M-2, legal transitions
//! only (asserted at each). The generations of an entry never go down; `mapping` advances when
//! the page has lost its frame, `write` when write permission was taken away. INV-P2M-4, the counts of pages in each state
//! are what a walk over all entries comes to; a `Moving` page counts as what it was.
//!
//! An upper entry says more of its range than that there is a table, in a word of its own: that somebody gathers its pages (`Moving`), or
//! that all of them are resident in one block of contiguous frames (`Huge`). The lower entries stay what they are all the while, and
//! lookups go by them alone; what a `Huge` entry adds is a promise, and whoever is about to break it takes the word back first:
//!
//! ```text
//!            collapse: a ticket                all gathered, and the ticket still stands
//!   Table --------------------> Moving(ticket) ------------------------------------------> Huge(base)
//!     ^                             |                                                         |
//!     +---- a page is taken, or its stores must be seen: under its bucket (Mmu::break_up) ----+
//! ```
//!
//! Holds: INV-HUGE-1 and INV-HUGE-2 (collapse).
//!
//! Limits: guest frame numbers are 24 bits (64 GiB), machine frame numbers 29. 16 bytes an entry, in tables made on
//! first touch.

use crate::addr::{Gfn, Mfn};
use crate::swap::SwapSlot;
use crate::sync::{AtomicU32, AtomicU64, OnceLock, Ordering};

/// Pages under one upper entry. Loom looks at every one, and a model has few pages.
pub const TABLE_ENTRIES: usize = if cfg!(loom) { 4 } else { 512 };
/// The most guest frames there can be: 36 bits of guest-physical address.
pub const GFN_MAX: u32 = 1 << 24;

/// The state of a guest page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Guest memory that nobody has touched: reads as zeros, has no frame.
    Zero,
    /// In this machine frame.
    Resident(Mfn),
    /// In this slot of the swap device.
    Swapped(SwapSlot),
    /// The guest has given it up; a touch makes it `Zero` again.
    Ballooned,
    /// Changing hands, by whoever has closed its gate.
    Moving,
    /// No memory: a device, or nothing at all.
    Device,
}

/// Pages in each state that is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// In a frame.
    pub resident: u32,
    /// In swap.
    pub swapped: u32,
    /// Given up by the guest.
    pub ballooned: u32,
}

/// The collapse of a range, told from those before and after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

/// What a range is as a whole: an upper entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// None of its pages was ever touched: all are zeros.
    Nothing,
    /// Its pages are what each of them is.
    Table,
    /// The same, and somebody gathers them.
    Moving(Ticket),
    /// All are resident, in this frame and those after it.
    Huge(Mfn),
}

impl Range {
    fn encode(self) -> u64 {
        match self {
            Range::Nothing | Range::Table => RANGE_TABLE,
            Range::Moving(ticket) => RANGE_MOVING | ticket.0 << RANGE_BITS,
            Range::Huge(base) => RANGE_HUGE | u64::from(base.0) << RANGE_BITS,
        }
    }
}

const RANGE_TABLE: u64 = 0;
const RANGE_MOVING: u64 = 1;
const RANGE_HUGE: u64 = 2;
const RANGE_BITS: u32 = 2;

/// Generations of an entry, as a TLB entry or a window remembers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generations {
    /// Advances when the page moves to another frame or loses its frame.
    pub mapping: u32,
    /// Advances when write permission is withdrawn.
    pub write: u32,
}

#[derive(Debug, Default)]
struct Entry {
    /// Kind in the low 3 bits, above them the frame, or what kind a moving page was; in the upper half one more than the slot.
    state: AtomicU64,
    /// `mapping` in the upper half, `write` in the lower.
    generations: AtomicU64,
}

const ZERO: u64 = 0;
const RESIDENT: u64 = 1;
const SWAPPED: u64 = 2;
const BALLOONED: u64 = 3;
const DEVICE: u64 = 4;
const MOVING: u64 = 5;
const KIND: u64 = (1 << KIND_BITS) - 1;
const KIND_BITS: u32 = 3;
/// The upper half: the slot of a swapped page, or of a resident one's copy.
const SLOT: u64 = 0xffff_ffff << 32;

fn encode(state: PageState) -> u64 {
    match state {
        PageState::Zero => ZERO,
        PageState::Resident(mfn) => RESIDENT | u64::from(mfn.0) << KIND_BITS,
        PageState::Swapped(slot) => SWAPPED | slot_bits(slot),
        PageState::Ballooned => BALLOONED,
        PageState::Device => DEVICE,
        PageState::Moving => MOVING,
    }
}

#[inline(always)]
fn decode(word: u64) -> PageState {
    match word & KIND {
        ZERO => PageState::Zero,
        RESIDENT => PageState::Resident(Mfn((word as u32) >> KIND_BITS)),
        SWAPPED => slot_of(word).map_or(PageState::Zero, PageState::Swapped),
        BALLOONED => PageState::Ballooned,
        MOVING => PageState::Moving,
        _ => PageState::Device,
    }
}

#[inline(always)]
fn unpack(word: u64) -> Generations {
    Generations { mapping: (word >> 32) as u32, write: word as u32 }
}

fn slot_bits(slot: SwapSlot) -> u64 {
    (u64::from(slot.0) + 1) << 32
}

fn slot_of(word: u64) -> Option<SwapSlot> {
    ((word >> 32) as u32).checked_sub(1).map(SwapSlot)
}

/// The kind that a page counts as: on its way, what it was.
fn counted_as(word: u64) -> u64 {
    if word & KIND == MOVING { word >> KIND_BITS & KIND } else { word & KIND }
}

/// How many pages are of each kind that is counted. Apart from what lookups read all the time.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Counts([AtomicU32; COUNTED]);

/// Kinds below this one are counted.
const COUNTED: usize = BALLOONED as usize + 1;

impl Counts {
    /// Pages have gone from one kind to another; called after each change. For a moment, who is counted out of a kind may
    /// not have been counted in yet: then there are less than none.
    fn moved(&self, from: u64, to: u64, pages: u32) {
        if from == to || pages == 0 {
            return;
        }
        for (kind, change) in [(from, pages.wrapping_neg()), (to, pages)] {
            // Nobody asks how many are zero: all the others are.
            if let Some(count) = self.0.get(kind as usize).filter(|_| kind != ZERO) {
                count.fetch_add(change, Ordering::Relaxed);
            }
        }
    }

    fn of(&self, kind: u64) -> u32 {
        (self.0[kind as usize].load(Ordering::Relaxed) as i32).max(0) as u32
    }
}

type Table = [Entry; TABLE_ENTRIES];

/// The map of one guest.
#[derive(Debug)]
pub struct P2m {
    /// `None` until a gfn of the range is touched: then all of it is `Zero`.
    upper: Box<[OnceLock<Box<Table>>]>,
    /// [`Range`] of each upper entry: apart from what lookups read.
    ranges: Box<[AtomicU64]>,
    /// Generations of each range, mapping and write; none where no range can be huge.
    generations: Box<[(AtomicU32, AtomicU32)]>,
    /// The last ticket given out.
    tickets: AtomicU64,
    pages: u32,
    /// How often a generation has advanced, of any entry.
    advances: AtomicU64,
    counts: Counts,
}

/// Settles pages that were resident; dropped, it notes that their generations have advanced.
pub(crate) struct Settler<'a> {
    p2m: &'a P2m,
    /// How many have become each kind.
    settled: [u32; COUNTED],
}

impl P2m {
    /// A guest of `pages` pages of memory from gfn 0 (at most [`GFN_MAX`], the rest is cut off), all `Zero`;
    /// everything above is `Device`.
    pub fn new(pages: u32) -> P2m {
        let pages = pages.min(GFN_MAX);
        let tables = (pages as usize).div_ceil(TABLE_ENTRIES);
        let upper = (0..tables).map(|_| OnceLock::new()).collect();
        let ranges = (0..tables).map(|_| AtomicU64::new(RANGE_TABLE)).collect();
        P2m {
            upper,
            ranges,
            generations: Box::default(),
            tickets: AtomicU64::new(0),
            pages,
            advances: AtomicU64::new(0),
            counts: Counts::default(),
        }
    }

    /// What the range of `gfn` is as a whole.
    pub fn range(&self, gfn: Gfn) -> Range {
        let number = gfn.0 as usize / TABLE_ENTRIES;
        let Some(word) = self.ranges.get(number) else { return Range::Nothing };
        let word = word.load(Ordering::SeqCst);
        match word & ((1 << RANGE_BITS) - 1) {
            RANGE_MOVING => Range::Moving(Ticket(word >> RANGE_BITS)),
            RANGE_HUGE => Range::Huge(Mfn((word >> RANGE_BITS) as u32)),
            _ if self.upper[number].get().is_none() => Range::Nothing,
            _ => Range::Table,
        }
    }

    /// Somebody begins to gather the range of `gfn`: under what ticket; `None` where it is anything but a table.
    pub(crate) fn begin_collapse(&self, gfn: Gfn) -> Option<Ticket> {
        let ticket = Ticket(self.tickets.fetch_add(1, Ordering::Relaxed) + 1);
        let moving = Range::Moving(ticket);
        (self.range(gfn) == Range::Table && self.change_range(gfn, Range::Table, moving)).then_some(ticket)
    }

    /// The end of that, at `to`; false where the ticket does not stand any more.
    pub(crate) fn end_collapse(&self, gfn: Gfn, ticket: Ticket, to: Range) -> bool {
        self.change_range(gfn, Range::Moving(ticket), to)
    }

    /// The range of `gfn` is a table from here on, if it is still `range`. Caller holds bucket(gfn), and takes the page from its frame,
    /// or the right to write to it, in the same critical section: whoever gathers the range comes to that bucket either before, and
    /// its ticket falls, or after, and finds the page gone or marked.
    pub(crate) fn break_up(&self, gfn: Gfn, range: Range) -> bool {
        self.change_range(gfn, range, Range::Table)
    }

    /// The generations of a range as a whole: they advance with those of any page of it. Read them where a large leaf is made.
    #[inline]
    pub(crate) fn range_generations(&self, gfn: Gfn) -> Generations {
        let range = &self.generations[gfn.0 as usize / TABLE_ENTRIES];
        let [mapping, write] = [&range.0, &range.1].map(|generation| generation.load(Ordering::Acquire));
        Generations { mapping, write }
    }

    /// Keeps the generations of ranges too.
    pub(crate) fn with_ranges(mut self) -> P2m {
        self.generations = self.upper.iter().map(|_| Default::default()).collect();
        self
    }

    fn change_range(&self, gfn: Gfn, from: Range, to: Range) -> bool {
        let word = self.ranges.get(gfn.0 as usize / TABLE_ENTRIES);
        let change = |word: &AtomicU64| {
            word.compare_exchange(from.encode(), to.encode(), Ordering::SeqCst, Ordering::SeqCst).is_ok()
        };
        word.is_some_and(change)
    }

    /// Pages of guest memory.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Where the page is now.
    #[inline(always)]
    pub fn lookup(&self, gfn: Gfn) -> PageState {
        decode(self.word(gfn))
    }

    /// The entry's generations. Read them in the critical section that makes a mapping.
    #[inline]
    pub fn generations(&self, gfn: Gfn) -> Generations {
        unpack(self.entry(gfn).map_or(0, |e| e.generations.load(Ordering::Acquire)))
    }

    /// The frame of a page, and how often the page changed frames before: as long as both are so, what is read there is
    /// the page's.
    #[inline]
    pub(crate) fn holder(&self, gfn: Gfn) -> Option<(Mfn, u32)> {
        self.resident(gfn).map(|(mfn, generations)| (mfn, generations.mapping))
    }

    /// The frame of a page and its generations, as [`P2m::lookup`] and [`P2m::generations`] have them.
    #[inline]
    pub(crate) fn resident(&self, gfn: Gfn) -> Option<(Mfn, Generations)> {
        let entry = self.upper.get(gfn.0 as usize / TABLE_ENTRIES)?.get()?;
        let entry = &entry[gfn.0 as usize % TABLE_ENTRIES];
        match decode(entry.state.load(Ordering::SeqCst)) {
            PageState::Resident(mfn) => Some((mfn, unpack(entry.generations.load(Ordering::Acquire)))),
            _ => None,
        }
    }

    /// Moves an entry from `from` to `to` if it still is `from`; says whether it was.
    ///
    /// # Panics
    ///
    /// In debug builds if the transition is not a legal one (INV-P2M-2).
    pub(crate) fn transition(&self, gfn: Gfn, from: PageState, to: PageState) -> bool {
        self.transition_with(gfn, from, to, None)
    }

    /// The same, to a resident page that has a copy in `copy`.
    pub(crate) fn transition_with(
        &self,
        gfn: Gfn,
        from: PageState,
        to: PageState,
        copy: Option<SwapSlot>,
    ) -> bool {
        debug_assert!(is_legal(from, to), "INV-P2M-2: {gfn} from {from:?} to {to:?}");
        let Some(entry) = self.entry(gfn) else { return false };
        let next = encode(to) | copy.map_or(0, slot_bits);
        let change = |word| (decode(word) == from).then_some(next);
        let changed = entry.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
        if let Ok(was) = changed {
            self.counts.moved(counted_as(was), next & KIND, 1);
        }
        changed.is_ok()
    }

    /// Moves a page from `from` to `Moving`, for its new owner to settle: the slot of its copy, if it has one; `None` where
    /// it is not `from` any more. The caller has closed the page's gate.
    pub(crate) fn claim(&self, gfn: Gfn, from: PageState) -> Option<Option<SwapSlot>> {
        debug_assert!(is_legal(from, PageState::Moving), "INV-P2M-2: {gfn} from {from:?} to Moving");
        let entry = self.entry(gfn)?;
        let change = |word| (decode(word) == from).then_some(MOVING | (word & KIND) << KIND_BITS);
        let word = entry.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).ok()?;
        Some(if word & KIND == RESIDENT { slot_of(word) } else { None })
    }

    /// The slot of a resident page's copy in swap.
    #[inline]
    pub(crate) fn copy(&self, gfn: Gfn) -> Option<SwapSlot> {
        let word = self.word(gfn);
        if word & KIND == RESIDENT { slot_of(word) } else { None }
    }

    /// Takes the copy of a resident page away from it.
    pub(crate) fn take_copy(&self, gfn: Gfn) -> Option<SwapSlot> {
        let entry = self.entry(gfn)?;
        let change = |word: u64| (word & KIND == RESIDENT && word & SLOT != 0).then_some(word & !SLOT);
        let taken = entry.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change);
        taken.ok().and_then(slot_of)
    }

    /// For settling pages that were resident and are `Moving` by the caller's hand. It is dropped before any of their frames has a new owner.
    pub(crate) fn settler(&self) -> Settler<'_> {
        Settler { p2m: self, settled: Default::default() }
    }

    /// Notes that a page has lost its frame, and that no vCPU can reach it there any more.
    #[cfg(test)]
    pub(crate) fn advance_mapping_generation(&self, gfn: Gfn) {
        if let Some(entry) = self.entry(gfn) {
            entry.generations.fetch_add(1 << 32, Ordering::AcqRel);
            self.advances.fetch_add(1, Ordering::Release);
        }
    }

    #[inline(always)]
    fn word(&self, gfn: Gfn) -> u64 {
        if gfn.0 >= self.pages {
            return DEVICE;
        }
        match self.upper[gfn.0 as usize / TABLE_ENTRIES].get() {
            None => ZERO,
            Some(table) => table[gfn.0 as usize % TABLE_ENTRIES].state.load(Ordering::SeqCst),
        }
    }

    /// Notes that write permission was withdrawn everywhere. Caller holds bucket(gfn).
    pub(crate) fn advance_write_generation(&self, gfn: Gfn) {
        let Some(entry) = self.entry(gfn) else { return };
        let word = entry.generations.load(Ordering::Relaxed);
        let next = word & !0xffff_ffff | u64::from((word as u32).wrapping_add(1));
        entry.generations.store(next, Ordering::Release);
        if let Some(range) = self.generations.get(gfn.0 as usize / TABLE_ENTRIES) {
            range.1.fetch_add(1, Ordering::AcqRel);
        }
        self.advances.fetch_add(1, Ordering::Release);
    }

    /// A number that changes after any entry's generations have: while it stands still, so do they.
    #[inline]
    pub fn advances(&self) -> u64 {
        self.advances.load(Ordering::Acquire)
    }

    /// How many pages are in each state; those on their way in the one that they were in.
    pub fn counts(&self) -> PageCounts {
        let [resident, swapped, ballooned] = [RESIDENT, SWAPPED, BALLOONED].map(|kind| self.counts.of(kind));
        PageCounts { resident, swapped, ballooned }
    }

    /// The same by a look at every page that was ever touched, for the audit.
    pub(crate) fn count_all(&self) -> PageCounts {
        let mut counts = PageCounts::default();
        self.for_each_word(|_, word| match counted_as(word) {
            RESIDENT => counts.resident += 1,
            SWAPPED => counts.swapped += 1,
            BALLOONED => counts.ballooned += 1,
            _ => {}
        });
        counts
    }

    /// Counts a page that is not there.
    #[cfg(test)]
    pub(crate) fn miscount(&self) {
        self.counts.moved(ZERO, BALLOONED, 1);
    }

    /// Calls `visit` for every page that is or was anything but `Zero`, in order of gfn.
    pub fn for_each(&self, mut visit: impl FnMut(Gfn, PageState)) {
        self.for_each_word(|gfn, word| visit(gfn, decode(word)));
    }

    fn for_each_word(&self, mut visit: impl FnMut(Gfn, u64)) {
        for (number, table) in self.upper.iter().enumerate().filter_map(|(n, t)| Some((n, t.get()?))) {
            for (index, entry) in table.iter().enumerate() {
                let gfn = Gfn((number * TABLE_ENTRIES + index) as u32);
                visit(gfn, entry.state.load(Ordering::Acquire));
            }
        }
    }

    /// Calls `visit` for every resident page, in order of gfn.
    pub fn for_each_resident(&self, mut visit: impl FnMut(Gfn, Mfn)) {
        self.for_each(|gfn, state| {
            if let PageState::Resident(mfn) = state {
                visit(gfn, mfn);
            }
        });
    }

    fn entry(&self, gfn: Gfn) -> Option<&Entry> {
        if gfn.0 >= self.pages {
            return None;
        }
        let table = self.upper[gfn.0 as usize / TABLE_ENTRIES]
            .get_or_init(|| Box::new(std::array::from_fn(|_| Entry::default())));
        Some(&table[gfn.0 as usize % TABLE_ENTRIES])
    }
}

impl Settler<'_> {
    /// Settles a page that no vCPU can reach any more: it has lost its frame.
    #[inline]
    pub fn settle(&mut self, gfn: Gfn, to: PageState) {
        debug_assert!(is_legal(PageState::Moving, to), "INV-P2M-2: {gfn} from Moving to {to:?}");
        let Some(entry) = self.p2m.entry(gfn) else { return };
        let (was, next) = (entry.state.load(Ordering::Relaxed), encode(to));
        debug_assert!(
            was & KIND == MOVING && counted_as(was) == RESIDENT,
            "INV-P2M-3: {gfn} was moved by another"
        );
        // Nobody else changes either word of a page that moves.
        entry.state.store(next, Ordering::Release);
        let generations = entry.generations.load(Ordering::Relaxed);
        entry.generations.store(generations.wrapping_add(1 << 32), Ordering::Release);
        if let Some(range) = self.p2m.generations.get(gfn.0 as usize / TABLE_ENTRIES) {
            range.0.fetch_add(1, Ordering::AcqRel);
        }
        self.settled[(next & KIND) as usize] += 1;
    }
}

impl Drop for Settler<'_> {
    fn drop(&mut self) {
        self.p2m.advances.fetch_add(1, Ordering::Release);
        for (kind, pages) in (0..).zip(self.settled) {
            self.p2m.counts.moved(RESIDENT, kind, pages);
        }
    }
}

fn is_legal(from: PageState, to: PageState) -> bool {
    use PageState::{Ballooned, Device, Moving, Resident, Swapped, Zero};
    matches!(
        (from, to),
        (Zero, Resident(_) | Ballooned | Device)
            | (Resident(_) | Swapped(_), Moving)
            | (Moving, Resident(_) | Swapped(_) | Zero | Ballooned)
            | (Ballooned, Zero)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untouched_memory_is_zero_and_the_rest_is_device() {
        let p2m = P2m::new(1000);
        assert_eq!(p2m.lookup(Gfn(999)), PageState::Zero);
        assert_eq!(p2m.lookup(Gfn(1000)), PageState::Device);
        assert_eq!(p2m.lookup(Gfn(u32::MAX)), PageState::Device);
    }

    #[test]
    fn a_transition_from_another_state_changes_nothing() {
        let p2m = P2m::new(1);
        assert!(p2m.transition(Gfn(0), PageState::Zero, PageState::Resident(Mfn(7))));
        assert!(!p2m.transition(Gfn(0), PageState::Zero, PageState::Resident(Mfn(8))));
        assert_eq!(p2m.lookup(Gfn(0)), PageState::Resident(Mfn(7)));
    }

    #[test]
    fn generations_advance_when_they_are_told_to() {
        let p2m = P2m::new(1);
        p2m.transition(Gfn(0), PageState::Zero, PageState::Resident(Mfn(7)));
        assert_eq!(p2m.generations(Gfn(0)), Generations { mapping: 0, write: 0 });
        p2m.advance_mapping_generation(Gfn(0));
        p2m.advance_write_generation(Gfn(0));
        assert_eq!(p2m.generations(Gfn(0)), Generations { mapping: 1, write: 1 });
    }

    #[test]
    fn a_copy_stays_with_its_page_until_it_is_taken_or_the_page_moves() {
        let p2m = P2m::new(1);
        let (gfn, resident) = (Gfn(0), PageState::Resident(Mfn((1 << 29) - 1)));
        let last = SwapSlot(u32::MAX - 1);
        assert!(p2m.transition(gfn, PageState::Zero, resident));
        assert_eq!((p2m.copy(gfn), p2m.claim(gfn, resident)), (None, Some(None)));
        assert!(p2m.transition(gfn, PageState::Moving, PageState::Swapped(last)));
        assert_eq!(p2m.lookup(gfn), PageState::Swapped(last));
        assert_eq!(p2m.claim(gfn, PageState::Swapped(last)), Some(None));
        assert!(p2m.transition_with(gfn, PageState::Moving, resident, Some(last)));
        assert_eq!((p2m.lookup(gfn), p2m.copy(gfn)), (resident, Some(last)));
        assert_eq!(p2m.claim(gfn, resident), Some(Some(last)));
        assert_eq!((p2m.lookup(gfn), p2m.claim(gfn, resident)), (PageState::Moving, None));
        assert!(p2m.transition_with(gfn, PageState::Moving, resident, Some(last)));
        assert_eq!((p2m.take_copy(gfn), p2m.take_copy(gfn)), (Some(last), None));
        assert_eq!(p2m.lookup(gfn), resident);
    }

    #[test]
    fn counts_follow_every_change_and_a_moving_page_is_what_it_was() {
        let p2m = P2m::new(TABLE_ENTRIES as u32 + 8);
        let resident = |n| PageState::Resident(Mfn(n + 100));
        let counts = |resident, swapped, ballooned| PageCounts { resident, swapped, ballooned };
        for n in 0..8 {
            assert!(p2m.transition(Gfn(n), PageState::Zero, resident(n)));
        }
        assert!(p2m.transition(Gfn(TABLE_ENTRIES as u32), PageState::Zero, PageState::Ballooned));
        assert!(p2m.transition(Gfn(9), PageState::Zero, PageState::Device));
        assert!(!p2m.transition(Gfn(0), PageState::Zero, resident(9)), "nothing changes, nothing is counted");
        assert!((0..6).all(|n| p2m.claim(Gfn(n), resident(n)).is_some()));
        assert_eq!(p2m.counts(), counts(8, 0, 1));
        let mut settler = p2m.settler();
        (0..3).for_each(|n| settler.settle(Gfn(n), PageState::Swapped(SwapSlot(n))));
        settler.settle(Gfn(3), PageState::Zero);
        settler.settle(Gfn(4), PageState::Ballooned);
        drop(settler);
        assert!(p2m.transition(Gfn(5), PageState::Moving, resident(5)), "put back");
        assert_eq!(p2m.counts(), counts(3, 3, 2));
        assert!(p2m.claim(Gfn(0), PageState::Swapped(SwapSlot(0))).is_some());
        assert_eq!((p2m.counts(), p2m.count_all()), (counts(3, 3, 2), counts(3, 3, 2)));
        assert!(p2m.transition_with(Gfn(0), PageState::Moving, resident(0), Some(SwapSlot(0))));
        assert!(p2m.transition(Gfn(4), PageState::Ballooned, PageState::Zero));
        assert_eq!((p2m.counts(), p2m.count_all()), (counts(4, 2, 1), counts(4, 2, 1)));
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "INV-P2M-2")]
    fn an_illegal_transition_is_caught() {
        P2m::new(1).transition(Gfn(0), PageState::Device, PageState::Zero);
    }
}
