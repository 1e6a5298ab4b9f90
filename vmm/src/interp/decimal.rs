//! DAA, DAS, AAA, AAS, AAM and AAD: values and flags, as pure functions of AX.
//!
//! Their undefined flags are those of the addition or subtraction that they make, as AMD's Zen has it: of AL's eight
//! bits in DAA, DAS and AAD, of AX's sixteen, before the cut to a digit, in AAA and AAS.
//!
//! See: Intel SDM vol. 2, each instruction's operation section.

use super::alu::{self, Binary, Outcome};
use super::flags::Flags;
use super::{Exception, Exec, Width, ensure};

/// DAA and DAS: AL's digits, and the operation that corrects them.
fn decimal(ax: u32, flags: Flags, correct: Binary) -> (Outcome, bool) {
    let al = ax & 0xff;
    let auxiliary = al & 0xf > 9 || flags.auxiliary();
    let carry = al > 0x99 || flags.carry();
    let adjustment = if auxiliary { 0x06 } else { 0 } | if carry { 0x60 } else { 0 };
    let corrected = correct(al, adjustment, flags, Width::B1);
    let flags = corrected.flags.with_auxiliary(auxiliary).with_carry(carry);
    (Outcome { value: ax & 0xff00 | corrected.value, flags }, auxiliary)
}

pub(super) fn daa(ax: u32, flags: Flags) -> Outcome {
    decimal(ax, flags, alu::add).0
}

pub(super) fn das(ax: u32, flags: Flags) -> Outcome {
    let (outcome, auxiliary) = decimal(ax, flags, alu::sub);
    let borrowed = auxiliary && ax & 0xff < 6;
    Outcome { flags: outcome.flags.with_carry(borrowed || outcome.flags.carry()), ..outcome }
}

/// AAA and AAS: one unpacked digit, the carry goes to AH.
fn ascii(ax: u32, flags: Flags, correct: Binary) -> Outcome {
    let adjust = ax & 0xf > 9 || flags.auxiliary();
    let corrected = correct(ax, if adjust { 0x106 } else { 0 }, flags, Width::B2);
    let flags = corrected.flags.with_auxiliary(adjust).with_carry(adjust);
    Outcome { value: corrected.value & 0xff0f, flags }
}

pub(super) fn aaa(ax: u32, flags: Flags) -> Outcome {
    ascii(ax, flags, alu::add)
}

pub(super) fn aas(ax: u32, flags: Flags) -> Outcome {
    ascii(ax, flags, alu::sub)
}

/// AAM: AL divided by `base`.
pub(super) fn aam(ax: u32, base: u32, flags: Flags) -> Exec<Outcome> {
    ensure(base != 0, Exception::DE)?;
    let al = ax & 0xff;
    let digit = alu::or(al % base, 0, flags, Width::B1);
    Ok(Outcome { value: ((al / base) << 8) + digit.value, flags: digit.flags })
}

/// AAD: AH times `base` plus AL.
pub(super) fn aad(ax: u32, base: u32, flags: Flags) -> Outcome {
    let product = ((ax >> 8 & 0xff) * base) & 0xff;
    alu::add(ax & 0xff, product, flags, Width::B1)
}
