//! Guest memory by guest-physical address: what emulation, devices and the loader use.
//!
//! Holds: every store tells the shadow what was written. Aligned loads and stores up to 8 bytes do not tear;
//! [`Mmu::update`] is atomic towards guest code and other VMM threads wherever its bytes lie within one aligned
//! 8-byte word.
//!
//! Locks: none held by the caller; nothing here sleeps.

use crate::Mmu;
use crate::addr::{Gfn, Gpa, PAGE_SIZE};
use crate::p2m::PageState;
use crate::window::{LocalMap, LocalStack, Tag};

/// Width of a scalar access, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 1 byte.
    B1 = 1,
    /// 2 bytes.
    B2 = 2,
    /// 4 bytes.
    B4 = 4,
    /// 8 bytes.
    B8 = 8,
}

impl Width {
    /// In bytes.
    #[inline]
    pub fn bytes(self) -> u32 {
        self as u32
    }

    /// The bits that count, from bit 0.
    #[inline]
    pub fn mask(self) -> u64 {
        u64::MAX >> (64 - 8 * self.bytes())
    }
}

/// Why guest memory could not be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Beyond {
    /// No memory there: a device or nothing.
    #[error("guest-physical address {0} is not memory")]
    Device(Gpa),
    /// No frame could be had for the page.
    #[error("no machine frame is left for guest frame {0}; give the machine more frames")]
    Need(Gfn),
}

impl Mmu {
    /// True when the address is not memory.
    pub fn is_device(&self, gpa: Gpa) -> bool {
        self.p2m.lookup(gpa.gfn()) == PageState::Device
    }

    /// Loads `width` bytes, zero-extended. The access lies within a page.
    #[inline]
    pub fn load(&self, window: &LocalStack, gpa: Gpa, width: Width) -> Result<u64, Beyond> {
        self.with_memory(window, gpa, Tag::Emulate, |map| map.load(gpa.offset(), width))
    }

    /// Stores the low `width` bytes of `value`. The access lies within a page.
    pub fn store(&self, window: &LocalStack, gpa: Gpa, width: Width, value: u64) -> Result<(), Beyond> {
        self.with_memory(window, gpa, Tag::Emulate, |map| map.store(gpa.offset(), width, value))?;
        self.table_written(gpa.gfn(), gpa.offset(), width.bytes());
        Ok(())
    }

    /// Replaces the `width` bytes at `gpa` by `change` of them and returns the old ones. `change` may run more
    /// than once. The access lies within a page.
    pub fn update(
        &self,
        window: &LocalStack,
        gpa: Gpa,
        width: Width,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, Beyond> {
        let offset = gpa.offset();
        let old = self.with_memory(window, gpa, Tag::Emulate, |map| map.update(offset, width, change))?;
        self.table_written(gpa.gfn(), offset, width.bytes());
        Ok(old)
    }

    /// Reads a range of guest memory, page by page.
    pub fn read_bytes(&self, window: &LocalStack, gpa: Gpa, buffer: &mut [u8]) -> Result<(), Beyond> {
        for (at, range) in pages_of(gpa, buffer.len()) {
            self.with_memory(window, at, Tag::Host, |map| map.read(at.offset(), &mut buffer[range]))?;
        }
        Ok(())
    }

    /// Writes a range of guest memory, page by page; on an error the pages before it are written.
    pub fn write_bytes(&self, window: &LocalStack, gpa: Gpa, data: &[u8]) -> Result<(), Beyond> {
        for (at, range) in pages_of(gpa, data.len()) {
            let length = range.len() as u32;
            self.with_memory(window, at, Tag::Host, |map| map.write(at.offset(), &data[range]))?;
            self.table_written(at.gfn(), at.offset(), length);
        }
        Ok(())
    }

    /// Calls `touch` with the page of `gpa` mapped.
    #[inline]
    fn with_memory<T>(
        &self,
        window: &LocalStack,
        gpa: Gpa,
        tag: Tag,
        touch: impl FnOnce(&LocalMap<'_>) -> T,
    ) -> Result<T, Beyond> {
        let gfn = gpa.gfn();
        match self.resident(gfn) {
            PageState::Resident(mfn) => {
                let map = window.map(&self.machine, &self.frames, gfn, mfn, tag);
                Ok(touch(&map))
            }
            PageState::Device => Err(Beyond::Device(gpa)),
            PageState::Zero => Err(Beyond::Need(gfn)),
        }
    }
}

/// The parts of a range, each within a page: its address and its place in the buffer.
fn pages_of(gpa: Gpa, length: usize) -> impl Iterator<Item = (Gpa, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        (done < length).then(|| {
            let at = Gpa(gpa.0 + done as u64);
            let count = ((PAGE_SIZE - u64::from(at.offset())) as usize).min(length - done);
            let range = done..done + count;
            done += count;
            (at, range)
        })
    })
}
