//! Shadow page-table entries: the 4-level long-mode format that the hardware walks.
//!
//! Holds: every spte for the guest has U set, since all guest code runs at CPL 3; supervisor pages are kept from
//! guest-user code by being absent from the user root. A and D are preset: the guest's own A and D bits are kept
//! by the walker, never read back from hardware. Reclaim clears A, and hardware sets it again. The hardware's G is never set; a bit that it ignores says that the
//! guest's entry had G, for TLBs of ours that care.
//!
//! See: Intel SDM vol. 3A, 4.5 (4-level paging).

use std::fmt;

use crate::access::AccessKind;
use crate::addr::{Gva, Mfn};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// At the second level: no link, but a page of 2 MiB.
const LARGE: u64 = 1 << 7;
/// One of the bits that hardware leaves to software.
const GUEST_GLOBAL: u64 = 1 << 9;
const NO_EXECUTE: u64 = 1 << 63;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// One entry of a shadow table.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Spte(pub u64);

impl Spte {
    /// Nothing there.
    pub const ABSENT: Spte = Spte(0);

    /// A leaf that maps `mfn`.
    #[inline]
    pub fn leaf(mfn: Mfn, writable: bool, executable: bool) -> Spte {
        let mut bits = mfn.at(0).0 | PRESENT | USER | ACCESSED | DIRTY;
        if writable {
            bits |= WRITABLE;
        }
        if !executable {
            bits |= NO_EXECUTE;
        }
        Spte(bits)
    }

    /// A leaf of the second level that maps the frames from `base` on.
    #[inline]
    pub fn large(base: Mfn, writable: bool, executable: bool) -> Spte {
        Spte(Spte::leaf(base, writable, executable).0 | LARGE)
    }

    /// True for such a leaf. Meaningful at the second level.
    #[inline]
    pub fn is_large(self) -> bool {
        self.0 & (PRESENT | LARGE) == PRESENT | LARGE
    }

    /// The same, for a page that the guest calls global or not.
    #[inline]
    pub fn with_global(self, global: bool) -> Spte {
        Spte(self.0 & !GUEST_GLOBAL | if global { GUEST_GLOBAL } else { 0 })
    }

    /// True when the guest's entry had G.
    #[inline]
    pub fn is_global(self) -> bool {
        self.0 & GUEST_GLOBAL != 0
    }

    /// True when it allows what an access of `kind` needs. Meaningful when present.
    #[inline]
    pub fn allows(self, kind: AccessKind) -> bool {
        match kind {
            AccessKind::Read => true,
            AccessKind::Write => self.is_writable(),
            AccessKind::Execute => self.is_executable(),
        }
    }

    /// A link to the table in `mfn`, which grants everything: rights are the leaves' business.
    pub fn link(mfn: Mfn) -> Spte {
        Spte(mfn.at(0).0 | PRESENT | WRITABLE | USER | ACCESSED)
    }

    /// True when the hardware would use it.
    #[inline]
    pub fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    /// True when it allows stores.
    #[inline]
    pub fn is_writable(self) -> bool {
        self.0 & WRITABLE != 0
    }

    /// True when it allows instruction fetches.
    #[inline]
    pub fn is_executable(self) -> bool {
        self.0 & NO_EXECUTE == 0
    }

    /// True when it was used since the bit was last cleared.
    #[inline]
    pub fn is_accessed(self) -> bool {
        self.0 & ACCESSED != 0
    }

    /// The bit that says so, alone.
    pub const ACCESSED: u64 = ACCESSED;

    /// The same without W.
    pub fn write_protected(self) -> Spte {
        Spte(self.0 & !WRITABLE)
    }

    /// The frame it points to; meaningless when absent.
    #[inline]
    pub fn mfn(self) -> Mfn {
        Mfn(((self.0 & FRAME) >> 12) as u32)
    }
}

impl fmt::Debug for Spte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_present() {
            return write!(f, "Spte(absent)");
        }
        let flag = |on, letter| if on { letter } else { '-' };
        write!(
            f,
            "Spte({} r{}{})",
            self.mfn(),
            flag(self.is_writable(), 'w'),
            flag(self.is_executable(), 'x')
        )
    }
}

/// Index of the spte for `gva` in a first-level shadow table.
#[inline]
pub fn l1_index(gva: Gva) -> u32 {
    gva.0 >> 12 & 0x1ff
}

/// Index in a second-level shadow table.
#[inline]
pub fn l2_index(gva: Gva) -> u32 {
    gva.0 >> 21 & 0x1ff
}

/// Index in a root's page-directory-pointer table: one of 0..4.
#[inline]
pub fn l3_index(gva: Gva) -> u32 {
    gva.0 >> 30
}
