//! Swap: where pages go that have no frame. Slots, who has each, and the device behind them.
//!
//! Story: reclaim takes runs of adjacent slots (`SwapMap::take_run`) and writes a batch of pages to each in one call; a
//! page that comes back has its neighbours in the cluster read with it (`SwapMap::neighbours`). The device is the
//! outside's; its in-memory twin is [`MemorySwap`].
//!
//! Holds: INV-SWAP-1, a slot in use names the gfn that has it: as its place, or as the copy of its resident page.
//!
//! Locks: [`lock_order::SWAP_MAP`], a leaf, for the map. The device is called with no lock held; it may sleep.
//!
//! Limits: a slot is a page; slots are 32 bits less one. 4 bytes a slot, made when the first one is taken.

use std::io;
use std::ops::Range;

use crate::addr::{Gfn, PAGE_SIZE};
use crate::lock_order;
use crate::sync::{self, AtomicU64, Lock, Ordering};

/// A page's place on the swap device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SwapSlot(pub u32);

/// Slots that are looked at together: what one write takes at most, 128 KiB.
pub const CLUSTER: u32 = 32;
/// Slots that one read brings in at most, aligned.
pub const READ_AHEAD: u32 = 8;

/// Where swapped pages are kept. Called with no lock held; may sleep. Errors are the run's end: a page that cannot be read
/// back must not be guessed.
pub trait SwapDevice: Send + Sync + std::fmt::Debug {
    /// How many slots it has.
    fn slots(&self) -> u32;

    /// Writes whole pages to adjacent slots from `first` on: all of them, or an error.
    ///
    /// # Errors
    ///
    /// As the medium has it; the pages stay where they are then.
    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()>;

    /// Reads whole pages from adjacent slots from `first` on.
    ///
    /// # Errors
    ///
    /// As the medium has it; fewer bytes than asked for are an error.
    fn read(&self, first: SwapSlot, pages: &mut [u8]) -> io::Result<()>;

    /// The contents of these slots are not wanted any more: the medium may forget them.
    fn discard(&self, slots: Range<u32>);
}

/// No swap at all.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoSwap;

impl SwapDevice for NoSwap {
    fn slots(&self) -> u32 {
        0
    }

    fn write(&self, _first: SwapSlot, _pages: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn read(&self, _first: SwapSlot, _pages: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn discard(&self, _slots: Range<u32>) {}
}

/// What the swap has done and has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwapStats {
    /// Slots there are.
    pub slots: u32,
    /// Slots in use, copies of resident pages among them.
    pub slots_used: u32,
    /// Pages written.
    pub pages_written: u64,
    /// Writes, each of adjacent pages.
    pub writes: u64,
    /// Pages read, those read ahead among them.
    pub pages_read: u64,
    /// Reads.
    pub reads: u64,
}

#[derive(Debug, Default)]
struct Map {
    /// One more than the gfn that has the slot; 0 for a free one. Empty until the first slot is taken.
    owners: Vec<u32>,
    used: u32,
    /// In use, and wanted by nobody.
    abandoned: Vec<u32>,
    /// Where the search for free slots goes on.
    next: u32,
}

/// Who has each slot, and the device.
#[derive(Debug)]
pub(crate) struct SwapMap {
    device: Box<dyn SwapDevice>,
    slots: u32,
    map: Lock<Map>,
    pages_written: AtomicU64,
    writes: AtomicU64,
    pages_read: AtomicU64,
    reads: AtomicU64,
}

impl SwapMap {
    pub fn new(device: Box<dyn SwapDevice>) -> SwapMap {
        SwapMap {
            slots: device.slots().min(u32::MAX - 1),
            device,
            map: Lock::new(lock_order::SWAP_MAP, Map::default()),
            pages_written: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            pages_read: AtomicU64::new(0),
            reads: AtomicU64::new(0),
        }
    }

    /// What it has done so far.
    pub fn stats(&self) -> SwapStats {
        let slots_used = {
            let map = self.map.lock();
            map.used - map.abandoned.len() as u32
        };
        SwapStats {
            slots: self.slots,
            slots_used,
            pages_written: self.pages_written.load(Ordering::Relaxed),
            writes: self.writes.load(Ordering::Relaxed),
            pages_read: self.pages_read.load(Ordering::Relaxed),
            reads: self.reads.load(Ordering::Relaxed),
        }
    }

