//! Values and flags of the arithmetic instructions, as pure functions.
//!
//! Holds: each function takes the flags, returns them with what it defines replaced, and leaves the others alone. Operands
//! come masked to the width, and results leave so.
//!
//! Flags that the architecture calls undefined are set as AMD's Zen sets them, where the native tests
//! (`tests/interp_native`) found that stable.
//!
//! See: Intel SDM vol. 1, appendix A (EFLAGS cross-reference); vol. 2 for each instruction.

use super::Width;
use super::flags::Flags;

/// A result and the flags after it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outcome {
    pub(super) value: u32,
    pub(super) flags: Flags,
}

/// A two-operand operation: destination, source, flags, width.
pub(super) type Binary = fn(u32, u32, Flags, Width) -> Outcome;

fn outcome(value: u32, carries: u32, width: Width) -> Outcome {
    Outcome { value, flags: Flags::of_result(value, carries, width) }
}

/// A bit carries where both operands have it, or either has it and the sum does not.
fn add_with(a: u32, b: u32, carry: bool, width: Width) -> Outcome {
    let value = a.wrapping_add(b).wrapping_add(carry.into()) & width.mask();
    outcome(value, a & b | (a | b) & !value, width)
}

/// A bit borrows where only what is taken has it, or where that and the difference have it, or neither.
fn sub_with(a: u32, b: u32, borrow: bool, width: Width) -> Outcome {
    let value = a.wrapping_sub(b).wrapping_sub(borrow.into()) & width.mask();
    outcome(value, !a & b | (!a | b) & value, width)
}

pub(super) fn add(a: u32, b: u32, _: Flags, width: Width) -> Outcome {
    add_with(a, b, false, width)
}

pub(super) fn adc(a: u32, b: u32, flags: Flags, width: Width) -> Outcome {
    add_with(a, b, flags.carry(), width)
}

pub(super) fn sub(a: u32, b: u32, _: Flags, width: Width) -> Outcome {
    sub_with(a, b, false, width)
}

pub(super) fn sbb(a: u32, b: u32, flags: Flags, width: Width) -> Outcome {
    sub_with(a, b, flags.carry(), width)
}

pub(super) fn and(a: u32, b: u32, _: Flags, width: Width) -> Outcome {
    outcome(a & b, 0, width)
}

pub(super) fn or(a: u32, b: u32, _: Flags, width: Width) -> Outcome {
    outcome(a | b, 0, width)
}

pub(super) fn xor(a: u32, b: u32, _: Flags, width: Width) -> Outcome {
    outcome(a ^ b, 0, width)
}

/// INC: as ADD 1, but CF stays.
pub(super) fn inc(a: u32, _: u32, flags: Flags, width: Width) -> Outcome {
    let sum = add(a, 1, flags, width);
    Outcome { flags: sum.flags.with_carry(flags.carry()), ..sum }
}

/// DEC: as SUB 1, but CF stays.
pub(super) fn dec(a: u32, _: u32, flags: Flags, width: Width) -> Outcome {
    let difference = sub(a, 1, flags, width);
    Outcome { flags: difference.flags.with_carry(flags.carry()), ..difference }
}

pub(super) fn neg(a: u32, _: u32, flags: Flags, width: Width) -> Outcome {
    sub(0, a, flags, width)
}

pub(super) fn not(a: u32, _: u32, flags: Flags, width: Width) -> Outcome {
    Outcome { value: !a & width.mask(), flags }
}

/// A shift's outcome: AF, which is undefined, is set.
fn shifted(value: u32, carry: bool, overflow: bool, width: Width) -> Outcome {
    let flags = Flags::of_result(value, 0, width).with_auxiliary(true);
    Outcome { value, flags: flags.with_carry_and_overflow(carry, overflow) }
}

/// SHL; the count comes whole and is taken modulo 32.
pub(super) fn shl(a: u32, count: u32, flags: Flags, width: Width) -> Outcome {
    let count = count & 31;
    if count == 0 {
        return Outcome { value: a, flags };
    }
    let wide = u64::from(a) << count;
    let value = wide as u32 & width.mask();
    let carry = wide >> width.bits() & 1 != 0;
    let overflow = carry != (value & width.sign() != 0);
    shifted(value, carry, overflow, width)
}

