//! The routines: one instruction and RET each, in three tables that the assembler fills.
//!
//! Holds: a value of [`X87`], [`Packed`], [`Mmx`], [`Float`], [`Mixed`] names one routine of the tables, and that
//! routine does no more than its type says. Their constructors are the only way to make one, and refuse the rest:
//!
//! | type | the instruction | reads | writes |
//! |---|---|---|---|
//! | `X87` | D8 to DF | the x87 registers, up to 10 bytes at RCX | those, 10 bytes, AX, arithmetic flags |
//! | `Packed` | 66 0F or 0F | XMM0, XMM1 | XMM0 |
//! | `Mmx` | 0F | MM0, MM1 | MM0 |
//! | `Float` | any prefix, 0F | XMM0, XMM1, ECX, MXCSR | XMM0, EAX, MXCSR, arithmetic flags |
//! | `Mixed` | 66 0F or 0F | XMM0, XMM1, MM1, MXCSR | XMM0 or MM0, MXCSR |

use std::arch::global_asm;

/// Bytes of a routine in the x87 table.
const X87_BYTES: usize = 4;
/// Routines of the x87 table in a row: one escape byte's.
const X87_ROW: usize = 64;
/// Where the routines with a memory operand begin.
const X87_MEMORY: usize = 8 * X87_ROW;
/// Bytes of a routine in the SIMD tables.
const SIMD_BYTES: usize = 8;
/// Predicates of CMPPS and its kin.
const PREDICATES: usize = 8;

/// What stands before the 0F of a SIMD instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefix {
    /// Nothing: packed single precision, MMX.
    None = 0,
    /// 66: packed double precision, integers in XMM registers.
    P66 = 1,
    /// F3: scalar single precision.
    Pf3 = 2,
    /// F2: scalar double precision.
    Pf2 = 3,
}

/// The second opcode bytes of the SIMD table, for Rust and for the assembler.
macro_rules! opcodes {
    ($first:literal $(, $more:literal)*) => {
        const OPCODES: &[u8] = &[$first $(, $more)*];

        // Each routine is the instruction with ModRM C1: registers 0 and 1.
        global_asm!(
            ".pushsection .text.umbra_host_fpu, \"ax\", @progbits",
            ".balign 16",
            ".globl umbra_host_simd",
            ".hidden umbra_host_simd",
            "umbra_host_simd:",
            concat!(".irp opcode, ", stringify!($first) $(, ", ", stringify!($more))*),
            ".balign 8",
            ".byte 0x0f, \\opcode, 0xc1, 0xc3",
            ".balign 8",
            ".byte 0x66, 0x0f, \\opcode, 0xc1, 0xc3",
            ".balign 8",
            ".byte 0xf3, 0x0f, \\opcode, 0xc1, 0xc3",
            ".balign 8",
            ".byte 0xf2, 0x0f, \\opcode, 0xc1, 0xc3",
            ".endr",
            ".balign 16",
            ".globl umbra_host_compare",
            ".hidden umbra_host_compare",
            "umbra_host_compare:",
            ".irp predicate, 0, 1, 2, 3, 4, 5, 6, 7",
            ".balign 8",
            ".byte 0x0f, 0xc2, 0xc1, \\predicate, 0xc3",
            ".balign 8",
            ".byte 0x66, 0x0f, 0xc2, 0xc1, \\predicate, 0xc3",
            ".balign 8",
            ".byte 0xf3, 0x0f, 0xc2, 0xc1, \\predicate, 0xc3",
            ".balign 8",
            ".byte 0xf2, 0x0f, 0xc2, 0xc1, \\predicate, 0xc3",
            ".endr",
            ".popsection",
        );
    };
}

opcodes!(
    0x14, 0x15, 0x2a, 0x2c, 0x2d, 0x2e, 0x2f, 0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5a,
    0x5b, 0x5c, 0x5d, 0x5e, 0x5f, 0x60, 0x61, 0x62, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x6b,
    0x6c, 0x6d, 0x74, 0x75, 0x76, 0xd1, 0xd2, 0xd3, 0xd4, 0xd5, 0xd8, 0xd9, 0xda, 0xdb, 0xdc, 0xdd, 0xde,
    0xdf, 0xe0, 0xe1, 0xe2, 0xe3, 0xe4, 0xe5, 0xe6, 0xe8, 0xe9, 0xea, 0xeb, 0xec, 0xed, 0xee, 0xef, 0xf1,
    0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf8, 0xf9, 0xfa, 0xfb, 0xfc, 0xfd, 0xfe
);

