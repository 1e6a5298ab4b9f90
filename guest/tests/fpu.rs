//! The ends that workload `fpu` must come to, worked out in integers: `src/user/fpu_known.h` is what this test makes.
//!
//! Story: all numbers in the recurrences are positive and far from overflow, so a number here is a mantissa and an exponent, and
//! an operation is exact integer arithmetic with one rounding after it. Where rounding is to nearest, Rust's own `f64` and
//! `f32` must agree.

use std::fmt::Write as _;

const STEPS: u32 = 2048;

/// Which way an inexact result goes. Among positive numbers *down* and *toward zero* are the same.
#[derive(Clone, Copy, PartialEq)]
enum Rounding {
    Nearest,
    Down,
    Up,
}

/// How results are made to fit.
#[derive(Clone, Copy)]
struct Fit {
    bits: u32,
    rounding: Rounding,
}

/// `mantissa` times two to the `exponent`; the mantissa's top bit is set.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Number {
    mantissa: u64,
    exponent: i32,
}

impl Fit {
    /// `wide` times two to the `exponent`, and a little more if `rest`.
    fn round(self, wide: u128, exponent: i32, rest: bool) -> Number {
        let bits = 128 - wide.leading_zeros();
        let dropped = bits.saturating_sub(self.bits);
        assert!(dropped > 1 || !rest, "enough bits to round by");
        let (kept, low) = (wide >> dropped, wide & ((1 << dropped) - 1));
        let half = (1_u128 << dropped) >> 1;
        let up = match self.rounding {
            Rounding::Down => false,
            Rounding::Up => low != 0 || rest,
            Rounding::Nearest => low > half || (low == half && dropped > 0 && (rest || kept & 1 == 1)),
        };
        let kept = kept + u128::from(up);
        let left = kept.leading_zeros() as i32 - 64;
        let mantissa = if left < 0 { kept >> 1 } else { kept << left };
        Number { mantissa: mantissa as u64, exponent: exponent + dropped as i32 - left }
    }

    fn multiply(self, a: Number, b: Number) -> Number {
        self.round(u128::from(a.mantissa) * u128::from(b.mantissa), a.exponent + b.exponent, false)
    }

    fn add(self, a: Number, b: Number) -> Number {
        let (high, low) = if a.exponent >= b.exponent { (a, b) } else { (b, a) };
        self.round(aligned(high, low) + u128::from(low.mantissa), low.exponent, false)
    }

    /// `one - x`, for an x below one.
    fn one_minus(self, x: Number) -> Number {
        self.round(aligned(ONE, x) - u128::from(x.mantissa), x.exponent, false)
    }

    fn divide(self, a: Number, b: Number) -> Number {
        let (dividend, divisor) = (u128::from(a.mantissa) << 64, u128::from(b.mantissa));
        let rest = (dividend % divisor) << 2;
        let quotient = ((dividend / divisor) << 2) | (rest / divisor);
        self.round(quotient, a.exponent - b.exponent - 66, rest % divisor != 0)
    }

    /// By hand, two digits at a time: the root of the mantissa with 70 zeros behind it.
    fn root(self, a: Number) -> Number {
        let odd = a.exponent & 1;
        let mantissa = u128::from(a.mantissa) << odd;
        let (mut root, mut rest) = (0_u128, 0_u128);
        for pair in (-35..33).rev() {
            let digits = if pair < 0 { 0 } else { mantissa >> (2 * pair) & 3 };
            rest = rest << 2 | digits;
            let trial = root << 2 | 1;
            root <<= 1;
            if rest >= trial {
                rest -= trial;
                root |= 1;
            }
        }
        self.round(root, (a.exponent - odd - 70) / 2, rest != 0)
    }
}

fn aligned(high: Number, low: Number) -> u128 {
    let distance = high.exponent - low.exponent;
    assert!((0..64).contains(&distance), "numbers of about one size");
    u128::from(high.mantissa) << distance
}

/// A number that every precision holds exactly.
fn exact(value: f64) -> Number {
    let bits = value.to_bits();
    Number { mantissa: bits << 11 | 1 << 63, exponent: (bits >> 52) as i32 - 1023 - 63 }
}

const ONE: Number = Number { mantissa: 1 << 63, exponent: -63 };

impl Number {
    fn biased(self, bias: i32) -> u64 {
        (self.exponent + 63 + bias) as u64
    }

