//! DAA, DAS, AAA, AAS, AAM and AAD: values and flags, as pure functions of AX.
//!
//! See: Intel SDM vol. 2, each instruction's operation section.

use super::alu::{ARITHMETIC, Outcome, result_flags};
use super::{Exception, Exec, Width, ensure};
use crate::cpu::eflags::{AF, CF};

/// EFLAGS after an adjustment: ZF, SF and PF of AL, and AF and CF as said.
fn adjusted(ax: u32, flags: u32, auxiliary: bool, carry: bool) -> Outcome {
    let rest = if auxiliary { AF } else { 0 } | if carry { CF } else { 0 };
    let value = ax & 0xffff;
    Outcome { value, flags: flags & !ARITHMETIC | result_flags(value & 0xff, Width::B1) | rest }
}

/// DAA and DAS: AL's digits, `sign` by which the corrections go.
fn decimal(ax: u32, flags: u32, correct: fn(u32, u32) -> u32) -> Outcome {
    let al = ax & 0xff;
    let auxiliary = al & 0xf > 9 || flags & AF != 0;
    let carry = al > 0x99 || flags & CF != 0;
    let mut adjustment = 0;
    if auxiliary {
        adjustment |= 0x06;
    }
    if carry {
        adjustment |= 0x60;
    }
    adjusted(ax & 0xff00 | correct(al, adjustment) & 0xff, flags, auxiliary, carry)
}

pub(super) fn daa(ax: u32, flags: u32) -> Outcome {
    decimal(ax, flags, u32::wrapping_add)
}

pub(super) fn das(ax: u32, flags: u32) -> Outcome {
    let al = ax & 0xff;
    let borrowed = (al & 0xf > 9 || flags & AF != 0) && al < 6;
    let mut outcome = decimal(ax, flags, u32::wrapping_sub);
    if borrowed {
        outcome.flags |= CF;
    }
    outcome
}

/// AAA and AAS: one unpacked digit, the carry goes to AH.
fn ascii(ax: u32, flags: u32, correct: fn(u32, u32) -> u32) -> Outcome {
    let adjust = ax & 0xf > 9 || flags & AF != 0;
    let value = if adjust { correct(ax, 0x106) } else { ax };
    adjusted(value & 0xff0f, flags, adjust, adjust)
}

pub(super) fn aaa(ax: u32, flags: u32) -> Outcome {
    ascii(ax, flags, u32::wrapping_add)
}

pub(super) fn aas(ax: u32, flags: u32) -> Outcome {
    ascii(ax, flags, u32::wrapping_sub)
}

/// AAM: AL divided by `base`.
pub(super) fn aam(ax: u32, base: u32, flags: u32) -> Exec<Outcome> {
    ensure(base != 0, Exception::DE)?;
    let al = ax & 0xff;
    Ok(adjusted(((al / base) << 8) + al % base, flags, false, false))
}

/// AAD: AH times `base` plus AL.
pub(super) fn aad(ax: u32, base: u32, flags: u32) -> Outcome {
    let value = (ax >> 8 & 0xff) * base + (ax & 0xff);
    adjusted(value & 0xff, flags, false, false)
}
