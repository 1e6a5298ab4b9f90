//! Frames of the machine pool: who has each, and where the next one comes from.
//!
//! Story: guest memory gets a frame on first touch, shadow tables when they are built. Frames are handed out in
//! a fixed scattered order, and never one whose number equals the gfn it is for, so that code that takes one
//! world's number for the other's breaks at once instead of working by luck.
//!
//! Holds: INV-FRAME-2, a frame has exactly one owner ([`FrameKind`]), and the free list holds exactly the free
//! ones. INV-FRAME-3, no guest frame has mfn == gfn.
//!
//! Locks: the allocator's own ([`lock_order::FRAMES`]). The flags of a guest frame change only under
//! bucket(gfn); its debt is a maximum and may rise at any time.
//!
//! Limits: 24 bytes of metadata a frame.

use crate::addr::{Gfn, Mfn};
use crate::lock_order;
use crate::sync::{AtomicU32, AtomicU64, Lock, Ordering};

/// What a frame is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// Nobody's; the allocator has it, or it waits for a flush before it may be used again.
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

const KIND_MASK: u32 = 0xff;

/// Metadata of one frame.
#[derive(Debug, Default)]
struct Frame {
    /// Kind in the low byte, flags above.
    state: AtomicU32,
    /// Gfn, slot or root, by kind.
    owner: AtomicU32,
    /// Window mappings that hold the frame in place.
    pins: AtomicU32,
    /// Generation of the code that somebody has decoded from it; 0 for none since the last store.
    code: AtomicU32,
    /// Flush clock of the last removal of an spte to this frame (see coherence).
    debt: AtomicU64,
}

#[derive(Debug)]
struct FreeList {
    /// How many of the scattered order have never been handed out yet: the next is `scatter(next)`.
    next: u32,
    returned: Vec<Mfn>,
}

/// All frames of a machine.
#[derive(Debug)]
pub struct Frames {
    frames: Box<[Frame]>,
    first: u32,
    stride: u64,
    /// The last code generation given out.
    code_clock: AtomicU32,
    free: Lock<FreeList>,
}

impl Frames {
    /// Frames `reserved..total` are free, those below are [`FrameKind::Reserved`].
    pub fn new(total: u32, reserved: u32) -> Frames {
        let frames: Box<[Frame]> = (0..total).map(|_| Frame::default()).collect();
        for frame in frames.iter().take(reserved as usize) {
            frame.state.store(1, Ordering::Relaxed);
        }
        let count = u64::from(total.saturating_sub(reserved));
        Frames {
            frames,
            first: reserved.min(total),
            stride: scatter_stride(count),
            code_clock: AtomicU32::new(0),
            free: Lock::new(lock_order::FRAMES, FreeList { next: 0, returned: Vec::new() }),
        }
    }

    /// How many frames the machine has.
    pub fn total(&self) -> u32 {
        self.frames.len() as u32
    }

    /// How many are free now.
    pub fn free_count(&self) -> u32 {
        let free = self.free.lock();
        self.total() - self.first - free.next + free.returned.len() as u32
    }

    /// Takes a free frame for `kind` (not `Free`). Its contents are what its last owner left, or zeros if it
    /// never had one. `None` when the pool is empty.
    pub fn allocate(&self, kind: FrameKind) -> Option<Mfn> {
        let mut free = self.free.lock();
        let mut mfn = self.take(&mut free)?;
        if kind == FrameKind::Guest(Gfn(mfn.0)) {
            let other = self.take(&mut free);
            free.returned.push(mfn);
            mfn = other?;
        }
        self.set_kind(mfn, kind);
        Some(mfn)
    }

    /// Gives a frame back. The caller vouches that no translation to it is left anywhere (coherence ledger).
    pub fn release(&self, mfn: Mfn) {
        self.set_kind(mfn, FrameKind::Free);
        self.free.lock().returned.push(mfn);
    }

