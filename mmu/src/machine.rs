//! Machine memory: the frames the VMM really has, as one flat range of bytes.
//!
//! Story: shadow tables, guest frames and firmware all live here; a KVM memslot maps the same range, so that a
//! machine address is what KVM calls a guest-physical one. The mapping itself is `vm-memory`'s, made by the
//! caller: file backed in the VMM, anonymous in tests.
//!
//! Holds: every access is within the range; aligned words are reached as atomics only.
//!
//! Not here: which frame holds what (frames), how guest memory is reached (window).

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::{AtomicInteger, Bytes, MmapRegion, VolatileMemory, VolatileSlice};

use crate::addr::{Mfn, Mpa, PAGE_SIZE};
use crate::physical::Width;
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
        self.word(mpa)
    }

    /// The aligned 4-byte word at `mpa`. Panics like [`Machine::frame`], or if `mpa` is not a multiple of 4.
    #[inline]
    pub fn word32(&self, mpa: Mpa) -> &AtomicU32 {
        self.word(mpa)
    }

    #[inline]
    fn word<T: AtomicInteger>(&self, mpa: Mpa) -> &T {
        match self.region.get_atomic_ref(mpa.0 as usize).ok() {
            Some(word) => word,
            None => no_word(mpa),
        }
    }

    /// Loads `width` bytes at `mpa`, zero-extended, all in one frame. Whole where they lie within an aligned 8-byte word.
    ///
    /// Aligned ones are loaded by their own width: a CPU forwards a store to a load of its size, and waits with a wider one.
    #[inline]
    pub fn load(&self, mpa: Mpa, width: Width) -> u64 {
        if mpa.0 & (u64::from(width.bytes()) - 1) != 0 {
            return self.load_unaligned(mpa, width);
        }
        match width {
            Width::B1 => self.word::<AtomicU8>(mpa).load(Ordering::Acquire).into(),
            Width::B2 => self.word::<AtomicU16>(mpa).load(Ordering::Acquire).into(),
            Width::B4 => self.word32(mpa).load(Ordering::Acquire).into(),
            Width::B8 => self.word64(mpa).load(Ordering::Acquire),
        }
    }

    fn load_unaligned(&self, mpa: Mpa, width: Width) -> u64 {
        match within_word(mpa, width) {
            Some(shift) => self.word64(Mpa(mpa.0 & !7)).load(Ordering::Acquire) >> shift & width.mask(),
            None => self.load_split(mpa, width),
        }
    }

    #[cold]
    fn load_split(&self, mpa: Mpa, width: Width) -> u64 {
        let mut bytes = [0; 8];
        self.read(mpa, &mut bytes[..width.bytes() as usize]);
        u64::from_le_bytes(bytes)
    }

    /// Stores the low `width` bytes of `value` at `mpa`, all in one frame. Whole where they lie within an aligned 8-byte word.
    #[inline]
    pub fn store(&self, mpa: Mpa, width: Width, value: u64) {
        if mpa.0 & (u64::from(width.bytes()) - 1) != 0 {
            return self.store_unaligned(mpa, width, value);
        }
        match width {
            Width::B1 => self.word::<AtomicU8>(mpa).store(value as u8, Ordering::Release),
            Width::B2 => self.word::<AtomicU16>(mpa).store(value as u16, Ordering::Release),
            Width::B4 => self.word32(mpa).store(value as u32, Ordering::Release),
            Width::B8 => self.word64(mpa).store(value, Ordering::Release),
        }
    }

    fn store_unaligned(&self, mpa: Mpa, width: Width, value: u64) {
        match within_word(mpa, width) {
            Some(_) => drop(self.update(mpa, width, &mut |_| value)),
            None => self.write(mpa, &value.to_le_bytes()[..width.bytes() as usize]),
        }
    }

    /// Replaces the `width` bytes at `mpa`, all in one frame, by `change` of them and returns the old ones: atomically
    /// where they lie within an aligned 8-byte word (else it is a split lock, which this is not atomic for). `change` may
    /// run more than once.
    #[inline]
    pub fn update(&self, mpa: Mpa, width: Width, change: &mut dyn FnMut(u64) -> u64) -> u64 {
        let Some(shift) = within_word(mpa, width) else {
            let old = self.load_split(mpa, width);
            self.store(mpa, width, change(old));
            return old;
        };
        let word = self.word64(Mpa(mpa.0 & !7));
        let mask = width.mask() << shift;
        let mut seen = word.load(Ordering::Acquire);
        loop {
            let old = seen >> shift & width.mask();
            let new = seen & !mask | change(old) << shift & mask;
            match word.compare_exchange_weak(seen, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return old,
                Err(now) => seen = now,
            }
        }
    }

    /// Copies out; the bytes are all in one frame.
    pub fn read(&self, mpa: Mpa, buffer: &mut [u8]) {
        let done = self.frame(mpa.mfn()).read_slice(buffer, (mpa.0 % PAGE_SIZE) as usize);
        debug_assert!(done.is_ok(), "a read stays within its frame: {done:?}");
    }

    /// Copies in; the bytes are all in one frame.
    pub fn write(&self, mpa: Mpa, data: &[u8]) {
        let done = self.frame(mpa.mfn()).write_slice(data, (mpa.0 % PAGE_SIZE) as usize);
        debug_assert!(done.is_ok(), "a write stays within its frame: {done:?}");
    }

    /// True when the frame has nothing but zeros.
    pub fn is_zero(&self, mfn: Mfn) -> bool {
        (0..PAGE_SIZE as u32)
            .step_by(8)
            .all(|offset| self.word64(mfn.at(offset)).load(Ordering::Relaxed) == 0)
    }

    /// Fills one frame with zeros.
    pub fn clear(&self, mfn: Mfn) {
        for offset in (0..PAGE_SIZE as u32).step_by(8) {
            self.word64(mfn.at(offset)).store(0, Ordering::Relaxed);
        }
    }
}

/// Out of line, so that who loads a word needs no stack for it.
#[cold]
#[inline(never)]
fn no_word(mpa: Mpa) -> ! {
    panic!("INV-FRAME-1: {mpa} is no aligned word of the pool")
}

/// The bit position of an access in the aligned 8-byte word around it, if it lies within one.
#[inline]
fn within_word(mpa: Mpa, width: Width) -> Option<u32> {
    let at = (mpa.0 % 8) as u32;
    (at + width.bytes() <= 8).then_some(at * 8)
}
