//! The p2m: guest frame number -> where that page is now. Two levels.
//!
//! Story: guest-physical space exists here and nowhere else. An upper entry covers 2 MiB (512 gfns); a lower one
//! is a page. Lookups take no lock: both levels are atomics.
//!
//! Holds: INV-P2M-1, a `Resident(mfn)` entry's frame names that gfn as its owner. INV-P2M-2, legal transitions
//! only (asserted at each). The generations of an entry never go down; `mapping` advances when
//! the page changes frames, `write` when write permission was taken away.
//!
//! Limits: guest frame numbers are 24 bits (64 GiB). 16 bytes an entry, in tables made on first touch.
//!
//! Not here: `Swapped`, `Ballooned`, `Huge` and `Moving` have their codes reserved and no producer yet.

use crate::addr::{Gfn, Mfn};
use crate::sync::{AtomicU64, OnceLock, Ordering};

/// Pages under one upper entry.
pub const TABLE_ENTRIES: usize = 512;
/// The most guest frames there can be: 36 bits of guest-physical address.
pub const GFN_MAX: u32 = 1 << 24;

/// The state of a guest page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Guest memory that nobody has touched: reads as zeros, has no frame.
    Zero,
    /// In this machine frame.
    Resident(Mfn),
    /// No memory: a device, or nothing at all.
    Device,
}

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
    /// Kind in the low 3 bits, the frame above.
    state: AtomicU64,
    /// `mapping` in the upper half, `write` in the lower.
    generations: AtomicU64,
}

const ZERO: u64 = 0;
const RESIDENT: u64 = 1;
const DEVICE: u64 = 4;

fn encode(state: PageState) -> u64 {
    match state {
        PageState::Zero => ZERO,
        PageState::Resident(mfn) => RESIDENT | u64::from(mfn.0) << 3,
        PageState::Device => DEVICE,
    }
}

fn decode(word: u64) -> PageState {
    match word & 7 {
        ZERO => PageState::Zero,
        RESIDENT => PageState::Resident(Mfn((word >> 3) as u32)),
        _ => PageState::Device,
    }
}

type Table = [Entry; TABLE_ENTRIES];

/// The map of one guest.
#[derive(Debug)]
pub struct P2m {
    /// `None` until a gfn of the range is touched: then all of it is `Zero`.
    upper: Box<[OnceLock<Box<Table>>]>,
    pages: u32,
    /// How often a generation has advanced, of any entry.
    advances: AtomicU64,
}

impl P2m {
    /// A guest of `pages` pages of memory from gfn 0 (at most [`GFN_MAX`], the rest is cut off), all `Zero`;
    /// everything above is `Device`.
    pub fn new(pages: u32) -> P2m {
        let pages = pages.min(GFN_MAX);
        let tables = (pages as usize).div_ceil(TABLE_ENTRIES);
        P2m { upper: (0..tables).map(|_| OnceLock::new()).collect(), pages, advances: AtomicU64::new(0) }
    }

    /// Pages of guest memory.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Where the page is now.
    #[inline(always)]
    pub fn lookup(&self, gfn: Gfn) -> PageState {
        if gfn.0 >= self.pages {
            return PageState::Device;
        }
        match self.upper[gfn.0 as usize / TABLE_ENTRIES].get() {
            None => PageState::Zero,
            Some(table) => decode(table[gfn.0 as usize % TABLE_ENTRIES].state.load(Ordering::Acquire)),
        }
    }

    /// The entry's generations. Read them in the critical section that makes a mapping.
    #[inline]
    pub fn generations(&self, gfn: Gfn) -> Generations {
        let word = self.entry(gfn).map_or(0, |e| e.generations.load(Ordering::Acquire));
        Generations { mapping: (word >> 32) as u32, write: word as u32 }
    }

    /// The frame of a page, and how often the page changed frames before: as long as both are so, what is read there is
    /// the page's.
    #[inline]
    pub(crate) fn holder(&self, gfn: Gfn) -> Option<(Mfn, u32)> {
        let entry = self.upper.get(gfn.0 as usize / TABLE_ENTRIES)?.get()?;
        let entry = &entry[gfn.0 as usize % TABLE_ENTRIES];
        match decode(entry.state.load(Ordering::Acquire)) {
            PageState::Resident(mfn) => Some((mfn, (entry.generations.load(Ordering::Acquire) >> 32) as u32)),
            _ => None,
        }
    }

    /// Moves an entry from `from` to `to` if it still is `from`; says whether it was.
    ///
    /// # Panics
    ///
    /// In debug builds if the transition is not a legal one (INV-P2M-2).
    pub(crate) fn transition(&self, gfn: Gfn, from: PageState, to: PageState) -> bool {
        debug_assert!(is_legal(from, to), "INV-P2M-2: {gfn} from {from:?} to {to:?}");
        let Some(entry) = self.entry(gfn) else { return false };
        let moved = entry
            .state
            .compare_exchange(encode(from), encode(to), Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        if moved && matches!(from, PageState::Resident(_)) {
            entry.generations.fetch_add(1 << 32, Ordering::AcqRel);
            self.advances.fetch_add(1, Ordering::Release);
        }
        moved
    }

    /// Notes that write permission was withdrawn everywhere. Caller holds bucket(gfn).
    pub(crate) fn advance_write_generation(&self, gfn: Gfn) {
        let Some(entry) = self.entry(gfn) else { return };
        let word = entry.generations.load(Ordering::Relaxed);
        let next = word & !0xffff_ffff | u64::from((word as u32).wrapping_add(1));
        entry.generations.store(next, Ordering::Release);
        self.advances.fetch_add(1, Ordering::Release);
    }

    /// A number that changes after any entry's generations have: while it stands still, so do they.
    #[inline]
    pub fn advances(&self) -> u64 {
        self.advances.load(Ordering::Acquire)
    }

    /// Calls `visit` for every resident page, in order of gfn.
    pub fn for_each_resident(&self, mut visit: impl FnMut(Gfn, Mfn)) {
        for (number, table) in self.upper.iter().enumerate().filter_map(|(n, t)| Some((n, t.get()?))) {
            for (index, entry) in table.iter().enumerate() {
                if let PageState::Resident(mfn) = decode(entry.state.load(Ordering::Acquire)) {
                    visit(Gfn((number * TABLE_ENTRIES + index) as u32), mfn);
                }
            }
        }
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

fn is_legal(from: PageState, to: PageState) -> bool {
    matches!(
        (from, to),
        (PageState::Zero, PageState::Resident(_) | PageState::Device)
            | (PageState::Resident(_), PageState::Zero | PageState::Resident(_))
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
    fn generations_advance_with_the_frame_and_with_write_permission() {
        let p2m = P2m::new(1);
        p2m.transition(Gfn(0), PageState::Zero, PageState::Resident(Mfn(7)));
        assert_eq!(p2m.generations(Gfn(0)), Generations { mapping: 0, write: 0 });
        p2m.transition(Gfn(0), PageState::Resident(Mfn(7)), PageState::Resident(Mfn(9)));
        p2m.advance_write_generation(Gfn(0));
        assert_eq!(p2m.generations(Gfn(0)), Generations { mapping: 1, write: 1 });
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "INV-P2M-2")]
    fn an_illegal_transition_is_caught() {
        P2m::new(1).transition(Gfn(0), PageState::Device, PageState::Zero);
    }
}
