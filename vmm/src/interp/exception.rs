//! Exceptions of the guest: values to deliver, not errors of ours.
//!
//! See: Intel SDM vol. 3A, 6.3 (sources), 6.13 (error codes), table 6-5 (double faults).

use umbra_mmu::PageFault;

/// Vectors that the CPU itself raises.
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

/// An exception to deliver to the guest. A value, not an error of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, 0..=31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error: Option<u32>,
    /// The faulting linear address of a #PF: what CR2 is to hold.
    pub cr2: Option<u32>,
}

impl Exception {
    /// #DE: division by zero or a quotient that does not fit.
    pub const DE: Exception = Exception::plain(vector::DE);
    /// #DB: a debug exception; DR6 says which.
    pub const DB: Exception = Exception::plain(vector::DB);
    /// #BR: BOUND's index lies outside.
    pub const BR: Exception = Exception::plain(vector::BR);
    /// #UD: not an instruction here.
    pub const UD: Exception = Exception::plain(vector::UD);
    /// #NM: the FPU is away (CR0.TS) or emulated (CR0.EM).
    pub const NM: Exception = Exception::plain(vector::NM);
    /// #DF: an exception that met another on its delivery.
    pub const DF: Exception = Exception::coded(vector::DF, 0);
    /// #MF: an unmasked x87 exception was pending.
    pub const MF: Exception = Exception::plain(vector::MF);
    /// #XM: an unmasked SSE exception.
    pub const XM: Exception = Exception::plain(vector::XM);
    /// #AC: a misaligned access at CPL 3 with alignment checks on.
    pub const AC: Exception = Exception::coded(vector::AC, 0);

    /// An exception without an error code.
    pub const fn plain(vector: u8) -> Exception {
        Exception { vector, error: None, cr2: None }
    }

    const fn coded(vector: u8, error: u16) -> Exception {
        Exception { vector, error: Some(error as u32), cr2: None }
    }

    /// #TS: an unusable inner stack or TSS. `error` is a selector without RPL, or an IDT index, with its flags.
    pub const fn ts(error: u16) -> Exception {
        Exception::coded(vector::TS, error)
    }

    /// #NP: a descriptor that is not present.
    pub const fn np(error: u16) -> Exception {
        Exception::coded(vector::NP, error)
    }

    /// #SS: beyond a stack's limit, or a stack segment that is not present.
    pub const fn ss(error: u16) -> Exception {
        Exception::coded(vector::SS, error)
    }

    /// #GP: everything else that is forbidden.
    pub const fn gp(error: u16) -> Exception {
        Exception::coded(vector::GP, error)
    }

    /// True for a fault, whose saved EIP is the instruction's own; a trap's is the next one's. Vector 1 counts as a
    /// trap: its instruction-breakpoint kind alone restarts, and that one does not set RF.
    pub fn is_fault(&self) -> bool {
        !matches!(self.vector, vector::DB | vector::NMI | vector::BP | vector::OF | vector::DF)
    }

    /// True for the class that two of make a double fault.
    pub fn is_contributory(&self) -> bool {
        matches!(self.vector, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP)
    }
}

impl From<PageFault> for Exception {
    fn from(fault: PageFault) -> Exception {
        Exception { vector: vector::PF, error: Some(fault.code.bits()), cr2: Some(fault.gva.0) }
    }
}
