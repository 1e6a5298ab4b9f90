//! Addresses: one newtype for every world a number can live in.
//!
//! Holds: there is no `From` between two of them and none from a bare integer; every crossing is a named
//! conversion, so a guest's claim cannot be used where a machine frame is meant.
//!
//! See: docs/ARCHITECTURE.md, glossary.

use std::fmt;

/// Bytes in a small page, guest and machine alike.
pub const PAGE_SIZE: u64 = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address!(
    /// Guest linear (virtual) address, 32 bits: after segmentation, before paging.
    Gva(u32)
);
address!(
    /// Guest-physical address, up to 36 bits with PAE (wider claims of a guest are reserved-bit faults).
    Gpa(u64)
);
address!(
    /// Guest-physical frame number: a [`Gpa`] in pages, up to 24 bits.
    Gfn(u32)
);
address!(
    /// Machine address: a byte of the machine pool.
    Mpa(u64)
);
address!(
    /// Machine frame number: a [`Mpa`] in pages.
    Mfn(u32)
);

impl Gva {
    /// The byte offset within the page.
    pub fn offset(self) -> u32 {
        self.0 & 0xfff
    }

    /// The address of the first byte of the page.
    pub fn page(self) -> Gva {
        Gva(self.0 & !0xfff)
    }

    /// The address `n` bytes further, wrapping at 4 GiB as linear addresses do.
    pub fn wrapping_add(self, n: u32) -> Gva {
        Gva(self.0.wrapping_add(n))
    }
}

impl Gpa {
    /// The frame that holds this byte. Addresses from 2^44 on do not fit a frame number; guests cannot form
    /// them, since every format masks to 36 bits or less.
    pub fn gfn(self) -> Gfn {
        Gfn((self.0 >> PAGE_SHIFT) as u32)
    }

    /// The byte offset within the frame.
    pub fn offset(self) -> u32 {
        (self.0 & 0xfff) as u32
    }
}

impl Gfn {
    /// The address of byte `offset` (0..4096) of this frame.
    pub fn at(self, offset: u32) -> Gpa {
        Gpa((u64::from(self.0) << PAGE_SHIFT) + u64::from(offset))
    }
}

impl Mpa {
    /// The machine frame that holds this byte.
    pub fn mfn(self) -> Mfn {
        Mfn((self.0 >> PAGE_SHIFT) as u32)
    }
}

impl Mfn {
    /// The address of byte `offset` (0..4096) of this frame.
    pub fn at(self, offset: u32) -> Mpa {
        Mpa((u64::from(self.0) << PAGE_SHIFT) + u64::from(offset))
    }
}