// First ModRM C0 to FF of each escape byte, then /0 to /7 of each with the operand at [rcx].
global_asm!(
    ".pushsection .text.umbra_host_fpu, \"ax\", @progbits",
    ".balign 16",
    ".globl umbra_host_x87",
    ".hidden umbra_host_x87",
    "umbra_host_x87:",
    ".irp escape, 0xd8, 0xd9, 0xda, 0xdb, 0xdc, 0xdd, 0xde, 0xdf",
    ".set umbra_host_modrm, 0xc0",
    ".rept 64",
    ".byte \\escape, umbra_host_modrm, 0xc3, 0xcc",
    ".set umbra_host_modrm, umbra_host_modrm + 1",
    ".endr",
    ".endr",
    ".irp escape, 0xd8, 0xd9, 0xda, 0xdb, 0xdc, 0xdd, 0xde, 0xdf",
    ".set umbra_host_modrm, 0x01",
    ".rept 8",
    ".byte \\escape, umbra_host_modrm, 0xc3, 0xcc",
    ".set umbra_host_modrm, umbra_host_modrm + 8",
    ".endr",
    ".endr",
    ".popsection",
);

unsafe extern "C" {
    static umbra_host_x87: u8;
    static umbra_host_simd: u8;
    static umbra_host_compare: u8;
}

/// An x87 instruction that computes, loads or stores a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X87(u16);

impl X87 {
    /// The one with these bytes, ModRM C0 to FF.
    ///
    /// # Panics
    /// Where the bytes are none of x87's: a bug of the caller's table.
    pub const fn registers(escape: u8, modrm: u8) -> X87 {
        assert!(escape >> 3 == 0xd8 >> 3 && modrm >= 0xc0, "not an x87 instruction on registers");
        X87(((escape & 7) as usize * X87_ROW + (modrm & 0x3f) as usize) as u16)
    }

    /// The one with this first byte and /`digit`, with a memory operand of up to 10 bytes.
    ///
    /// # Panics
    /// As `registers`; also where it accesses more than 10 bytes, or is no instruction.
    pub const fn memory(escape: u8, digit: u8) -> X87 {
        assert!(escape >> 3 == 0xd8 >> 3 && digit < 8, "not an x87 instruction on memory");
        let whole_state = matches!((escape, digit), (0xd9, 4 | 6) | (0xdd, 4 | 6));
        let none = matches!((escape, digit), (0xd9, 1) | (0xdb, 4 | 6) | (0xdd, 5));
        assert!(!whole_state && !none, "accesses more than a value");
        X87((X87_MEMORY + (escape & 7) as usize * 8 + digit as usize) as u16)
    }

    pub(super) fn address(self) -> *const u8 {
        (&raw const umbra_host_x87).wrapping_add(usize::from(self.0) * X87_BYTES)
    }
}

/// No routine.
const NONE: u16 = u16::MAX;

/// Where the routines of each opcode begin in the SIMD table.
const SLOTS: [u16; 256] = {
    let mut slots = [NONE; 256];
    let mut n = 0;
    while n < OPCODES.len() {
        slots[OPCODES[n] as usize] = (4 * n * SIMD_BYTES) as u16;
        n += 1;
    }
    slots
};

/// The offset of a routine in the SIMD table.
const fn slot(prefix: Prefix, opcode: u8) -> u16 {
    let first = SLOTS[opcode as usize];
    assert!(first != NONE, "not an instruction of the table");
    first + prefix as u16 * SIMD_BYTES as u16
}

fn simd(slot: u16) -> *const u8 {
    (&raw const umbra_host_simd).wrapping_add(slot.into())
}

/// True for integer instructions that MMX and XMM registers share.
const fn is_integer(opcode: u8) -> bool {
    let no_others = !matches!(opcode, 0x6c | 0x6d | 0xe6);
    opcode >= 0x60 && no_others && SLOTS[opcode as usize] != NONE
}

/// An instruction on XMM registers that is not floating point: MXCSR means nothing to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed(u16);

impl Packed {
    /// An integer instruction, 66 0F `opcode`.
    ///
    /// # Panics
    /// Where there is no such one: a bug of the caller's table.
    pub const fn integer(opcode: u8) -> Packed {
        assert!(is_integer(opcode) || matches!(opcode, 0x6c | 0x6d), "not a packed integer instruction");
        Packed(slot(Prefix::P66, opcode))
    }

    /// UNPCKLPS, UNPCKHPS, ANDPS, ANDNPS, ORPS, XORPS and their twins for double precision.
    ///
    /// # Panics
    /// As `integer`.
    pub const fn bits(prefix: Prefix, opcode: u8) -> Packed {
        assert!(matches!(prefix, Prefix::None | Prefix::P66), "not a packed instruction");
        assert!(matches!(opcode, 0x14 | 0x15 | 0x54..=0x57), "not a packed instruction");
        Packed(slot(prefix, opcode))
    }

    pub(super) fn address(self) -> *const u8 {
        simd(self.0)
    }
}

/// An instruction on MMX registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mmx(u16);

