//! Values and flags of the arithmetic instructions, as pure functions.
//!
//! Holds: each function takes EFLAGS, returns it with what it defines replaced, and leaves all else alone. Operands
//! come masked to the width, and results leave so.
//!
//! Flags that the architecture calls undefined are set as AMD's Zen sets them, where the native tests
//! (`tests/interp_native`) found that stable.
//!
//! See: Intel SDM vol. 1, appendix A (EFLAGS cross-reference); vol. 2 for each instruction.

use super::Width;
use crate::cpu::eflags::{AF, CF, OF, PF, SF, ZF};

/// The six flags that arithmetic sets.
pub(super) const ARITHMETIC: u32 = CF | PF | AF | ZF | SF | OF;

/// A result and EFLAGS after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) value: u32,
    pub(super) flags: u32,
}

/// A two-operand operation: destination, source, EFLAGS, width.
pub(super) type Binary = fn(u32, u32, u32, Width) -> Outcome;

/// `bit` where `set`.
fn flag(bit: u32, set: bool) -> u32 {
    if set { bit } else { 0 }
}

/// ZF, SF and PF of a result.
pub(super) fn result_flags(value: u32, width: Width) -> u32 {
    flag(ZF, value == 0)
        | flag(SF, value & width.sign() != 0)
        | flag(PF, (value as u8).count_ones().is_multiple_of(2))
}

fn outcome(value: u32, flags: u32, width: Width, rest: u32) -> Outcome {
    Outcome { value, flags: flags & !ARITHMETIC | result_flags(value, width) | rest }
}

fn add_with(a: u32, b: u32, carry: u32, flags: u32, width: Width) -> Outcome {
    let wide = u64::from(a) + u64::from(b) + u64::from(carry);
    let value = wide as u32 & width.mask();
    let rest = flag(CF, wide >> width.bits() != 0)
        | (a ^ b ^ value) & AF
        | flag(OF, (a ^ value) & (b ^ value) & width.sign() != 0);
    outcome(value, flags, width, rest)
}

fn sub_with(a: u32, b: u32, borrow: u32, flags: u32, width: Width) -> Outcome {
    let value = a.wrapping_sub(b).wrapping_sub(borrow) & width.mask();
    let rest = flag(CF, u64::from(a) < u64::from(b) + u64::from(borrow))
        | (a ^ b ^ value) & AF
        | flag(OF, (a ^ b) & (a ^ value) & width.sign() != 0);
    outcome(value, flags, width, rest)
}

pub(super) fn add(a: u32, b: u32, flags: u32, width: Width) -> Outcome {
    add_with(a, b, 0, flags, width)
}

pub(super) fn adc(a: u32, b: u32, flags: u32, width: Width) -> Outcome {
    add_with(a, b, flags & CF, flags, width)
}

pub(super) fn sub(a: u32, b: u32, flags: u32, width: Width) -> Outcome {
    sub_with(a, b, 0, flags, width)
}

pub(super) fn sbb(a: u32, b: u32, flags: u32, width: Width) -> Outcome {
    sub_with(a, b, flags & CF, flags, width)
}

pub(super) fn and(a: u32, b: u32, flags: u32, width: Width) -> Outcome {
    outcome(a & b, flags, width, 0)
}

pub(super) fn or(a: u32, b: u32, flags: u32, width: Width) -> Outcome {
    outcome(a | b, flags, width, 0)
}

pub(super) fn xor(a: u32, b: u32, flags: u32, width: Width) -> Outcome {
    outcome(a ^ b, flags, width, 0)
}

/// INC: as ADD 1, but CF stays.
pub(super) fn inc(a: u32, _: u32, flags: u32, width: Width) -> Outcome {
    let sum = add(a, 1, flags, width);
    Outcome { flags: sum.flags & !CF | flags & CF, ..sum }
}

/// DEC: as SUB 1, but CF stays.
pub(super) fn dec(a: u32, _: u32, flags: u32, width: Width) -> Outcome {
    let difference = sub(a, 1, flags, width);
    Outcome { flags: difference.flags & !CF | flags & CF, ..difference }
}

pub(super) fn neg(a: u32, _: u32, flags: u32, width: Width) -> Outcome {
    sub(0, a, flags, width)
}

pub(super) fn not(a: u32, _: u32, flags: u32, width: Width) -> Outcome {
    Outcome { value: !a & width.mask(), flags }
}

/// A shift's outcome: AF, which is undefined, is set.
fn shifted(value: u32, carry: bool, overflow: bool, flags: u32, width: Width) -> Outcome {
    outcome(value, flags, width, AF | flag(CF, carry) | flag(OF, overflow))
}

/// SHL; the count comes whole and is taken modulo 32.
pub(super) fn shl(a: u32, count: u32, flags: u32, width: Width) -> Outcome {
    let count = count & 31;
    if count == 0 {
        return Outcome { value: a, flags };
    }
    let wide = u64::from(a) << count;
    let value = wide as u32 & width.mask();
    let carry = wide >> width.bits() & 1 != 0;
    let overflow = carry != (value & width.sign() != 0);
    shifted(value, carry, overflow, flags, width)
}