/// SHR.
pub(super) fn shr(a: u32, count: u32, flags: Flags, width: Width) -> Outcome {
    let count = count & 31;
    if count == 0 {
        return Outcome { value: a, flags };
    }
    let value = (u64::from(a) >> count) as u32;
    let carry = u64::from(a) >> (count - 1) & 1 != 0;
    // The bit that became the one below the sign: for a count of 1 the old sign.
    let overflow = value << 1 & width.sign() != 0;
    shifted(value, carry, overflow, width)
}

/// SAR.
pub(super) fn sar(a: u32, count: u32, flags: Flags, width: Width) -> Outcome {
    let count = count & 31;
    if count == 0 {
        return Outcome { value: a, flags };
    }
    let wide = i64::from(width.extend(a) as i32);
    let value = (wide >> count) as u32 & width.mask();
    shifted(value, wide >> (count - 1) & 1 != 0, false, width)
}

/// Rotates change CF and OF alone; their OF is CF (or the old sign's neighbour) against the new sign.
fn rotated(value: u32, carry: bool, overflow: bool, flags: Flags) -> Outcome {
    Outcome { value, flags: flags.with_carry_and_overflow(carry, overflow) }
}

pub(super) fn rol(a: u32, count: u32, flags: Flags, width: Width) -> Outcome {
    if count & 31 == 0 {
        return Outcome { value: a, flags };
    }
    let count = count & (width.bits() - 1);
    let twice = u64::from(a) << width.bits() | u64::from(a);
    let value = (twice << count >> width.bits()) as u32 & width.mask();
    let carry = value & 1 != 0;
    rotated(value, carry, carry != (value & width.sign() != 0), flags)
}

pub(super) fn ror(a: u32, count: u32, flags: Flags, width: Width) -> Outcome {
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
pub(super) fn rcl(a: u32, count: u32, flags: Flags, width: Width) -> Outcome {
    if count & 31 == 0 {
        return Outcome { value: a, flags };
    }
    let ring = width.bits() + 1;
    let count = (count & 31) % ring;
    let whole = u64::from(flags.carry()) << width.bits() | u64::from(a);
    let turned = whole << count | whole >> (ring - count);
    let value = turned as u32 & width.mask();
    let carry = turned >> width.bits() & 1 != 0;
    rotated(value, carry, carry != (value & width.sign() != 0), flags)
}

/// RCR.
pub(super) fn rcr(a: u32, count: u32, flags: Flags, width: Width) -> Outcome {
    if count & 31 == 0 {
        return Outcome { value: a, flags };
    }
    let ring = width.bits() + 1;
    let count = (count & 31) % ring;
    let whole = u64::from(flags.carry()) << width.bits() | u64::from(a);
    let turned = whole >> count | whole << (ring - count);
    let value = turned as u32 & width.mask();
    let carry = turned >> width.bits() & 1 != 0;
    let overflow = (value ^ value << 1) & width.sign() != 0;
    rotated(value, carry, overflow, flags)
}

/// SHLD: `a` shifted left, filled from the top of `b`. A 16-bit count above 16, which is undefined, goes on into
/// `b` again; CF and OF are those of `a` shifted alone.
pub(super) fn shld(a: u32, b: u32, count: u32, flags: Flags, width: Width) -> Outcome {
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
    shifted(value, carry, overflow, width)
}

/// SHRD: `a` shifted right, filled from the bottom of `b`, and again from `b`.
pub(super) fn shrd(a: u32, b: u32, count: u32, flags: Flags, width: Width) -> Outcome {
    let count = count & 31;
    if count == 0 {
        return Outcome { value: a, flags };
    }
    let bits = width.bits();
    let line = u128::from(b) << (2 * bits) | u128::from(b) << bits | u128::from(a);
    let value = (line >> count) as u32 & width.mask();
    let carry = u64::from(a) >> (count - 1) & 1 != 0;
    let overflow = (value ^ value << 1) & width.sign() != 0;
    shifted(value, carry, overflow, width)
}