    /// Takes adjacent free slots for some of `gfns`, from the first on: as many as one run has, preferring a run for all
    /// of them. `None` when every slot is taken.
    pub fn take_run(&self, gfns: &[Gfn]) -> Option<Range<u32>> {
        let want = gfns.len() as u32;
        let mut map = self.map.lock();
        if map.owners.is_empty() {
            map.owners = vec![0; self.slots as usize];
        }
        let run = map.find_run(want)?;
        for (slot, gfn) in run.clone().zip(gfns) {
            map.owners[slot as usize] = gfn.0 + 1;
        }
        map.used += run.len() as u32;
        map.next = run.end;
        Some(run)
    }

    /// Gives slots back. The device forgets them first: once they are free, another may be writing to them.
    pub fn free(&self, slots: Range<u32>) {
        lock_order::assert_may_sleep();
        self.device.discard(slots.clone());
        let mut map = self.map.lock();
        map.used -= slots.len() as u32;
        for slot in slots {
            debug_assert_ne!(map.owners[slot as usize], 0, "INV-SWAP-1: slot {slot} freed twice");
            map.owners[slot as usize] = 0;
        }
    }

    /// Gives up the slot of a copy that is no good any more. The device is told later: locks may be held here.
    pub fn abandon(&self, slot: SwapSlot) {
        self.map.lock().abandoned.push(slot.0);
    }

    /// Frees what was abandoned.
    pub fn discard_abandoned(&self) {
        let mut slots = std::mem::take(&mut self.map.lock().abandoned);
        slots.sort_unstable();
        for run in slots.chunk_by(|a, b| a + 1 == *b) {
            self.free(run[0]..run[0] + run.len() as u32);
        }
    }

    /// Who has the slot.
    pub fn owner(&self, slot: SwapSlot) -> Option<Gfn> {
        let map = self.map.lock();
        map.owners.get(slot.0 as usize)?.checked_sub(1).map(Gfn)
    }

    /// The slots around `slot` that one read would bring in, with who has each; those in front and behind that are free
    /// are left out.
    pub fn neighbours(&self, slot: SwapSlot) -> Vec<(SwapSlot, Gfn)> {
        let first = slot.0 / READ_AHEAD * READ_AHEAD;
        let map = self.map.lock();
        let owned = |n: u32| Some((SwapSlot(n), Gfn(map.owners.get(n as usize)?.checked_sub(1)?)));
        (first..first + READ_AHEAD).filter_map(owned).collect()
    }

    /// Writes pages to the slots from `first` on.
    pub fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        lock_order::assert_may_sleep();
        sync::transfer();
        self.device.write(first, pages)?;
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.pages_written.fetch_add(pages.len() as u64 / PAGE_SIZE, Ordering::Relaxed);
        Ok(())
    }

    /// Reads pages from the slots from `first` on.
    pub fn read(&self, first: SwapSlot, pages: &mut [u8]) -> io::Result<()> {
        lock_order::assert_may_sleep();
        sync::transfer();
        self.device.read(first, pages)?;
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.pages_read.fetch_add(pages.len() as u64 / PAGE_SIZE, Ordering::Relaxed);
        Ok(())
    }
}

impl Map {
    /// A run of at most `want` free slots: the first that is long enough, from where the last one ended; else the longest.
    fn find_run(&self, want: u32) -> Option<Range<u32>> {
        let slots = self.owners.len() as u32;
        if self.used == slots {
            return None;
        }
        let mut best = 0..0;
        for part in [self.next.min(slots)..slots, 0..self.next.min(slots)] {
            let mut at = part.start;
            while at < part.end {
                let free = self.free_from(at, part.end.min(at + want));
                if free.len() > best.len() {
                    best = free.clone();
                }
                if best.len() as u32 == want {
                    return Some(best);
                }
                at = free.end + 1;
            }
        }
        (!best.is_empty()).then_some(best)
    }

    fn free_from(&self, at: u32, end: u32) -> Range<u32> {
        let taken = (at..end).find(|slot| self.owners[*slot as usize] != 0);
        at..taken.unwrap_or(end)
    }
}

type Page = [u8; PAGE_SIZE as usize];
type Cluster = [Option<Box<Page>>; CLUSTER as usize];

/// A swap device in memory that takes a page for each slot in use. The twin for tests, and what `--swap SIZE` uses.
#[derive(Debug)]
pub struct MemorySwap {
    slots: u32,
    clusters: Box<[Lock<Cluster>]>,
}

impl MemorySwap {
    /// A device of `slots` slots.
    pub fn new(slots: u32) -> MemorySwap {
        let cluster = |_| Lock::new(lock_order::SWAP_CLUSTER, Cluster::default());
        MemorySwap { slots, clusters: (0..slots.div_ceil(CLUSTER)).map(cluster).collect() }
    }