/// SHR.
pub(super) fn shr(a: u32, count: u32, flags: u32, width: Width) -> Outcome {
    let count = count & 31;
    if count == 0 {
        return Outcome { value: a, flags };
    }
    let value = (u64::from(a) >> count) as u32;
    let carry = u64::from(a) >> (count - 1) & 1 != 0;
    // The bit that became the one below the sign: for a count of 1 the old sign.
    let overflow = value << 1 & width.sign() != 0;
    shifted(value, carry, overflow, flags, width)
}

/// SAR.
pub(super) fn sar(a: u32, count: u32, flags: u32, width: Width) -> Outcome {
    let count = count & 31;
    if count == 0 {
        return Outcome { value: a, flags };
    }
    let wide = i64::from(width.extend(a) as i32);
    let value = (wide >> count) as u32 & width.mask();
    shifted(value, wide >> (count - 1) & 1 != 0, false, flags, width)
}

/// Rotates change CF and OF alone; their OF is CF (or the old sign's neighbour) against the new sign.
fn rotated(value: u32, carry: bool, overflow: bool, flags: u32) -> Outcome {
    Outcome { value, flags: flags & !(CF | OF) | flag(CF, carry) | flag(OF, overflow) }
}

pub(super) fn rol(a: u32, count: u32, flags: u32, width: Width) -> Outcome {
    if count & 31 == 0 {
        return Outcome { value: a, flags };
    }
    let count = count & (width.bits() - 1);
    let twice = u64::from(a) << width.bits() | u64::from(a);
    let value = (twice << count >> width.bits()) as u32 & width.mask();
    let carry = value & 1 != 0;
    rotated(value, carry, carry != (value & width.sign() != 0), flags)
}

pub(super) fn ror(a: u32, count: u32, flags: u32, width: Width) -> Outcome {
    if count & 31 == 0 {
        return Outcome { value: a, flags };
    }
    let count = count & (width.bits() - 1);
    let twice = u64::from(a) << width.bits() | u64::from(a);
    let value = (twice >> count) as u32 & width.mask();
    let carry = value & width.sign() != 0;
    rotated(value, carry, carry != (value << 1 & width.sign() != 0), flags)
}

/// RCL: a rotation of CF and the operand together, one bit more than the width.
pub(super) fn rcl(a: u32, count: u32, flags: u32, width: Width) -> Outcome {
    if count & 31 == 0 {
        return Outcome { value: a, flags };
    }
    let ring = width.bits() + 1;
    let count = (count & 31) % ring;
    let whole = u64::from(flags & CF) << width.bits() | u64::from(a);
    let turned = whole << count | whole >> (ring - count);
    let value = turned as u32 & width.mask();
    let carry = turned >> width.bits() & 1 != 0;
    rotated(value, carry, carry != (value & width.sign() != 0), flags)
}

/// RCR.
pub(super) fn rcr(a: u32, count: u32, flags: u32, width: Width) -> Outcome {
    if count & 31 == 0 {
        return Outcome { value: a, flags };
    }
    let ring = width.bits() + 1;
    let count = (count & 31) % ring;
    let whole = u64::from(flags & CF) << width.bits() | u64::from(a);
    let turned = whole >> count | whole << (ring - count);
    let value = turned as u32 & width.mask();
    let carry = turned >> width.bits() & 1 != 0;
    let overflow = (value ^ value << 1) & width.sign() != 0;
    rotated(value, carry, overflow, flags)
}

/// SHLD: `a` shifted left, filled from the top of `b`. A 16-bit count above 16, which is undefined, goes on into
/// `b` again; CF and OF are those of `a` shifted alone.
pub(super) fn shld(a: u32, b: u32, count: u32, flags: u32, width: Width) -> Outcome {
    let count = count & 31;
    if count == 0 {
        return Outcome { value: a, flags };
    }
    let bits = width.bits();
    let line = u128::from(a) << (2 * bits) | u128::from(b) << bits | u128::from(b);
    let value = (line << count >> (2 * bits)) as u32 & width.mask();
    let alone = u64::from(a) << count;
    let carry = alone >> bits & 1 != 0;
    let overflow = carry != (alone & u64::from(width.sign()) != 0);
    shifted(value, carry, overflow, flags, width)
}

/// SHRD: `a` shifted right, filled from the bottom of `b`, and again from `b`.
pub(super) fn shrd(a: u32, b: u32, count: u32, flags: u32, width: Width) -> Outcome {
    let count = count & 31;
    if count == 0 {
        return Outcome { value: a, flags };
    }
    let bits = width.bits();
    let line = u128::from(b) << (2 * bits) | u128::from(b) << bits | u128::from(a);
    let value = (line >> count) as u32 & width.mask();
    let carry = u64::from(a) >> (count - 1) & 1 != 0;
    let overflow = (value ^ value << 1) & width.sign() != 0;
    shifted(value, carry, overflow, flags, width)
}

/// True where EFLAGS meet condition `code` (the low four bits of Jcc, SETcc and CMOVcc).
pub(super) fn condition(code: u32, flags: u32) -> bool {
    let any = |bits| flags & bits != 0;
    let less = any(SF) != any(OF);
    let met = match code >> 1 & 7 {
        0 => any(OF),
        1 => any(CF),
        2 => any(ZF),
        3 => any(CF | ZF),
        4 => any(SF),
        5 => any(PF),
        6 => less,
        _ => less || any(ZF),
    };
    met != (code & 1 != 0)
}
