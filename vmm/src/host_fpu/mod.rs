//! The host's FPU, put to work for the guest: one x87, MMX or SSE operation at a time.
//!
//! Story: the interpreter's FPU instructions compute nothing themselves. Operands come in, the very operation runs on
//! the host, and results, flags and exceptions go out; what they mean is the interpreter's business.
//!
//! How an operation runs: `stubs` holds one little routine for each, nothing but its bytes and a RET, in tables.
//! Each function here loads the guest's registers into fixed host registers, calls the routine, and stores them again.
//!
//! Holds:
//! - INV-HOSTFPU-1: no exception of the guest's arithmetic reaches the host as a signal. x87 is loaded without exception
//!   flags, so none is pending when the routine runs; one that the routine itself raises would only be reported by
//!   the next waiting instruction, and FXSAVE and FNINIT, which follow, do not wait. SSE runs with all masks set.
//! - INV-HOSTFPU-2: the host's FPU is left as the calling convention wants it: x87 stack empty, its control word
//!   reset, MXCSR as it was, direction flag clear.
//! - Everything unsafe of the FPU is in this module; its functions are safe to call with any values.
//!
//! Limits: what the architecture leaves to the implementation (the last bits of transcendental functions, RCPPS,
//! RSQRTPS) is the host's choice, so a guest can see on which CPU it is.
//!
//! See: Intel SDM vol. 1, 8.6 (when x87 exceptions are reported), 11.5 (SSE exceptions).

mod stubs;

use std::arch::asm;

pub use stubs::{Float, Mixed, Mmx, Packed, Prefix, X87};

use crate::cpu::fpu::MXCSR_MASK;
use crate::cpu::{Fpu, eflags};

/// The flags that FCMOV reads and FCOMI, COMISS and their kin write.
const FLAGS: u64 = (eflags::CF | eflags::PF | eflags::AF | eflags::ZF | eflags::SF | eflags::OF) as u64;
/// The bit of EFLAGS that is always set.
const FLAGS_FIXED: u64 = eflags::FIXED as u64;
/// All exception masks of MXCSR.
const MXCSR_MASKS: u32 = 0x1f80;
/// All exception flags of MXCSR.
const MXCSR_FLAGS: u32 = 0x3f;

/// Runs an x87 operation on `fpu`, whose exception flags are cleared first, and which afterwards holds those that the
/// operation raised. A memory operand lies in `operand`. Returns the arithmetic flags of `flags` as they are then.
///
/// Afterwards the pointers in `fpu` mean nothing.
pub fn x87(op: X87, fpu: &mut Fpu, operand: &mut [u8; 16], flags: u32) -> u32 {
    fpu.clear_exceptions();
    let mut host_mxcsr = 0_u32;
    let mut flags = u64::from(flags) & FLAGS | FLAGS_FIXED;
    // SAFETY:
    // - FXRSTOR and FXSAVE access 512 bytes at a 16-byte boundary: `Fpu` is repr(C), that large and so aligned, and
    //   borrowed mutably; every bit pattern that FXSAVE may store is valid for its integers. FXRSTOR faults on
    //   reserved bits of MXCSR alone, which an `Fpu` never has set (INV-FPU-1).
    // - The routine is one of `stubs` (`X87` cannot be made otherwise): a single x87 instruction and RET. It accesses at
    //   most 10 bytes at RCX, which points to 16 that are borrowed mutably, writes no general register but AX, and
    //   cannot raise #MF, since no exception was pending when it began (see INV-HOSTFPU-1).
    // - POPF changes arithmetic flags and clears DF, TF, NT and AC; a process has IF and IOPL out of its reach.
    // - `nostack` is not given, so pushing and calling are allowed; the red zone is out of the way.
    // - All that FXRSTOR, the routine and FNINIT change is declared: `clobber_abi` names the x87, MMX and SSE registers
    //   and RAX; RCX and the explicit ones are operands. MXCSR is given back by LDMXCSR from what STMXCSR stored; the
    //   x87 control word becomes what FNINIT makes it, the calling convention's default.
    unsafe {
        asm!(
            "stmxcsr [rdi]",
            "fxrstor [rsi]",
            "push rdx",
            "popfq",
            "call r8",
            "pushfq",
            "pop rdx",
            "fxsave [rsi]",
            "fninit",
            "ldmxcsr [rdi]",
            in("rdi") &raw mut host_mxcsr,
            in("rsi") &raw mut *fpu,
            in("rcx") operand.as_mut_ptr(),
            in("r8") op.address(),
            inout("rdx") flags,
            clobber_abi("sysv64"),
        );
    }
    flags as u32 & FLAGS as u32
}