    fn check(&self, first: SwapSlot, bytes: usize) -> io::Result<()> {
        let end = u64::from(first.0) + bytes as u64 / PAGE_SIZE;
        if end > u64::from(self.slots) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the swap device"));
        }
        Ok(())
    }

    fn with<R>(&self, slot: u32, call: impl FnOnce(&mut Option<Box<Page>>) -> R) -> R {
        let mut cluster = self.clusters[(slot / CLUSTER) as usize].lock();
        call(&mut cluster[(slot % CLUSTER) as usize])
    }
}

impl SwapDevice for MemorySwap {
    fn slots(&self) -> u32 {
        self.slots
    }

    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        self.check(first, pages.len())?;
        for (slot, page) in (first.0..).zip(pages.chunks_exact(PAGE_SIZE as usize)) {
            self.with(slot, |place| place.get_or_insert_with(|| Box::new([0; 4096])).copy_from_slice(page));
        }
        Ok(())
    }

    fn read(&self, first: SwapSlot, pages: &mut [u8]) -> io::Result<()> {
        self.check(first, pages.len())?;
        for (slot, page) in (first.0..).zip(pages.chunks_exact_mut(PAGE_SIZE as usize)) {
            self.with(slot, |place| match place {
                Some(kept) => page.copy_from_slice(&kept[..]),
                None => page.fill(0),
            });
        }
        Ok(())
    }

    fn discard(&self, slots: Range<u32>) {
        slots.filter(|slot| *slot < self.slots).for_each(|slot| self.with(slot, |place| *place = None));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gfns(range: Range<u32>) -> Vec<Gfn> {
        range.map(Gfn).collect()
    }

    fn map(slots: u32) -> SwapMap {
        SwapMap::new(Box::new(MemorySwap::new(slots)))
    }

    #[test]
    fn runs_are_adjacent_and_go_on_from_the_last() {
        let map = map(100);
        assert_eq!(map.take_run(&gfns(0..32)), Some(0..32));
        assert_eq!(map.take_run(&gfns(32..40)), Some(32..40));
        assert_eq!((map.owner(SwapSlot(33)), map.owner(SwapSlot(40))), (Some(Gfn(33)), None));
        map.free(0..32);
        assert_eq!(map.take_run(&gfns(50..82)), Some(40..72), "onward, not back into the hole");
        assert_eq!(map.take_run(&gfns(90..122)), Some(0..32), "the end has no room for all");
        assert_eq!(map.stats().slots_used, 72);
    }

    #[test]
    fn a_run_that_is_too_short_is_the_longest_there_is() {
        let map = map(16);
        assert_eq!(map.take_run(&gfns(0..16)), Some(0..16));
        map.free(2..4);
        (8..13).for_each(|slot| map.abandon(SwapSlot(slot)));
        assert_eq!(map.stats().slots_used, 9);
        map.discard_abandoned();
        map.free(15..16);
        assert_eq!(map.take_run(&gfns(20..30)), Some(8..13));
        assert_eq!(map.take_run(&gfns(30..31)), Some(15..16));
        assert_eq!(map.take_run(&gfns(30..36)), Some(2..4));
        assert_eq!(map.take_run(&gfns(40..41)), None);
    }

    #[test]
    fn no_swap_has_no_slot() {
        assert_eq!(SwapMap::new(Box::new(NoSwap)).take_run(&gfns(0..1)), None);
    }

    #[test]
    fn neighbours_are_those_of_the_aligned_window() {
        let map = map(64);
        map.take_run(&gfns(100..120));
        let around = map.neighbours(SwapSlot(17));
        assert_eq!(around.first(), Some(&(SwapSlot(16), Gfn(116))));
        assert_eq!(around.len(), 4, "16 to 19 are taken");
    }

    #[test]
    fn memory_swap_keeps_pages_until_they_are_discarded() {
        let swap = MemorySwap::new(70);
        let pages: Vec<u8> = (0..3 * 4096u32).map(|n| (n / 7) as u8).collect();
        swap.write(SwapSlot(31), &pages).expect("within");
        let mut back = vec![0; pages.len()];
        swap.read(SwapSlot(31), &mut back).expect("within");
        assert!(back == pages);
        swap.discard(31..34);
        assert!(swap.clusters.iter().all(|cluster| cluster.lock().iter().all(Option::is_none)));
        assert!(swap.write(SwapSlot(69), &pages).is_err());
    }
}
