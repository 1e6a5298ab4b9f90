//! What an access wants, and what a page fault answers.
//!
//! See: Intel SDM vol. 3A, 4.6 (access rights) and 4.7 (page-fault exceptions).

use bitflags::bitflags;

use crate::addr::Gva;

/// What a memory access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// A data read.
    Read,
    /// A data write, or the read half of a read-modify-write (which needs write permission from the start).
    Write,
    /// An instruction fetch.
    Execute,
}

/// One memory access, as the paging unit sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// Read, write or execute.
    pub kind: AccessKind,
    /// True for an access made at CPL 3. Implicit supervisor accesses (descriptor tables, the TSS, the frame of
    /// an exception through an inner-privilege gate) are false whatever the CPL.
    pub user: bool,
}

impl Access {
    /// A data read at privilege `user`.
    pub fn read(user: bool) -> Access {
        Access { kind: AccessKind::Read, user }
    }

    /// A data write at privilege `user`.
    pub fn write(user: bool) -> Access {
        Access { kind: AccessKind::Write, user }
    }

    /// An instruction fetch at privilege `user`.
    pub fn execute(user: bool) -> Access {
        Access { kind: AccessKind::Execute, user }
    }
}

bitflags! {
    /// The error code of a page fault.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct FaultCode: u32 {
        /// P: the fault is a protection violation or a reserved bit, not an absent page.
        const PRESENT = 1 << 0;
        /// W/R: the access was a write.
        const WRITE = 1 << 1;
        /// U/S: the access was made at CPL 3.
        const USER = 1 << 2;
        /// RSVD: a reserved bit was set in an entry; comes with P.
        const RESERVED = 1 << 3;
        /// I/D: an instruction fetch; reported only while NX or SMEP is on.
        const FETCH = 1 << 4;
    }
}

/// A page fault for the guest: a value to inject, not an error of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// What CR2 is to hold.
    pub gva: Gva,
    /// The error code to push.
    pub code: FaultCode,
}