/// Two operands in XMM registers, the first of which becomes the result; no floating point.
pub fn packed(op: Packed, a: u128, b: u128) -> u128 {
    let mut operands = [a, b];
    // SAFETY:
    // - `operands` is 32 bytes at a 16-byte boundary (u128's alignment), borrowed mutably.
    // - The routine is one of `stubs`: a single instruction on XMM0 and XMM1, and RET. It accesses no memory and writes
    //   XMM0, which `clobber_abi` declares.
    // - `nostack` is not given, so calling is allowed.
    unsafe {
        asm!(
            "movaps xmm0, [rsi]",
            "movaps xmm1, [rsi + 16]",
            "call r8",
            "movaps [rsi], xmm0",
            in("rsi") operands.as_mut_ptr(),
            in("r8") op.address(),
            clobber_abi("sysv64"),
        );
    }
    operands[0]
}

/// The same with MMX registers.
pub fn mmx(op: Mmx, a: u64, b: u64) -> u64 {
    let mut operands = [a, b];
    // SAFETY:
    // - `operands` is 16 bytes, borrowed mutably.
    // - The routine is one of `stubs`: a single instruction on MM0 and MM1, and RET. It accesses no memory and writes
    //   MM0. MMX instructions raise #MF where an x87 exception is pending: the calling convention has them all masked,
    //   and whoever loads guest state here ends with FNINIT.
    // - MMX registers are the x87 stack; EMMS leaves it empty again, and `clobber_abi` declares both.
    // - `nostack` is not given, so calling is allowed.
    unsafe {
        asm!(
            "movq mm0, [rsi]",
            "movq mm1, [rsi + 8]",
            "call r8",
            "movq [rsi], mm0",
            "emms",
            in("rsi") operands.as_mut_ptr(),
            in("r8") op.address(),
            clobber_abi("sysv64"),
        );
    }
    operands[0]
}

/// What a floating-point instruction is given and what it leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Operands {
    /// The destination, XMM0.
    pub a: u128,
    /// The source, XMM1.
    pub b: u128,
    /// A source in an MMX register, or the result there.
    pub mm: u64,
    /// A source in a general register, or the result there.
    pub general: u32,
    /// MXCSR: rounding, DAZ and FTZ in; out, exactly the exception flags that the instruction raised.
    pub mxcsr: u32,
    /// Out: the arithmetic flags as COMISS and its kin set them.
    pub flags: u32,
}

/// Runs a floating-point instruction with all exceptions masked.
pub fn float(op: Float, operands: &mut Operands) {
    let mut host_mxcsr = 0_u32;
    let (mut general, mut flags) = (u64::from(operands.general), 0_u64);
    operands.mxcsr = quiet(operands.mxcsr);
    // SAFETY:
    // - `operands` is repr(C) and borrowed mutably: XMM0's 16 bytes at 0 and XMM1's at 16, at a 16-byte boundary (u128's
    //   alignment); RDX points to its `mxcsr`, RDI to four bytes that are ours.
    // - LDMXCSR faults on reserved bits: `quiet` clears them, and the host's own value comes from STMXCSR.
    // - The routine is one of `stubs`: a single instruction on XMM0, XMM1, EAX and ECX, and RET. It accesses no memory; no
    //   SIMD exception can be raised, since `quiet` has masked them all; it does not touch x87.
    // - XMM registers and RAX are declared by `clobber_abi`, RCX and the others are operands; MXCSR is given back.
    // - `nostack` is not given, so pushing and calling are allowed.
    unsafe {
        asm!(
            "stmxcsr [rdi]",
            "ldmxcsr [rdx]",
            "movaps xmm0, [rsi]",
            "movaps xmm1, [rsi + 16]",
            "call r8",
            "pushfq",
            "pop r9",
            "movaps [rsi], xmm0",
            "stmxcsr [rdx]",
            "ldmxcsr [rdi]",
            in("rdi") &raw mut host_mxcsr,
            in("rdx") &raw mut operands.mxcsr,
            in("rsi") &raw mut *operands,
            in("rcx") general,
            in("r8") op.address(),
            out("rax") general,
            out("r9") flags,
            clobber_abi("sysv64"),
        );
    }
    operands.general = general as u32;
    operands.flags = flags as u32 & FLAGS as u32;
    operands.mxcsr &= MXCSR_FLAGS;
}

/// The same for a conversion between XMM and MMX registers.
pub fn mixed(op: Mixed, operands: &mut Operands) {
    let mut host_mxcsr = 0_u32;
    operands.mxcsr = quiet(operands.mxcsr);
    // SAFETY: as for `float`; besides, RCX points to the eight bytes of `operands.mm`, and as for `mmx` EMMS leaves the x87
    // stack empty.
    unsafe {
        asm!(
            "stmxcsr [rdi]",
            "ldmxcsr [rdx]",
            "movaps xmm0, [rsi]",
            "movaps xmm1, [rsi + 16]",
            "movq mm0, [rcx]",
            "movq mm1, [rcx]",
            "call r8",
            "movaps [rsi], xmm0",
            "movq [rcx], mm0",
            "emms",
            "stmxcsr [rdx]",
            "ldmxcsr [rdi]",
            in("rdi") &raw mut host_mxcsr,
            in("rdx") &raw mut operands.mxcsr,
            in("rsi") &raw mut *operands,
            in("rcx") &raw mut operands.mm,
            in("r8") op.address(),
            clobber_abi("sysv64"),
        );
    }
    operands.mxcsr &= MXCSR_FLAGS;
}

