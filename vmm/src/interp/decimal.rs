//! DAA, DAS, AAA, AAS, AAM and AAD: values and flags, as pure functions of AX.
//!
//! Their undefined flags are those of the addition or subtraction that they make, as AMD's Zen has it: of AL's eight
//! bits in DAA, DAS and AAD, of AX's sixteen, before the cut to a digit, in AAA and AAS.
//!
//! See: Intel SDM vol. 2, each instruction's operation section.

use super::alu::{self, Binary, Outcome};
use super::{Exception, Exec, Width, ensure};
use crate::cpu::eflags::{AF, CF};

/// EFLAGS with AF and CF as said.
fn with_carries(flags: u32, auxiliary: bool, carry: bool) -> u32 {
    flags & !(AF | CF) | if auxiliary { AF } else { 0 } | if carry { CF } else { 0 }
}

/// DAA and DAS: AL's digits, and the operation that corrects them.
fn decimal(ax: u32, flags: u32, correct: Binary) -> (Outcome, bool) {
    let al = ax & 0xff;
    let auxiliary = al & 0xf > 9 || flags & AF != 0;
    let carry = al > 0x99 || flags & CF != 0;
    let adjustment = if auxiliary { 0x06 } else { 0 } | if carry { 0x60 } else { 0 };
    let corrected = correct(al, adjustment, flags, Width::B1);
    let flags = with_carries(corrected.flags, auxiliary, carry);
    (Outcome { value: ax & 0xff00 | corrected.value, flags }, auxiliary)
}

pub(super) fn daa(ax: u32, flags: u32) -> Outcome {
    decimal(ax, flags, alu::add).0
}

pub(super) fn das(ax: u32, flags: u32) -> Outcome {
    let (outcome, auxiliary) = decimal(ax, flags, alu::sub);
    let borrowed = auxiliary && ax & 0xff < 6;
    Outcome { flags: outcome.flags | if borrowed { CF } else { 0 }, ..outcome }
}

/// AAA and AAS: one unpacked digit, the carry goes to AH.
fn ascii(ax: u32, flags: u32, correct: Binary) -> Outcome {
    let adjust = ax & 0xf > 9 || flags & AF != 0;
    let corrected = correct(ax, if adjust { 0x106 } else { 0 }, flags, Width::B2);
    Outcome { value: corrected.value & 0xff0f, flags: with_carries(corrected.flags, adjust, adjust) }
}

pub(super) fn aaa(ax: u32, flags: u32) -> Outcome {
    ascii(ax, flags, alu::add)
}

pub(super) fn aas(ax: u32, flags: u32) -> Outcome {
    ascii(ax, flags, alu::sub)
}

/// AAM: AL divided by `base`.
pub(super) fn aam(ax: u32, base: u32, flags: u32) -> Exec<Outcome> {
    ensure(base != 0, Exception::DE)?;
    let al = ax & 0xff;
    let digit = alu::or(al % base, 0, flags, Width::B1);
    Ok(Outcome { value: ((al / base) << 8) + digit.value, flags: digit.flags })
}

/// AAD: AH times `base` plus AL.
pub(super) fn aad(ax: u32, base: u32, flags: u32) -> Outcome {
    let product = ((ax >> 8 & 0xff) * base) & 0xff;
    alu::add(ax & 0xff, product, flags, Width::B1)
}
