//! Machine memory: the frames the VMM really has, as one flat range of bytes.
//!
//! Story: shadow tables, guest frames and firmware all live here; a KVM memslot maps the same range, so that a
//! machine address is what KVM calls a guest-physical one. The mapping itself is `vm-memory`'s, made by the
//! caller: file backed in the VMM, anonymous in tests.
//!
//! Holds: every access is within the range; aligned words are reached as atomics only.
//!
//! Not here: which frame holds what (frames), how guest memory is reached (window).

use std::sync::atomic::{AtomicU32, AtomicU64};

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use crate::addr::{Mfn, Mpa, PAGE_SIZE};
use crate::sync::Arc;

/// The machine pool.
#[derive(Clone, Debug)]
pub struct Machine {
    region: Arc<MmapRegion>,
}

impl Machine {
    /// The machine whose memory is `region`; a tail that is no whole page is never used.
    pub fn new(region: Arc<MmapRegion>) -> Machine {
        Machine { region }
    }

    /// A machine of `frames` zeroed frames in anonymous memory: the twin for tests, benches and simulation.
    pub fn anonymous(frames: u32) -> Machine {
        let bytes = frames as usize * PAGE_SIZE as usize;
        Machine::new(Arc::new(MmapRegion::new(bytes).expect("anonymous memory for a test machine")))
    }

    /// How many whole frames there are.
    pub fn frames(&self) -> u32 {
        (self.region.size() / PAGE_SIZE as usize) as u32
    }

    /// All of it as one slice.
    pub fn slice(&self) -> VolatileSlice<'_> {
        self.region.as_volatile_slice()
    }

    /// The bytes of one frame.
    ///
    /// # Panics
    ///
    /// If `mfn` is not of this machine: a bug, since frames come from the allocator alone.
    pub fn frame(&self, mfn: Mfn) -> VolatileSlice<'_> {
        self.slice()
            .subslice(mfn.at(0).0 as usize, PAGE_SIZE as usize)
            .expect("INV-FRAME-1: a frame of the pool")
    }

    /// The aligned 8-byte word at `mpa`. Panics like [`Machine::frame`], or if `mpa` is not a multiple of 8.
    #[inline]
    pub fn word64(&self, mpa: Mpa) -> &AtomicU64 {
        self.region.get_atomic_ref(mpa.0 as usize).expect("INV-FRAME-1: an aligned word of the pool")
    }

    /// The aligned 4-byte word at `mpa`. Panics like [`Machine::frame`], or if `mpa` is not a multiple of 4.
    #[inline]
    pub fn word32(&self, mpa: Mpa) -> &AtomicU32 {
        self.region.get_atomic_ref(mpa.0 as usize).expect("INV-FRAME-1: an aligned word of the pool")
    }

    /// Fills one frame with zeros.
    pub fn clear(&self, mfn: Mfn) {
        for offset in (0..PAGE_SIZE as u32).step_by(8) {
            self.word64(mfn.at(offset)).store(0, std::sync::atomic::Ordering::Relaxed);
        }
    }
}
