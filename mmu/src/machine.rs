//! Machine memory: the frames the VMM really has, as one flat range of bytes.
//!
//! Story: shadow tables, guest frames and firmware all live here; a KVM memslot maps the same range, so that a
//! machine address is what KVM calls a guest-physical one. The mapping itself is `vm-memory`'s, made by the
//! caller: file backed in the VMM, anonymous in tests.
//!
//! Holds: every access is within the range; aligned words are reached as atomics only. One that is not aligned is a single load or
//! store of this CPU's, at an address as much off as the guest's is: it is as whole as the guest has it from such a CPU.
//!
//! Not here: which frame holds what (frames), how guest memory is reached (window).

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, compiler_fence};

use vm_memory::{AtomicInteger, ByteValued, Bytes, MmapRegion, VolatileMemory, VolatileRef, VolatileSlice};

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

    /// A scalar at any address.
    #[inline]
    fn scalar<T: ByteValued>(&self, mpa: Mpa) -> VolatileRef<'_, T> {
        match self.region.get_ref(mpa.0 as usize).ok() {
            Some(scalar) => scalar,
            None => no_word(mpa),
        }
    }

    /// Loads `width` bytes at `mpa`, zero-extended, all in one frame. As whole as a load of this CPU's.
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
        compiler_fence(Ordering::SeqCst);
        let value = match width {
            Width::B1 => self.scalar::<u8>(mpa).load().into(),
            Width::B2 => self.scalar::<u16>(mpa).load().into(),
            Width::B4 => self.scalar::<u32>(mpa).load().into(),
            Width::B8 => self.scalar::<u64>(mpa).load(),
        };
        compiler_fence(Ordering::SeqCst);
        value
    }

    /// Stores the low `width` bytes of `value` at `mpa`, all in one frame. As whole as a store of this CPU's.
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
        compiler_fence(Ordering::SeqCst);
        match width {
            Width::B1 => self.scalar::<u8>(mpa).store(value as u8),
            Width::B2 => self.scalar::<u16>(mpa).store(value as u16),
            Width::B4 => self.scalar::<u32>(mpa).store(value as u32),
            Width::B8 => self.scalar::<u64>(mpa).store(value),
        }
        compiler_fence(Ordering::SeqCst);
    }

    /// Replaces the `width` bytes at `mpa`, all in one frame, by `change` of them and returns the old ones: atomically
    /// where they lie within an aligned 8-byte word. Where they do not it is a load and a store: whose access is locked
    /// has locked the bus ([`crate::Coherence::lock_bus`]). `change` may run more than once.
    #[inline]
    pub fn update(&self, mpa: Mpa, width: Width, change: &mut dyn FnMut(u64) -> u64) -> u64 {
        let Some(shift) = within_word(mpa, width) else {
            let old = self.load(mpa, width);
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

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    /// Loads, while another thread stores, that must not be half of one store and half of another.
    const LOADS: u32 = 300_000;

    /// Whether a load of two stores at `offset` of a cache line was half of either.
    fn tears(offset: u64, width: Width, load: fn(&Machine, Mpa, Width) -> u64) -> bool {
        let (machine, at, over) = (Machine::anonymous(1), Mpa(64 + offset), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    machine.store(at, width, 0);
                    machine.store(at, width, u64::MAX);
                }
            });
            let torn = (0..LOADS).any(|_| ![0, width.mask()].contains(&load(&machine, at, width)));
            over.store(true, Ordering::Relaxed);
            torn
        })
    }

    #[test]
    fn scalars_across_8_bytes_do_not_tear() {
        // Within 16 aligned bytes, which no CPU of today takes apart.
        for (offset, width) in [(6, Width::B4), (7, Width::B2), (4, Width::B8)] {
            assert!(!tears(offset, width, Machine::load), "{width:?} at {offset}");
        }
    }

    /// The twin: the same loads byte by byte.
    #[test]
    fn twin_loads_byte_by_byte_are_seen_to_tear() {
        let by_bytes = |machine: &Machine, at: Mpa, width: Width| {
            let byte = |n: u32| machine.load(Mpa(at.0 + u64::from(n)), Width::B1) << (8 * n);
            (0..width.bytes()).map(byte).sum()
        };
        assert!((0..100).any(|_| tears(6, Width::B4, by_bytes)));
    }

    #[test]
    fn scalars_at_any_offset_are_what_was_stored() {
        let machine = Machine::anonymous(1);
        for width in [Width::B1, Width::B2, Width::B4, Width::B8] {
            for offset in (0..80).chain(4090..=4096 - u64::from(width.bytes())) {
                machine.clear(Mfn(0));
                machine.store(Mpa(offset), width, 0x8182_8384_8586_8788);
                let mut bytes = [0; 8];
                machine.read(Mpa(offset), &mut bytes[..width.bytes() as usize]);
                assert_eq!(
                    u64::from_le_bytes(bytes),
                    0x8182_8384_8586_8788 & width.mask(),
                    "{width:?} at {offset}"
                );
                assert_eq!(machine.update(Mpa(offset), width, &mut |old| old + 1), u64::from_le_bytes(bytes));
                assert_eq!(machine.load(Mpa(offset), width), u64::from_le_bytes(bytes) + 1);
                let around = (0..512).map(|n| machine.load(Mpa(n * 8), Width::B8).count_ones()).sum::<u32>();
                assert_eq!(around, (u64::from_le_bytes(bytes) + 1).count_ones(), "and nothing beside it");
            }
        }
    }
}