impl Mmx {
    /// 0F `opcode`.
    ///
    /// # Panics
    /// Where there is no such one: a bug of the caller's table.
    pub const fn new(opcode: u8) -> Mmx {
        assert!(is_integer(opcode), "not an MMX instruction");
        Mmx(slot(Prefix::None, opcode))
    }

    pub(super) fn address(self) -> *const u8 {
        simd(self.0)
    }
}

/// A floating-point instruction on XMM registers, or one and a general register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Float(Which);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    Simd(u16),
    Compare(u16),
}

impl Float {
    /// The one with these bytes.
    ///
    /// # Panics
    /// Where there is no such one: a bug of the caller's table.
    pub const fn new(prefix: Prefix, opcode: u8) -> Float {
        let exists = matches!(
            (prefix, opcode),
            (_, 0x51 | 0x58..=0x5a | 0x5c..=0x5f)
                | (Prefix::None | Prefix::Pf3, 0x52 | 0x53)
                | (Prefix::None | Prefix::P66 | Prefix::Pf3, 0x5b)
                | (Prefix::None | Prefix::P66, 0x2e | 0x2f)
                | (Prefix::Pf3 | Prefix::Pf2, 0x2a | 0x2c | 0x2d)
                | (Prefix::P66 | Prefix::Pf3 | Prefix::Pf2, 0xe6)
        );
        assert!(exists, "not a floating-point instruction");
        Float(Which::Simd(slot(prefix, opcode)))
    }

    /// CMPPS, CMPPD, CMPSS or CMPSD with the low three bits of `predicate`.
    pub const fn compare(prefix: Prefix, predicate: u8) -> Float {
        let n = 4 * (predicate as usize % PREDICATES) + prefix as usize;
        Float(Which::Compare((n * SIMD_BYTES) as u16))
    }

    pub(super) fn address(self) -> *const u8 {
        match self.0 {
            Which::Simd(slot) => simd(slot),
            Which::Compare(slot) => (&raw const umbra_host_compare).wrapping_add(slot.into()),
        }
    }
}

/// A conversion between XMM and MMX registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mixed(u16);

impl Mixed {
    /// CVTPI2PS (2A), CVTTPS2PI (2C), CVTPS2PI (2D) and, with 66, their twins for double precision.
    ///
    /// # Panics
    /// Where there is no such one: a bug of the caller's table.
    pub const fn new(prefix: Prefix, opcode: u8) -> Mixed {
        assert!(matches!(prefix, Prefix::None | Prefix::P66), "not a conversion of MMX registers");
        assert!(matches!(opcode, 0x2a | 0x2c | 0x2d), "not a conversion of MMX registers");
        Mixed(slot(prefix, opcode))
    }

    pub(super) fn address(self) -> *const u8 {
        simd(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(at: *const u8, length: usize) -> Vec<u8> {
        // SAFETY: `at` is where a routine of the tables begins, and no routine is shorter than `length` with what the
        // tables have between them; code is readable and never written.
        unsafe { std::slice::from_raw_parts(at, length) }.to_vec()
    }

    #[test]
    fn every_routine_is_its_instruction_and_ret() {
        for escape in 0xd8..=0xdf_u8 {
            for modrm in 0xc0..=0xff {
                assert_eq!(bytes(X87::registers(escape, modrm).address(), 3), [escape, modrm, 0xc3]);
            }
        }
        assert_eq!(bytes(X87::memory(0xd8, 7).address(), 3), [0xd8, 0x39, 0xc3]);
        assert_eq!(bytes(X87::memory(0xdf, 6).address(), 3), [0xdf, 0x31, 0xc3]);
        assert_eq!(bytes(Packed::integer(0x60).address(), 5), [0x66, 0x0f, 0x60, 0xc1, 0xc3]);
        assert_eq!(bytes(Mmx::new(0xfe).address(), 4), [0x0f, 0xfe, 0xc1, 0xc3]);
        assert_eq!(bytes(Packed::bits(Prefix::None, 0x14).address(), 4), [0x0f, 0x14, 0xc1, 0xc3]);
        assert_eq!(bytes(Float::new(Prefix::Pf2, 0x2d).address(), 5), [0xf2, 0x0f, 0x2d, 0xc1, 0xc3]);
        assert_eq!(bytes(Mixed::new(Prefix::P66, 0x2a).address(), 5), [0x66, 0x0f, 0x2a, 0xc1, 0xc3]);
        let compare = Float::compare(Prefix::Pf3, 0xfd);
        assert_eq!(bytes(compare.address(), 6), [0xf3, 0x0f, 0xc2, 0xc1, 5, 0xc3]);
    }

    #[test]
    #[should_panic(expected = "accesses more than a value")]
    fn fnsave_is_no_routine() {
        X87::memory(0xdd, 6);
    }

    #[test]
    #[should_panic(expected = "not an MMX instruction")]
    fn maskmovq_is_no_routine() {
        Mmx::new(0xf7);
    }
}
