//! The arithmetic flags, kept as what they are computed from.
//!
//! Story: most instructions set all six flags, and few of those are ever looked at. So what is kept is the result and the carries
//! out of each bit, which cost next to nothing, and a flag is made of them when somebody asks. Code that runs in blocks
//! keeps them so from one instruction to the next (`engine`); EFLAGS have them wherever else they are looked at.
//!
//! ```text
//! zero     ZF: it is 0
//! sign     SF: bit 31      PF: the low byte has an even number of ones
//! carries  CF: bit 31      OF: bits 31 and 30 differ      AF: bit 3
//! ```
//!
//! Holds: any six flags can be kept so, those that no result has among them.

use super::Width;
use crate::cpu::eflags::{AF, CF, OF, PF, SF, ZF};

/// The six flags that arithmetic sets.
pub(super) const ARITHMETIC: u32 = CF | PF | AF | ZF | SF | OF;

const CARRY: u32 = 1 << 31;
const BELOW: u32 = 1 << 30;
const AUXILIARY: u32 = 1 << 3;

/// The six flags. There is no comparing two: those of one meaning may differ.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flags {
    zero: u32,
    sign: u32,
    carries: u32,
}

impl Flags {
    /// Those of EFLAGS.
    #[inline(always)]
    pub(super) fn of(eflags: u32) -> Flags {
        let sign = (eflags & SF) << 24 | u32::from(eflags & PF == 0);
        Flags { zero: !eflags & ZF, sign, carries: 0 }
            .with_carry_and_overflow(eflags & CF != 0, eflags & OF != 0)
            .with_auxiliary(eflags & AF != 0)
    }

    /// EFLAGS with these in place.
    #[inline(always)]
    pub(super) fn within(self, eflags: u32) -> u32 {
        let flag = |bit, set| if set { bit } else { 0 };
        eflags & !ARITHMETIC
            | flag(CF, self.carry())
            | flag(PF, self.parity())
            | flag(AF, self.auxiliary())
            | flag(ZF, self.zero())
            | flag(SF, self.sign())
            | flag(OF, self.overflow())
    }

    /// Those of a result, with `carries` out of each of its bits.
    #[inline(always)]
    pub(super) fn of_result(value: u32, carries: u32, width: Width) -> Flags {
        let carries = match width {
            Width::B1 => carries << 24 & (CARRY | BELOW) | carries & AUXILIARY,
            Width::B2 => carries << 16 & (CARRY | BELOW) | carries & AUXILIARY,
            Width::B4 | Width::B8 => carries,
        };
        Flags { zero: value, sign: width.extend(value), carries }
    }

    /// The same flags but for CF and OF.
    #[inline(always)]
    pub(super) fn with_carry_and_overflow(self, carry: bool, overflow: bool) -> Flags {
        let top = u32::from(carry) << 31 | u32::from(carry != overflow) << 30;
        Flags { carries: self.carries & !(CARRY | BELOW) | top, ..self }
    }

    /// The same flags but for CF.
    #[inline(always)]
    pub(super) fn with_carry(self, carry: bool) -> Flags {
        self.with_carry_and_overflow(carry, self.overflow())
    }

    /// The same flags but for AF.
    #[inline(always)]
    pub(super) fn with_auxiliary(self, auxiliary: bool) -> Flags {
        Flags { carries: self.carries & !AUXILIARY | u32::from(auxiliary) << 3, ..self }
    }

    /// CF.
    #[inline(always)]
    pub(super) fn carry(self) -> bool {
        self.carries & CARRY != 0
    }

    /// AF.
    #[inline(always)]
    pub(super) fn auxiliary(self) -> bool {
        self.carries & AUXILIARY != 0
    }

    #[inline(always)]
    fn zero(self) -> bool {
        self.zero == 0
    }

    #[inline(always)]
    fn sign(self) -> bool {
        self.sign & CARRY != 0
    }

    #[inline(always)]
    fn parity(self) -> bool {
        (self.sign as u8).count_ones().is_multiple_of(2)
    }

    #[inline(always)]
    fn overflow(self) -> bool {
        (self.carries ^ self.carries << 1) & CARRY != 0
    }

    /// True where they meet condition `code` (the low four bits of Jcc, SETcc and CMOVcc).
    #[inline(always)]
    pub(super) fn meet(self, code: u32) -> bool {
        let less = || (self.sign ^ self.carries ^ self.carries << 1) & CARRY != 0;
        let met = match code >> 1 & 7 {
            0 => self.overflow(),
            1 => self.carry(),
            2 => self.zero(),
            3 => self.carry() || self.zero(),
            4 => self.sign(),
            5 => self.parity(),
            6 => less(),
            _ => less() || self.zero(),
        };
        met != (code & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_flags_is_kept_and_nothing_else_touched() {
        for bits in 0..64 {
            let place = [CF, PF, AF, ZF, SF, OF];
            let chosen = place.iter().enumerate().filter(|(n, _)| bits >> n & 1 != 0);
            let eflags = chosen.fold(0, |all, (_, flag)| all | flag);
            assert_eq!(Flags::of(eflags).within(0), eflags);
            assert_eq!(Flags::of(eflags | !ARITHMETIC).within(!ARITHMETIC), eflags | !ARITHMETIC);
            for carry in [false, true] {
                let with = Flags::of(eflags).with_carry(carry).within(0);
                assert_eq!(with, eflags & !CF | if carry { CF } else { 0 });
                let with = Flags::of(eflags).with_auxiliary(carry).within(0);
                assert_eq!(with, eflags & !AF | if carry { AF } else { 0 });
            }
        }
    }

    #[test]
    fn conditions_are_those_of_the_manual() {
        for bits in 0..1 << 12 {
            let eflags = bits & ARITHMETIC;
            let any = |flags: u32| eflags & flags != 0;
            let less = any(SF) != any(OF);
            let met = [any(OF), any(CF), any(ZF), any(CF | ZF), any(SF), any(PF), less, less || any(ZF)];
            for (code, met) in (0..).zip(met) {
                assert_eq!(Flags::of(eflags).meet(2 * code), met, "{code} of {eflags:#x}");
                assert_eq!(Flags::of(eflags).meet(2 * code + 1), !met, "not {code} of {eflags:#x}");
            }
        }
    }
}