    /// Who has the frame.
    #[inline]
    pub fn kind(&self, mfn: Mfn) -> FrameKind {
        let frame = &self.frames[mfn.0 as usize];
        let owner = frame.owner.load(Ordering::Relaxed);
        match frame.state.load(Ordering::Acquire) & KIND_MASK {
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
        self.frames[mfn.0 as usize].state.load(Ordering::Acquire) & !KIND_MASK
    }

    /// Changes flags of a guest frame. Caller holds bucket(gfn).
    pub(crate) fn change_flags(&self, mfn: Mfn, clear: u32, set: u32) {
        let state = &self.frames[mfn.0 as usize].state;
        let old = state.load(Ordering::Relaxed);
        state.store(old & !clear | set, Ordering::Release);
    }

    /// Notes that an spte to the frame was removed or narrowed at flush clock `stamp`.
    pub(crate) fn owe(&self, mfn: Mfn, stamp: u64) {
        let debt = &self.frames[mfn.0 as usize].debt;
        if debt.load(Ordering::Acquire) < stamp {
            debt.fetch_max(stamp, Ordering::AcqRel);
        }
    }

    /// The flush clock of the last removal of an spte to the frame.
    pub fn debt(&self, mfn: Mfn) -> u64 {
        self.frames[mfn.0 as usize].debt.load(Ordering::Acquire)
    }

    /// Holds the frame in place.
    #[inline]
    pub(crate) fn pin(&self, mfn: Mfn) {
        self.frames[mfn.0 as usize].pins.fetch_add(1, Ordering::Acquire);
    }

    /// Lets go of it.
    #[inline]
    pub(crate) fn unpin(&self, mfn: Mfn) {
        let before = self.frames[mfn.0 as usize].pins.fetch_sub(1, Ordering::Release);
        debug_assert!(before > 0, "INV-WINDOW-1: {mfn} unpinned more often than pinned");
    }

    /// How many window mappings hold the frame.
    pub fn pins(&self, mfn: Mfn) -> u32 {
        self.frames[mfn.0 as usize].pins.load(Ordering::Acquire)
    }

    /// Marks the frame as one that code is about to be decoded from. Returns the generation of its contents: unless it is
    /// still that, what was decoded is stale.
    ///
    /// Limits: a store by *another* vCPU's TLB that is on its way right now may miss the mark; with several vCPUs, mark and
    /// then shoot down before the bytes are read.
    pub(crate) fn mark_code(&self, mfn: Mfn) -> u32 {
        let code = &self.frames[mfn.0 as usize].code;
        let now = code.load(Ordering::SeqCst);
        if now != 0 {
            return now;
        }
        let clock = self.code_clock.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let next = if clock == 0 { self.code_clock.fetch_add(1, Ordering::Relaxed) + 1 } else { clock };
        code.store(next, Ordering::SeqCst);
        next
    }

    /// The code generation, 0 when there is none or no such frame.
    #[inline]
    pub(crate) fn code(&self, mfn: Mfn) -> u32 {
        self.frames.get(mfn.0 as usize).map_or(0, |frame| frame.code.load(Ordering::Acquire))
    }

    /// Notes a store to the frame, already made: code decoded from it is stale.
    #[inline]
    pub(crate) fn code_written(&self, mfn: Mfn) {
        let code = &self.frames[mfn.0 as usize].code;
        if code.load(Ordering::Relaxed) != 0 {
            code.store(0, Ordering::SeqCst);
        }
    }

    fn set_kind(&self, mfn: Mfn, kind: FrameKind) {
        let frame = &self.frames[mfn.0 as usize];
        frame.code.store(0, Ordering::Relaxed);
        let (code, owner) = match kind {
            FrameKind::Free => (0, 0),
            FrameKind::Reserved => (1, 0),
            FrameKind::Guest(gfn) => (2, gfn.0),
            FrameKind::Shadow(slot) => (3, slot),
            FrameKind::Root(root) => (4, root),
        };
        frame.owner.store(owner, Ordering::Relaxed);
        frame.state.store(code, Ordering::Release);
    }

    fn take(&self, free: &mut FreeList) -> Option<Mfn> {
        if let Some(mfn) = free.returned.pop() {
            return Some(mfn);
        }
        let count = u64::from(self.total() - self.first);
        if u64::from(free.next) == count {
            return None;
        }
        let at = u64::from(free.next) * self.stride % count;
        free.next += 1;
        Some(Mfn(self.first + at as u32))
    }
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
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn allocation_visits_every_frame_once_and_then_ends() {
        for total in [2, 3, 10, 97, 1000] {
            let frames = Frames::new(total, 1);
            let seen: HashSet<_> = std::iter::from_fn(|| frames.allocate(FrameKind::Shadow(0))).collect();
            assert_eq!(seen.len() as u32, total - 1);
            assert!(!seen.contains(&Mfn(0)), "reserved frames are not handed out");
            assert_eq!(frames.free_count(), 0);
        }
    }

    #[test]
    fn a_guest_frame_never_has_the_number_of_its_gfn() {
        let frames = Frames::new(64, 0);
        let mut got = 0;
        for gfn in 0..64 {
            if let Some(mfn) = frames.allocate(FrameKind::Guest(Gfn(gfn))) {
                assert_ne!(mfn.0, gfn);
                got += 1;
            }
        }
        assert!(got >= 63, "at most the last frame can be refused");
    }

    #[test]
    fn neighbours_are_scattered() {
        let frames = Frames::new(10_000, 0);
        let order: Vec<_> = (0..100).map(|_| frames.allocate(FrameKind::Shadow(0)).unwrap().0).collect();
        assert!(order.windows(2).all(|w| w[0].abs_diff(w[1]) > 100));
    }

    #[test]
    fn a_released_frame_comes_back() {
        let frames = Frames::new(2, 0);
        let a = frames.allocate(FrameKind::Shadow(1)).unwrap();
        assert_eq!(frames.kind(a), FrameKind::Shadow(1));
        frames.release(a);
        assert_eq!(frames.kind(a), FrameKind::Free);
        assert_eq!(frames.allocate(FrameKind::Root(3)), Some(a));
    }

    #[test]
    fn metadata_stays_within_its_limit() {
        assert!(size_of::<Frame>() <= 24);
    }
}
