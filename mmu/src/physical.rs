//! Guest memory by guest-physical address: what emulation, devices and the loader use.
//!
//! Holds: every store tells the shadow what was written. Aligned loads and stores up to 8 bytes do not tear;
//! [`Mmu::update`] is atomic towards guest code and other VMM threads wherever its bytes lie within one aligned
//! 8-byte word; elsewhere who wants that has locked the bus, which keeps vCPUs out, though not devices.
//!
//! Locks: none held by the caller; nothing here sleeps.

use crate::Mmu;
use crate::addr::{Gfn, Gpa, PAGE_SIZE};
use crate::p2m::PageState;
use crate::reclaim::Shortage;
use crate::window::{Intent, LocalMap, LocalStack, Tag};

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
    /// The page has no frame now: [`Mmu::bring_in`], and again.
    #[error("guest frame {0} is not in memory")]
    Need(Gfn),
}

/// Why guest memory could not be reached by a caller that may sleep.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotReached {
    /// No memory there: a device or nothing.
    #[error("guest-physical address {0} is not memory")]
    Device(Gpa),
    /// The page cannot be brought in.
    #[error(transparent)]
    Short(#[from] Shortage),
}

impl Mmu {
    /// True when the address is not memory.
    pub fn is_device(&self, gpa: Gpa) -> bool {
        self.p2m.lookup(gpa.gfn()) == PageState::Device
    }

    /// Loads `width` bytes, zero-extended. The access lies within a page.
    #[inline]
    pub fn load(&self, window: &LocalStack, gpa: Gpa, width: Width) -> Result<u64, Beyond> {
        self.with_memory(window, gpa, (Tag::Emulate, Intent::Read), |map| map.load(gpa.offset(), width))
    }

    /// Stores the low `width` bytes of `value`. The access lies within a page.
    pub fn store(&self, window: &LocalStack, gpa: Gpa, width: Width, value: u64) -> Result<(), Beyond> {
        self.with_written(window, gpa, Tag::Emulate, width.bytes(), |map| {
            map.store(gpa.offset(), width, value)
        })
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
        self.with_written(window, gpa, Tag::Emulate, width.bytes(), |map| {
            map.update(gpa.offset(), width, change)
        })
    }

    /// [`Mmu::update`] of bytes that lie across two pages: those from `first` to the end of its page, the others at the start of
    /// the page `second`.
    pub fn update_across(
        &self,
        window: &LocalStack,
        first: Gpa,
        second: Gfn,
        width: Width,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, Beyond> {
        let room = PAGE_SIZE as u32 - first.offset();
        debug_assert!(room < width.bytes(), "{width:?} at {first} are within a page");
        self.with_written(window, first, Tag::Emulate, room, |low| {
            self.with_written(window, second.at(0), Tag::Emulate, width.bytes() - room, |high| {
                let mut bytes = [0; 8];
                let (here, there) = bytes[..width.bytes() as usize].split_at_mut(room as usize);
                low.read(first.offset(), here);
                high.read(0, there);
                let old = u64::from_le_bytes(bytes);
                let new = change(old).to_le_bytes();
                low.write(first.offset(), &new[..room as usize]);
                high.write(0, &new[room as usize..width.bytes() as usize]);
                old
            })
        })
        .flatten()
    }

    /// Reads a range of guest memory, page by page.
    pub fn read_bytes(&self, window: &LocalStack, gpa: Gpa, buffer: &mut [u8]) -> Result<(), Beyond> {
        for (at, range) in pages_of(gpa, buffer.len()) {
            let how = (Tag::Host, Intent::Read);
            self.with_memory(window, at, how, |map| map.read(at.offset(), &mut buffer[range]))?;
        }
        Ok(())
    }

    /// Writes a range of guest memory, page by page; on an error the pages before it are written.
    pub fn write_bytes(&self, window: &LocalStack, gpa: Gpa, data: &[u8]) -> Result<(), Beyond> {
        for (at, range) in pages_of(gpa, data.len()) {
            let length = range.len() as u32;
            self.with_written(window, at, Tag::Host, length, |map| map.write(at.offset(), &data[range]))?;
        }
        Ok(())
    }

    /// [`Mmu::read_bytes`], bringing in what is not in memory. Called with no lock held and nothing mapped, by a vCPU
    /// (`own`) that is outside or by another thread; may sleep.
    pub fn read_bytes_sleeping(
        &self,
        own: Option<u32>,
        window: &LocalStack,
        gpa: Gpa,
        buffer: &mut [u8],
    ) -> Result<(), NotReached> {
        for (at, range) in pages_of(gpa, buffer.len()) {
            self.sleeping(own, || self.read_bytes(window, at, &mut buffer[range.clone()]))?;
        }
        Ok(())
    }

    /// [`Mmu::write_bytes`], in the same way.
    pub fn write_bytes_sleeping(
        &self,
        own: Option<u32>,
        window: &LocalStack,
        gpa: Gpa,
        data: &[u8],
    ) -> Result<(), NotReached> {
        for (at, range) in pages_of(gpa, data.len()) {
            self.sleeping(own, || self.write_bytes(window, at, &data[range.clone()]))?;
        }
        Ok(())
    }

    fn sleeping(
        &self,
        own: Option<u32>,
        mut access: impl FnMut() -> Result<(), Beyond>,
    ) -> Result<(), NotReached> {
        loop {
            match access() {
                Ok(()) => return Ok(()),
                Err(Beyond::Device(gpa)) => return Err(NotReached::Device(gpa)),
                Err(Beyond::Need(gfn)) => self.bring_in(own, gfn)?,
            }
        }
    }

    /// Calls `touch`, which stores to `length` bytes from `gpa` on, with their page mapped, and tells of it while the page
    /// still is: it stays where it is, so the frame that was stored to is the one that is told.
    fn with_written<T>(
        &self,
        window: &LocalStack,
        gpa: Gpa,
        tag: Tag,
        length: u32,
        touch: impl FnOnce(&LocalMap<'_>) -> T,
    ) -> Result<T, Beyond> {
        self.with_memory(window, gpa, (tag, Intent::Write), |map| {
            let _under_way = self.stores.begin();
            let done = touch(map);
            self.table_written(gpa.gfn(), map.mfn(), gpa.offset(), length);
            done
        })
    }

    /// Calls `touch` with the page of `gpa` mapped.
    #[inline]
    fn with_memory<T>(
        &self,
        window: &LocalStack,
        gpa: Gpa,
        (tag, intent): (Tag, Intent),
        touch: impl FnOnce(&LocalMap<'_>) -> T,
    ) -> Result<T, Beyond> {
        match self.map_page(window, gpa.gfn(), tag, intent) {
            Ok(map) => Ok(touch(&map)),
            Err(PageState::Device) => Err(Beyond::Device(gpa)),
            Err(_) => Err(Beyond::Need(gpa.gfn())),
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
