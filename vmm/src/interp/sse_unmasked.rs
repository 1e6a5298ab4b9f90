//! Unmasked overflow and underflow of SSE: what they are, and whether the result was inexact.
//!
//! The host runs with both masked, where an overflow is always inexact, and a tiny result underflows only if it is
//! inexact as a denormal. Unmasked, every tiny result underflows, and inexact is what does not fit the *significand*,
//! as if the exponent had no limits. x87 answers that: with its precision control at the result's precision it rounds
//! the same, and its exponent is wide enough for every sum, product and quotient of doubles.
//!
//! See: Intel SDM vol. 1, 4.9.1.4 and 4.9.1.5 (overflow and underflow), 8.1.5.2 (precision control).

use iced_x86::Mnemonic;

use super::shuffle::lane;
use crate::cpu::Fpu;
use crate::host_fpu::{self, Float, Operands, Prefix, X87};

const OVERFLOW: u32 = 1 << 3;
const UNDERFLOW: u32 = 1 << 4;
const PRECISION: u32 = 1 << 5;
const DENORMALS_ARE_ZEROS: u32 = 1 << 6;

/// An instruction whose result may lie beyond the range of its type.
#[derive(Clone, Copy)]
struct Arithmetic {
    lanes: u32,
    /// Bits of an operand's lane and of a result's.
    from: u32,
    to: u32,
    /// The opcode of the same for one lane, and /digit of x87's twin.
    opcode: u8,
    digit: u8,
}

fn arithmetic_of(mnemonic: Mnemonic) -> Option<Arithmetic> {
    use Mnemonic as M;
    let (opcode, digit) = match mnemonic {
        M::Addps | M::Addss | M::Addpd | M::Addsd => (0x58, 0),
        M::Mulps | M::Mulss | M::Mulpd | M::Mulsd => (0x59, 1),
        M::Subps | M::Subss | M::Subpd | M::Subsd => (0x5c, 4),
        M::Divps | M::Divss | M::Divpd | M::Divsd => (0x5e, 6),
        // To single precision: rounded where zero is added.
        M::Cvtpd2ps | M::Cvtsd2ss => (0x5a, 0),
        _ => return None,
    };
    let (lanes, from, to) = match mnemonic {
        M::Cvtpd2ps => (2, 64, 32),
        M::Cvtsd2ss => (1, 64, 32),
        M::Addps | M::Mulps | M::Subps | M::Divps => (4, 32, 32),
        M::Addss | M::Mulss | M::Subss | M::Divss => (1, 32, 32),
        M::Addpd | M::Mulpd | M::Subpd | M::Divpd => (2, 64, 64),
        _ => (1, 64, 64),
    };
    Some(Arithmetic { lanes, from, to, opcode, digit })
}

/// The exceptions of an instruction that ran as `ran` on the operands `[a, b]`, under the guest's `mxcsr`.
pub(super) fn beyond_range(mnemonic: Mnemonic, [a, b]: [u128; 2], ran: &Operands, mxcsr: u32) -> u32 {
    let unmasked = !mxcsr >> 7 & (OVERFLOW | UNDERFLOW);
    let Some(op) = arithmetic_of(mnemonic).filter(|_| unmasked != 0) else { return ran.mxcsr };
    let tiny = unmasked & UNDERFLOW != 0 && (0..op.lanes).any(|n| op.is_tiny(lane(ran.a, n, op.to)));
    let raised = ran.mxcsr | if tiny { UNDERFLOW } else { 0 };
    if raised & unmasked == 0 {
        return raised;
    }
    let inexact = (0..op.lanes).any(|n| {
        let source = lane(b, n, op.from);
        let pair = if op.narrows() { [source, 0] } else { [lane(a, n, op.from), source] };
        op.is_inexact(pair, unmasked, mxcsr)
    });
    raised & !PRECISION | if inexact { PRECISION } else { 0 }
}

impl Arithmetic {
    fn narrows(self) -> bool {
        self.from != self.to
    }

    /// True for a denormal result.
    fn is_tiny(self, result: u128) -> bool {
        is_denormal(result, self.to)
    }

    /// True where this lane counts as inexact.
    fn is_inexact(self, pair: [u128; 2], unmasked: u32, mxcsr: u32) -> bool {
        let prefix = if self.from == 64 { Prefix::Pf2 } else { Prefix::Pf3 };
        let [a, b] = if self.narrows() { [0, pair[0]] } else { pair };
        let mut ran = Operands { a, b, mxcsr, ..Operands::default() };
        host_fpu::float(Float::new(prefix, self.opcode), &mut ran);
        let tiny = self.is_tiny(lane(ran.a, 0, self.to));
        let raised = ran.mxcsr | if tiny { UNDERFLOW } else { 0 };
        if raised & unmasked == 0 { ran.mxcsr & PRECISION != 0 } else { self.rounds(pair, mxcsr) }
    }

