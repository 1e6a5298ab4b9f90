//! Guest memory for the loader.

use std::ops::Range;

use umbra_mmu::p2m::PageState;
use umbra_mmu::{Context, Gpa, LocalStack, Mmu, PAGE_SIZE};

use crate::board::MemoryMap;
use crate::boot::{GuestMemorySink, MemoryError};

/// Writes to guest memory through a window stack of its own.
pub struct BootMemory<'a> {
    mmu: &'a Mmu,
    window: LocalStack,
}

impl<'a> BootMemory<'a> {
    /// Memory of the guest of `mmu`.
    pub fn new(mmu: &'a Mmu) -> BootMemory<'a> {
        BootMemory { mmu, window: LocalStack::new(Context::Host) }
    }
}

impl GuestMemorySink for BootMemory<'_> {
    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        Ok(self.mmu.write_bytes_sleeping(None, &self.window, gpa, bytes)?)
    }

    /// Memory that nobody has touched is zero already, and stays without a frame.
    fn zero(&mut self, gpa: Gpa, bytes: u64) -> Result<(), MemoryError> {
        const ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
        let (mut at, end) = (gpa.0, gpa.0 + bytes);
        while at < end {
            let count = (PAGE_SIZE - at % PAGE_SIZE).min(end - at);
            if self.mmu.p2m().lookup(Gpa(at).gfn()) != PageState::Zero {
                self.write(Gpa(at), &ZEROS[..count as usize])?;
            }
            at += count;
        }
        Ok(())
    }
}

/// The frames from 0 to the end of guest memory, and those among them that are none: the hole below 4 GiB.
pub fn extent(memory: &MemoryMap) -> (u32, Range<u32>) {
    let frames = |bytes: u64| (bytes / PAGE_SIZE) as u32;
    match memory.above_4g() {
        0 => (frames(memory.below_4g()), 0..0),
        above => (frames((4 << 30) + above), frames(memory.below_4g())..frames(4 << 30)),
    }
}
