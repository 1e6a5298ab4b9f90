//! What the interpreter asks of the rest of the machine.
//!
//! Story: every memory access of every instruction goes through a [`Bus`]; it pages, raises page faults, reaches
//! devices and tells the shadow MMU. Tests drive the interpreter through a bus of their own.
//!
//! Holds: a bus call that returns an error has changed nothing that the guest can see, A and D bits aside.

use umbra_mmu::{Access, Gva, PageFault};

use super::exception::Exception;
use crate::cpu::CpuState;

/// Width of a scalar access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 1 byte.
    B1 = 1,
    /// 2 bytes.
    B2 = 2,
    /// 4 bytes.
    B4 = 4,
    /// 8 bytes (CMPXCHG8B, MMX).
    B8 = 8,
}

impl Width {
    /// The width in bytes.
    pub fn bytes(self) -> u32 {
        self as u32
    }

    /// The width in bits.
    pub fn bits(self) -> u32 {
        8 * self.bytes()
    }

    /// All ones, for the widths of a register (1, 2 and 4 bytes); 8 bytes give the mask of their low half.
    pub fn mask(self) -> u32 {
        match self {
            Width::B1 => 0xff,
            Width::B2 => 0xffff,
            Width::B4 | Width::B8 => u32::MAX,
        }
    }

    /// The sign bit within [`Width::mask`].
    pub fn sign(self) -> u32 {
        (self.mask() >> 1) + 1
    }

    /// `value` (already masked) with its sign extended to 32 bits.
    pub fn extend(self, value: u32) -> u32 {
        (value ^ self.sign()).wrapping_sub(self.sign())
    }
}

/// Why a bus call did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusError {
    /// The access faults: deliver this.
    Exception(Exception),
    /// The caller must leave, sleep holding nothing (for a frame or a gate) and run the instruction again.
    Again,
}

impl From<PageFault> for BusError {
    fn from(fault: PageFault) -> BusError {
        BusError::Exception(fault.into())
    }
}

/// The guest's memory, ports and paging controls, as one instruction sees them.
///
/// Linear addresses are after segmentation: the interpreter checks segments, the bus pages. An access may cross
/// a page and may wrap at 4 GiB; it then checks both pages before it touches either.
pub trait Bus {
    /// Reads `width` bytes, zero-extended.
    fn read(&mut self, gva: Gva, width: Width, access: Access) -> Result<u64, BusError>;

    /// Writes the low `width` bytes of `value`.
    fn write(&mut self, gva: Gva, width: Width, value: u64, access: Access) -> Result<(), BusError>;

    /// Reads, applies `change` and writes back, atomically with regard to other CPUs where the access lies within
    /// an aligned 8-byte word; write permission is checked first. `change` may run more than once. Returns the old value.
    fn update(
        &mut self,
        gva: Gva,
        width: Width,
        user: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, BusError>;

    /// [`Bus::update`], atomically wherever it lies: an access that is locked.
    fn update_locked(
        &mut self,
        gva: Gva,
        width: Width,
        user: bool,
        change: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, BusError> {
        self.update(gva, width, user, change)
    }

    /// Checks that `length` bytes could be accessed, setting A (and D for a write), touching nothing else. For
    /// instructions of several accesses that must not stop half way: after a probe the same instruction's accesses
    /// to the pages of those bytes shall not fault, and should not return [`BusError::Again`] but in a race (it is
    /// then run again from its start with some of its stores made; INS alone loses by that what the port gave).
    fn probe(&mut self, gva: Gva, length: u32, access: Access) -> Result<(), BusError>;

    /// Stores `count` copies of the low `width` bytes of `value` from `gva` on, all within a page. False where that cannot
    /// be done at once: nothing has changed, and each is to be stored by itself.
    fn fill(&mut self, gva: Gva, width: Width, value: u64, count: u32, user: bool) -> bool {
        let _ = (gva, width, value, count, user);
        false
    }

    /// Copies `length` bytes, each range within a page. False where that cannot be done at once, or where the ranges
    /// overlap in memory: nothing has changed.
    fn copy(&mut self, from: Gva, to: Gva, length: u32, user: bool) -> bool {
        let _ = (from, to, length, user);
        false
    }

    /// Fetches up to `buffer.len()` (at most 15) instruction bytes and returns how many; stops short where the
    /// next page cannot be fetched, and faults only where the first byte cannot. Never returns 0.
    fn fetch(&mut self, gva: Gva, user: bool, buffer: &mut [u8]) -> Result<usize, BusError>;

    /// Reads an I/O port. Ports nobody owns read as ones.
    fn port_in(&mut self, port: u16, width: Width) -> u32;

    /// Writes an I/O port.
    fn port_out(&mut self, port: u16, width: Width, value: u32);

    /// INVLPG.
    fn invalidate_page(&mut self, gva: Gva);

    /// CR0, CR3, CR4, EFER or the CPL, or with CR4.SMAP on EFLAGS.AC, are about to become those of `new` (already
    /// checked for reserved bits). Where this succeeds the instruction completes without a further bus call.
    /// `flush` is set where the architecture asks for a TLB flush, whatever differs (MOV CR3 always, some bits of CR0
    /// and CR4): PAE's directory pointers are then loaded too. Loading PAE page-directory-pointer entries with reserved bits is a #GP and changes nothing.
    fn set_paging(&mut self, new: &CpuState, flush: bool) -> Result<(), BusError>;

    /// CPUID with EAX = `leaf`, ECX = `subleaf`; returns EAX, EBX, ECX, EDX.
    fn cpuid(&mut self, leaf: u32, subleaf: u32, cpu: &CpuState) -> [u32; 4];

    /// IA32_APIC_BASE becomes `value`, whose reserved bits are 0; false where the local APIC does not have that, which is a #GP.
    fn set_apic_base(&mut self, value: u64) -> bool {
        let _ = value;
        true
    }

    /// PAUSE: the CPU spins for another one, most likely.
    fn pause(&mut self) {}

    /// The time-stamp counter's source, before the CPU's own offset.
    fn tsc(&mut self) -> u64;

    /// An instruction is about to read or change the FPU. [`BusError::Again`] where [`CpuState::fpu`] is not the guest's,
    /// because hardware holds the registers: they must be fetched first.
    fn want_fpu(&mut self) -> Result<(), BusError> {
        Ok(())
    }
}