    /// True where x87 has to round at the result's precision.
    fn rounds(self, pair: [u128; 2], mxcsr: u32) -> bool {
        const MASKED: u16 = 0x3f;
        let precision = if self.to == 64 { 2 << 8 } else { 0 };
        let rounding = (mxcsr >> 13 & 3) as u16;
        let zeroed =
            |value| if mxcsr & DENORMALS_ARE_ZEROS != 0 && is_denormal(value, self.from) { 0 } else { value };
        let [mut a, mut b] = pair.map(|value| zeroed(value).to_le_bytes());
        let (load, compute) = if self.from == 64 { (0xdd, 0xdc) } else { (0xd9, 0xd8) };
        let mut fpu = Fpu::default();
        fpu.set_control(MASKED | precision | rounding << 10);
        host_fpu::x87(X87::memory(load, 0), &mut fpu, &mut a, 0);
        host_fpu::x87(X87::memory(compute, self.digit), &mut fpu, &mut b, 0);
        u32::from(fpu.status()) & PRECISION != 0
    }
}

/// True for a denormal of so many bits, 32 or 64.
fn is_denormal(value: u128, bits: u32) -> bool {
    let fraction = if bits == 64 { 52 } else { 23 };
    (1..1 << fraction).contains(&(value & !(1 << (bits - 1))))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// MXCSR with overflow and underflow unmasked.
    const UNMASKED: u32 = 0x1f80 & !((OVERFLOW | UNDERFLOW) << 7);

    fn exceptions(mnemonic: Mnemonic, prefix: Prefix, opcode: u8, a: u128, b: u128) -> u32 {
        let mut ran = Operands { a, b, mxcsr: UNMASKED, ..Operands::default() };
        host_fpu::float(Float::new(prefix, opcode), &mut ran);
        beyond_range(mnemonic, [a, b], &ran, UNMASKED)
    }

    #[test]
    fn exact_results_beyond_the_range_are_not_inexact() {
        let (huge, tiny, odd) = (0x7f00_0000, 0x0080_0000, 0x0080_0001);
        let mul = |a, b| exceptions(Mnemonic::Mulss, Prefix::Pf3, 0x59, a, b);
        assert_eq!(mul(huge, huge), OVERFLOW);
        assert_eq!(mul(huge, 0x7f00_0001), OVERFLOW);
        assert_eq!(mul(huge | 1, 0x7f00_0001), OVERFLOW | PRECISION);
        assert_eq!(mul(tiny, 0x3f00_0000), UNDERFLOW);
        assert_eq!(mul(odd, 0x3f00_0000), UNDERFLOW, "inexact as a denormal only");
        assert_eq!(mul(odd, 0x3f00_0001), UNDERFLOW | PRECISION);
        assert_eq!(mul(0x3f80_0001, 0x3f80_0001), PRECISION, "within the range");
    }

    #[test]
    fn lanes_are_judged_each_by_itself() {
        // 2^127 * 2^127, and (1 + 2^-23)^2.
        let (a, b) = (0x3f80_0001_u128 << 32 | 0x7f00_0000, 0x3f80_0001_u128 << 32 | 0x7f00_0000);
        assert_eq!(exceptions(Mnemonic::Mulps, Prefix::None, 0x59, a, b), OVERFLOW | PRECISION);
        let exact = 0x3f80_0000_u128 << 32 | 0x7f00_0000;
        assert_eq!(exceptions(Mnemonic::Mulps, Prefix::None, 0x59, exact, exact), OVERFLOW);
    }

    #[test]
    fn narrowing_rounds_to_single_precision() {
        let narrow =
            |value: f64| exceptions(Mnemonic::Cvtsd2ss, Prefix::Pf2, 0x5a, 0, value.to_bits().into());
        assert_eq!(narrow(2_f64.powi(-140)), UNDERFLOW);
        assert_eq!(narrow(2_f64.powi(-140) * (1.0 + 2_f64.powi(-30))), UNDERFLOW | PRECISION);
        assert_eq!(narrow(2_f64.powi(200)), OVERFLOW);
        assert_eq!(narrow(1.0 / 3.0), PRECISION);
    }
}
