//! Who lies where in the guest's low memory while an image is loaded.
//!
//! Holds: claimed ranges lie in usable memory and do not overlap.

use std::ops::Range;

use crate::board::MemoryMap;

use super::{ImageError, Part};

/// The ranges that are taken.
pub(super) struct Placement {
    usable: [Range<u64>; 2],
    taken: Vec<(Range<u64>, Part)>,
}

impl Placement {
    pub(super) fn new(memory: &MemoryMap) -> Placement {
        Placement { usable: memory.loadable(), taken: Vec::new() }
    }

    /// Usable memory from 1 MiB on.
    pub(super) fn high(&self) -> Range<u64> {
        self.usable[1].clone()
    }

    /// Takes the range that `part` must have.
    pub(super) fn claim(&mut self, part: Part, range: Range<u64>) -> Result<(), ImageError> {
        let Range { start, end } = range;
        if !self.usable.iter().any(|usable| usable.start <= start && end <= usable.end) {
            let [low, high] = &self.usable;
            return Err(ImageError::OutsideMemory {
                part,
                start,
                end,
                low_end: low.end,
                high_start: high.start,
                high_end: high.end,
            });
        }
        if let Some(other) = self.taken_in(&range) {
            let other = other.1;
            return Err(ImageError::Overlap { part, start, end, other });
        }
        self.taken.push((range, part));
        Ok(())
    }

    fn taken_in(&self, range: &Range<u64>) -> Option<&(Range<u64>, Part)> {
        self.taken.iter().find(|(taken, _)| taken.start < range.end && range.start < taken.end)
    }

    /// Takes the first gap of `bytes` from `from` on, at a multiple of `align`, that ends within the same usable
    /// range.
    pub(super) fn fit(&mut self, part: Part, bytes: u64, from: u64, align: u64) -> Option<u64> {
        let usable = self.usable.iter().find(|usable| usable.contains(&from))?;
        let mut start = from.next_multiple_of(align);
        // Each round passes one taken range, and never comes back to it.
        loop {
            let range = start..start.checked_add(bytes)?;
            if range.end > usable.end {
                return None;
            }
            match self.taken_in(&range) {
                Some((taken, _)) => start = taken.end.next_multiple_of(align),
                None => {
                    self.taken.push((range, part));
                    return Some(start);
                }
            }
        }
    }
}
