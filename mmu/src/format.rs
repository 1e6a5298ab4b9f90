//! Guest page-table formats: what the bits of a guest's entry say in each paging mode.
//!
//! Story: the walker reads entries, this module judges them. A [`Gpte`] is the guest's claim; nothing in it has
//! been checked until the walker made a translation of it.
//!
//! Limits: guest-physical addresses have [`PHYSICAL_BITS`] bits; CPUID must say the same.
//!
//! See: Intel SDM vol. 3A, 4.3 (32-bit paging, with PSE-36), 4.4 (PAE paging), tables 4-4 to 4-11.

use crate::addr::{Gfn, Gpa, Gva};

/// MAXPHYADDR of the guest.
pub const PHYSICAL_BITS: u32 = 36;

const PHYSICAL_MASK: u64 = (1 << PHYSICAL_BITS) - 1;
/// The address bits above 4 GiB that a PSE-36 entry has from bit 13 on.
const PSE36_MASK: u64 = (1 << (PHYSICAL_BITS - 32)) - 1;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;

/// The A and D bits: what the walker itself changes.
pub(crate) const STATUS_BITS: u64 = ACCESSED | DIRTY;

/// How the guest's CPU pages: the control bits that decide, and nothing else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mode {
    /// CR0.PG: without it linear addresses are physical ones.
    pub paging: bool,
    /// CR4.PAE.
    pub pae: bool,
    /// CR4.PSE; means nothing under PAE.
    pub pse: bool,
    /// CR0.WP.
    pub write_protect: bool,
    /// EFER.NXE; means something only under PAE.
    pub no_execute: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.PGE: translations of global pages outlive a MOV CR3.
    pub global_pages: bool,
}

impl Mode {
    /// True when a fetch fault reports I/D (SDM 4.7: SMEP, or PAE with NXE).
    pub fn reports_fetch(self) -> bool {
        self.smep || (self.pae && self.no_execute)
    }

    /// Index of the entry for `gva` in a page directory.
    #[inline]
    pub fn directory_index(self, gva: Gva) -> u32 {
        if self.pae { gva.0 >> 21 & 0x1ff } else { gva.0 >> 22 }
    }

    /// Index of the entry for `gva` in a page table.
    #[inline]
    pub fn table_index(self, gva: Gva) -> u32 {
        if self.pae { gva.0 >> 12 & 0x1ff } else { gva.0 >> 12 & 0x3ff }
    }

    /// Bytes of one entry.
    #[inline]
    pub fn entry_bytes(self) -> u32 {
        if self.pae { 8 } else { 4 }
    }
}

/// An entry of a guest page directory or page table, as read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gpte(pub u64);

impl Gpte {
    /// P.
    #[inline]
    pub fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    /// A.
    #[inline]
    pub fn is_accessed(self) -> bool {
        self.0 & ACCESSED != 0
    }

    /// D; means something in an entry that maps a page.
    #[inline]
    pub fn is_dirty(self) -> bool {
        self.0 & DIRTY != 0
    }

    /// G; means something in an entry that maps a page, while CR4.PGE is set.
    #[inline]
    pub fn is_global(self) -> bool {
        self.0 & GLOBAL != 0
    }

    /// True for a directory entry that maps a large page.
    #[inline]
    pub fn is_large(self, mode: Mode) -> bool {
        self.0 & LARGE != 0 && (mode.pae || mode.pse)
    }

    /// What this entry alone allows.
    #[inline]
    pub fn rights(self, mode: Mode) -> Rights {
        let mut bits = 0;
        if self.0 & WRITABLE != 0 {
            bits |= Rights::WRITE;
        }
        if self.0 & USER != 0 {
            bits |= Rights::USER;
        }
        if !(mode.pae && mode.no_execute && self.0 & NO_EXECUTE != 0) {
            bits |= Rights::EXECUTE;
        }
        Rights(bits)
    }

    /// True when a present entry has a bit set that must be zero. `large`: it is a directory entry that maps a
    /// large page.
    #[inline]
    pub fn has_reserved_bits(self, mode: Mode, large: bool) -> bool {
        self.0 & reserved_mask(mode, large) != 0
    }

    /// The frame of the table or small page it points to.
    #[inline]
    pub fn gfn(self, mode: Mode) -> Gfn {
        let bits = if mode.pae { self.0 & PHYSICAL_MASK } else { self.0 & 0xffff_ffff };
        Gfn((bits >> 12) as u32)
    }

    /// First frame of the large page it maps: 4 MiB (with PSE-36 high bits) or, under PAE, 2 MiB.
    #[inline]
    pub fn large_gfn(self, mode: Mode) -> Gfn {
        if mode.pae {
            return Gfn(self.gfn(mode).0 & !0x1ff);
        }
        let high = self.0 >> 13 & PSE36_MASK;
        Gfn((self.0 as u32 & 0xffc0_0000) >> 12 | (high as u32) << 20)
    }
}

#[inline]
fn reserved_mask(mode: Mode, large: bool) -> u64 {
    if mode.pae {
        let high = ((1u64 << 63) - 1) & !PHYSICAL_MASK;
        let no_execute = if mode.no_execute { 0 } else { NO_EXECUTE };
        let low = if large { 0x001f_e000 } else { 0 };
        high | no_execute | low
    } else if large {
        // Bit 21, and those of bits 13..=20 (address bits 32..=39) that lie above MAXPHYADDR.
        1 << 21 | (0x001f_e000 & !(PSE36_MASK << 13))
    } else {
        0
    }
}

/// A page-directory-pointer entry, loaded at MOV CR3 and kept in the CPU since (SDM 4.4.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Pdpte(pub u64);

impl Pdpte {
    /// P.
    pub fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    /// True when loading it must raise #GP(0).
    pub fn has_reserved_bits(self) -> bool {
        let reserved = 0x1e6 | !PHYSICAL_MASK;
        self.is_present() && self.0 & reserved != 0
    }

    /// The page directory it points to.
    pub fn gfn(self) -> Gfn {
        Gpa(self.0 & PHYSICAL_MASK).gfn()
    }
}

/// What a translation allows: the intersection over its levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rights(pub u8);

impl Rights {
    /// Stores.
    pub const WRITE: u8 = 1;
    /// Accesses from CPL 3.
    pub const USER: u8 = 2;
    /// Instruction fetches (as far as NX is concerned).
    pub const EXECUTE: u8 = 4;
    /// Everything.
    pub const ALL: Rights = Rights(7);

    /// What both allow.
    #[inline]
    pub fn and(self, other: Rights) -> Rights {
        Rights(self.0 & other.0)
    }

    /// True when stores are allowed.
    #[inline]
    pub fn writable(self) -> bool {
        self.0 & Rights::WRITE != 0
    }

    /// True for a user page.
    #[inline]
    pub fn user(self) -> bool {
        self.0 & Rights::USER != 0
    }

    /// True when NX is clear at every level.
    #[inline]
    pub fn executable(self) -> bool {
        self.0 & Rights::EXECUTE != 0
    }
}
