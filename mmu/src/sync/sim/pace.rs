//! What a seed decides beforehand: how brisk its simulation is, and the numbers that are drawn on the way.

use std::fmt;

/// A small generator of numbers, `SplitMix64`.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// One that begins at `seed`.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.draw()) * u128::from(end)) >> 64) as u64
    }
}

/// At one point of so many, which nobody lives to see.
pub(super) const NEVER: u64 = 1 << 40;

/// How a seed drives a simulation: each seed has its own, so that a sweep meets brisk ones and lazy ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// At one scheduling point of so many the baton goes on.
    pub switch_one_in: u64,
    /// At one of so many its actor stalls; at none, where it is 2^40.
    pub stall_one_in: u64,
    /// A vCPU stays inside the guest from slice to slice, until it is kicked or leaves for something.
    pub stays_inside: bool,
    /// A slice has at most two to this power of instructions.
    pub slice_bits: u32,
    /// Nanoseconds of an instruction.
    pub instruction_nanos: u64,
    /// The longest that a transfer of a device takes, in nanoseconds.
    pub transfer_nanos_max: u64,
}

impl Pace {
    pub(super) fn of(random: &mut Random) -> Pace {
        let mut choose = |of: &[u64]| of[random.below(of.len() as u64) as usize];
        Pace {
            switch_one_in: choose(&[1, 2, 4, 16, 64]),
            stall_one_in: choose(&[200, 1000, 5000, 25_000, NEVER]),
            stays_inside: choose(&[0, 1]) == 1,
            slice_bits: choose(&[6, 8, 10, 12, 14]) as u32,
            instruction_nanos: choose(&[1, 2, 4, 8, 16]),
            transfer_nanos_max: choose(&[1, 10_000, 100_000, 1_000_000, 5_000_000]),
        }
    }
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "switches 1 in {}, ", self.switch_one_in)?;
        match self.stall_one_in {
            NEVER => f.write_str("no stalls")?,
            one_in => write!(f, "stalls 1 in {one_in}")?,
        }
        if self.stays_inside {
            f.write_str(", vCPUs stay inside")?;
        }
        write!(
            f,
            ", slices to {}, {} ns an instruction, transfers to {} ns",
            1u64 << self.slice_bits,
            self.instruction_nanos,
            self.transfer_nanos_max
        )
    }
}
