//! Where guest memory lies in guest-physical space, and what firmware says of it.
//!
//! Story: QEMU's microvm puts up to 3 GiB at zero and the rest at 4 GiB, with devices in between. Guest memory is
//! whole below that: what PC history reserves under 1 MiB is memory too, which firmware merely does not offer. So a
//! kernel that prints to 0xb8000 writes to memory nobody looks at.
//!
//! See: Multiboot specification 0.6.96, section 3.3, `mmap_*`.

use std::ops::Range;

use umbra_mmu::Gpa;

/// The least memory a guest can have, 2 MiB: a kernel at 1 MiB and something to run on.
pub const MEMORY_BYTES_MIN: u64 = 2 << 20;
/// The most memory a guest can have, 16 GiB.
pub const MEMORY_BYTES_MAX: u64 = 16 << 30;
/// Memory beyond this lies above 4 GiB.
const LOW_BYTES_MAX: u64 = 3 << 30;
/// Where the memory above the hole begins.
const HIGH_START: u64 = 4 << 30;
/// Where an extended BIOS data area would begin: the end of conventional memory.
const EBDA: u64 = 0x9fc00;
const VIDEO: u64 = 0xa0000;
const BIOS: u64 = 0xf0000;
const MIB: u64 = 0x10_0000;

/// Why there can be no guest of this size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemorySizeError {
    /// Outside [`MEMORY_BYTES_MIN`]..=[`MEMORY_BYTES_MAX`].
    #[error(
        "guest memory of {0} bytes is not between {min} and {max} bytes (2M to 16G); choose a size in between",
        min = MEMORY_BYTES_MIN, max = MEMORY_BYTES_MAX
    )]
    OutOfRange(u64),
    /// Not a multiple of 4 KiB.
    #[error("guest memory of {0} bytes is not a multiple of 4096; round it to whole pages")]
    NotWholePages(u64),
}

/// The layout of a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMap {
    below_4g: u64,
    above_4g: u64,
}

/// What firmware says of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Free for the kernel; type 1.
    Usable = 1,
    /// Not for the kernel; type 2.
    Reserved = 2,
}

impl MemoryMap {
    /// The layout of `bytes` of memory, a multiple of 4 KiB.
    pub fn new(bytes: u64) -> Result<MemoryMap, MemorySizeError> {
        if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&bytes) {
            return Err(MemorySizeError::OutOfRange(bytes));
        }
        if !bytes.is_multiple_of(4096) {
            return Err(MemorySizeError::NotWholePages(bytes));
        }
        let below_4g = bytes.min(LOW_BYTES_MAX);
        Ok(MemoryMap { below_4g, above_4g: bytes - below_4g })
    }

    /// Bytes of memory from zero on.
    pub fn below_4g(&self) -> u64 {
        self.below_4g
    }

    /// Bytes of memory from 4 GiB on.
    pub fn above_4g(&self) -> u64 {
        self.above_4g
    }

    /// All guest memory, in ascending order: one range, or two.
    pub fn ram(&self) -> impl Iterator<Item = Range<Gpa>> + use<> {
        let high = (self.above_4g != 0).then(|| Gpa(HIGH_START)..Gpa(HIGH_START + self.above_4g));
        std::iter::once(Gpa(0)..Gpa(self.below_4g)).chain(high)
    }

    /// The firmware's map, in ascending order. What it does not list is not memory.
    pub fn firmware(&self) -> impl Iterator<Item = (Range<Gpa>, RangeKind)> + use<> {
        let low = [
            (0..EBDA, RangeKind::Usable),
            (EBDA..VIDEO, RangeKind::Reserved),
            (BIOS..MIB, RangeKind::Reserved),
            (MIB..self.below_4g, RangeKind::Usable),
        ];
        let high =
            (self.above_4g != 0).then_some((HIGH_START..HIGH_START + self.above_4g, RangeKind::Usable));
        low.into_iter().chain(high).map(|(range, kind)| (Gpa(range.start)..Gpa(range.end), kind))
    }

    /// The usable ranges below 4 GiB: what a loader may fill.
    pub fn loadable(&self) -> [Range<u64>; 2] {
        [0..EBDA, MIB..self.below_4g]
    }

    /// KiB of conventional memory, as firmware counts it.
    pub fn lower_kib(&self) -> u32 {
        (EBDA >> 10) as u32
    }

    /// KiB of memory from 1 MiB up to the first hole.
    pub fn upper_kib(&self) -> u32 {
        ((self.below_4g - MIB) >> 10) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_splits_where_microvm_splits_it() {
        // As read from QEMU 7.2, -M microvm -m 4G: "info mtree".
        let map = MemoryMap::new(4 << 30).unwrap();
        let ram: Vec<_> = map.ram().collect();
        assert_eq!(ram, [Gpa(0)..Gpa(0xc000_0000), Gpa(0x1_0000_0000)..Gpa(0x1_4000_0000)]);
        assert_eq!(MemoryMap::new(3 << 30).unwrap().ram().count(), 1);
    }

    #[test]
    fn firmware_map_is_ordered_and_within_memory() {
        for bytes in [MEMORY_BYTES_MIN, 64 << 20, 3 << 30, (3 << 30) + 4096, MEMORY_BYTES_MAX] {
            let map = MemoryMap::new(bytes).unwrap();
            let mut end = Gpa(0);
            for (range, _) in map.firmware() {
                assert!(end <= range.start && range.start < range.end);
                assert!(map.ram().any(|ram| ram.start <= range.start && range.end <= ram.end));
                end = range.end;
            }
            assert_eq!(map.ram().map(|r| r.end.0 - r.start.0).sum::<u64>(), bytes);
            assert_eq!(end, map.ram().last().unwrap().end);
        }
    }

    #[test]
    fn sizes_are_those_of_the_loader_of_microvm() {
        let map = MemoryMap::new(64 << 20).unwrap();
        assert_eq!((map.lower_kib(), map.upper_kib()), (0x27f, 0xfc00));
    }

    #[test]
    fn sizes_out_of_range_or_not_whole_pages_are_refused() {
        assert_eq!(MemoryMap::new(1 << 20), Err(MemorySizeError::OutOfRange(1 << 20)));
        assert_eq!(MemoryMap::new(u64::MAX), Err(MemorySizeError::OutOfRange(u64::MAX)));
        assert_eq!(MemoryMap::new((4 << 20) + 1), Err(MemorySizeError::NotWholePages((4 << 20) + 1)));
    }
}