/// MXCSR for the host: no flags yet, no exception unmasked, no reserved bit. Flushing to zero is for masked underflow
/// alone.
fn quiet(guest: u32) -> u32 {
    const UNDERFLOW_MASK: u32 = 1 << 11;
    const FLUSH_TO_ZERO: u32 = 1 << 15;
    let flush = if guest & UNDERFLOW_MASK != 0 { FLUSH_TO_ZERO } else { 0 };
    guest & (MXCSR_MASK & !FLUSH_TO_ZERO | flush) & !MXCSR_FLAGS | MXCSR_MASKS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::fpu::status;

    /// FCW, FSW and tag word of the host, and MXCSR.
    fn host() -> ([u16; 3], u32) {
        let (mut environment, mut mxcsr) = ([0_u16; 14], 0_u32);
        // SAFETY: FNSTENV stores 28 bytes and STMXCSR four, to arrays that large; FLDENV loads back what FNSTENV has
        // stored, which undoes its masking of exceptions. No other state changes.
        unsafe {
            asm!(
                "fnstenv [{environment}]",
                "fldenv [{environment}]",
                "stmxcsr [{mxcsr}]",
                environment = in(reg) environment.as_mut_ptr(),
                mxcsr = in(reg) &raw mut mxcsr,
            );
        }
        ([environment[0], environment[2], environment[4]], mxcsr)
    }

    #[test]
    fn host_is_left_clean_whatever_the_guest_had() {
        let before = host();
        assert_eq!(before.0, [0x037f, 0, 0xffff]);
        // An FPU full of odd things, with nothing masked, divides by zero.
        let mut fpu = Fpu::default();
        fpu.set_words(0x0c00, 0x3800 | status::PE);
        fpu.set_tag_word(0);
        assert!(fpu.set_mxcsr(0xe03f));
        assert!(fpu.pending());
        fpu.set_st(0, 0x3fff << 64 | 1 << 63);
        let flags =
            x87(X87::registers(0xd8, 0xf1), &mut fpu, &mut [0; 16], eflags::CF | eflags::DF | eflags::TF);
        assert_eq!(fpu.status() & status::CLEARED, status::ZE | status::ES | status::B);
        assert_eq!(flags, eflags::CF);
        assert_eq!(host(), before);
        let mut operands = Operands { a: 0x3f80_0000, mxcsr: 0xe000, ..Operands::default() };
        float(Float::new(Prefix::Pf3, 0x5e), &mut operands);
        assert_eq!((operands.a, operands.mxcsr), (0x7f80_0000, 4), "one by zero");
        mixed(Mixed::new(Prefix::None, 0x2d), &mut operands);
        assert_eq!(mmx(Mmx::new(0xfc), 0xff01, 0x0101), 0x0002);
        assert_eq!(packed(Packed::integer(0xef), 5, 3), 6);
        assert_eq!(host(), before);
    }

    #[test]
    fn comparisons_set_flags_and_fcmov_reads_them() {
        let mut operands = Operands { a: 0x3f80_0000, b: 0x4000_0000, mxcsr: 0x1f80, ..Operands::default() };
        float(Float::new(Prefix::None, 0x2f), &mut operands);
        assert_eq!(operands.flags, eflags::CF);
        let mut fpu = Fpu::default();
        fpu.set_tag_word(0);
        (0..8).for_each(|n| fpu.set_st(n, n as u128));
        // fcmovb st(0), st(3); fcomi st(0), st(3)
        let mut none = [0; 16];
        assert_eq!(x87(X87::registers(0xda, 0xc3), &mut fpu, &mut none, operands.flags), eflags::CF);
        assert_eq!(fpu.st(0), 3);
        assert_eq!(x87(X87::registers(0xdb, 0xf3), &mut fpu, &mut none, 0), eflags::ZF);
    }

    #[test]
    fn memory_operands_go_both_ways() {
        let mut fpu = Fpu::default();
        let mut operand = [0; 16];
        operand[..8].copy_from_slice(&1.5_f64.to_le_bytes());
        x87(X87::memory(0xdd, 0), &mut fpu, &mut operand, 0);
        assert_eq!((fpu.top(), fpu.tags(), fpu.st(0)), (7, 0x80, 0x3fff << 64 | 3 << 62));
        operand = [0xff; 16];
        x87(X87::memory(0xd9, 3), &mut fpu, &mut operand, 0);
        assert_eq!(operand[..4], 1.5_f32.to_le_bytes());
        assert_eq!((operand[4], fpu.tags()), (0xff, 0));
    }
}