    fn double(self) -> u64 {
        self.biased(1023) << 52 | self.mantissa << 1 >> 12
    }

    fn single(self) -> u32 {
        (self.biased(127) << 23 | self.mantissa << 1 >> 41) as u32
    }
}

/// The recurrence of `fpu_loop.S`, from x, y and w on.
fn three(fit: Fit, start: [f64; 3]) -> [Number; 3] {
    let [mut x, mut y, mut w] = start.map(exact);
    for _ in 0..STEPS {
        x = fit.multiply(fit.multiply(x, fit.one_minus(x)), exact(3.875));
        y = fit.divide(ONE, fit.add(y, x));
        w = fit.root(fit.add(w, y));
    }
    [x, y, w]
}

const STARTS: [[f64; 3]; 2] = [[0.3125, 1.0, 1.0], [0.40625, 2.0, 3.0]];
const SINGLE_STARTS: [f64; 4] = [0.3125, 0.40625, 0.21875, 0.46875];

fn doubles(rounding: Rounding) -> [[Number; 3]; 2] {
    STARTS.map(|start| three(Fit { bits: 53, rounding }, start))
}

fn singles(rounding: Rounding) -> [Number; 4] {
    let fit = Fit { bits: 24, rounding };
    SINGLE_STARTS.map(|start| three(fit, [start, 1.0, 1.0])[0])
}

/// One way to round: the x87 control word, MXCSR, and all ends.
fn known(control: u32, mxcsr: u32, bits: u32, rounding: Rounding) -> String {
    let mut text = format!("    {{{control:#05x}, {mxcsr:#06x}, \\\n     {{");
    for end in three(Fit { bits, rounding }, STARTS[0]) {
        write!(text, "{{{:#018x}, {:#06x}, {{0}}}}, ", end.mantissa, end.biased(16383)).unwrap();
    }
    text = text.trim_end_matches(", ").to_owned() + "}, \\\n     {";
    let [a, b] = doubles(rounding);
    for (a, b) in a.into_iter().zip(b) {
        write!(text, "{{{:#018x}, {:#018x}}}, ", a.double(), b.double()).unwrap();
    }
    text = text.trim_end_matches(", ").to_owned() + "}, \\\n     {";
    let lanes = singles(rounding).map(|lane| format!("{:#010x}", lane.single()));
    text + &lanes.join(", ") + "}}"
}

fn header() -> String {
    let ways = [
        known(0x37f, 0x1f80, 64, Rounding::Nearest),
        known(0x67f, 0x3f80, 53, Rounding::Down),
        known(0xb7f, 0x5f80, 64, Rounding::Up),
        known(0xc7f, 0x7f80, 24, Rounding::Down),
    ];
    format!(
        "/* Where the recurrences of fpu_loop.S end. Worked out in integers by guest/tests/fpu.rs, which compares. */\n\
         #define FPU_STEPS {STEPS}\n\n\
         /* For each way: control word, MXCSR; x87 x, y, w; lanes of xmm.x, y, w; lanes of xmm.s. */\n\
         #define FPU_KNOWN \\\n{}\n",
        ways.join(", \\\n")
    )
}

#[test]
fn known_ends_are_what_integer_arithmetic_gives() {
    let ours = header();
    assert!(include_str!("../src/user/fpu_known.h") == ours, "fpu_known.h should be:\n{ours}");
}

#[test]
fn integer_arithmetic_agrees_with_rusts_floats() {
    for (start, ends) in STARTS.into_iter().zip(doubles(Rounding::Nearest)) {
        let [mut x, mut y, mut w] = start;
        for _ in 0..STEPS {
            x = x * (1.0 - x) * 3.875;
            y = 1.0 / (y + x);
            w = (w + y).sqrt();
        }
        assert_eq!(ends.map(Number::double), [x, y, w].map(f64::to_bits));
    }
    for (start, end) in SINGLE_STARTS.into_iter().zip(singles(Rounding::Nearest)) {
        let mut x = start as f32;
        for _ in 0..STEPS {
            x = x * (1.0 - x) * 3.875;
        }
        assert_eq!(end.single(), x.to_bits());
    }
}

#[test]
fn ways_to_round_come_to_different_ends() {
    let ends = [Rounding::Nearest, Rounding::Down, Rounding::Up].map(|way| doubles(way)[0][0]);
    assert!(ends[0] != ends[1] && ends[1] != ends[2] && ends[0] != ends[2]);
}
