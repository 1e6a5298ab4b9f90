//! Random values of every kind that arithmetic tells apart.

/// A small generator, seeded: failures repeat.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn wide(&mut self) -> u128 {
        u128::from(self.next()) << 64 | u128::from(self.next())
    }

    /// Values at which integer arithmetic turns, half of the time.
    pub fn integer(&mut self) -> u64 {
        const EDGES: [u64; 12] = [
            0,
            1,
            2,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0x7fff_ffff,
            0x8000_0000,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000,
        ];
        match self.below(4) {
            0 => EDGES[self.below(12) as usize],
            1 => EDGES[self.below(12) as usize].wrapping_sub(self.below(5)),
            2 => (self.next() as i64 >> self.below(64)) as u64,
            _ => self.next(),
        }
    }

    /// Exponent and fraction of a number with so many bits of each.
    fn parts(&mut self, exponent_bits: u32, fraction_bits: u32) -> (u64, u64) {
        let (top, fraction) = ((1 << exponent_bits) - 1, (1 << fraction_bits) - 1);
        let bias = top >> 1;
        let quiet = 1 << (fraction_bits - 1);
        let any = self.next() & fraction;
        let short = any & !(fraction >> self.below(u64::from(fraction_bits)));
        match self.below(16) {
            0 => (0, 0),
            1 => (0, any | 1),
            2 => (0, 1),
            3 => (1, [0, any][self.below(2) as usize]),
            4 => (top - 1, [fraction, any][self.below(2) as usize]),
            5 => (top, 0),
            6 => (top, any | quiet),
            7 => (top, any & !quiet | 1),
            8 => (bias, 0),
            9 => (self.below(top), any),
            // Where products and quotients overflow and underflow.
            10 => (bias / 2 + self.below(64), short),
            11 => (bias + bias / 2 - self.below(64), short),
            12 => (self.below(2 * u64::from(fraction_bits)), short),
            // Whole numbers, and what lies between them.
            13 => (bias + self.below(80), short),
            _ => (bias.saturating_sub(8) + self.below(16), short),
        }
    }

    pub fn single(&mut self) -> u32 {
        let (exponent, fraction) = self.parts(8, 23);
        (self.below(2) << 31 | exponent << 23 | fraction) as u32
    }

    pub fn double(&mut self) -> u64 {
        let (exponent, fraction) = self.parts(11, 52);
        self.below(2) << 63 | exponent << 52 | fraction
    }

    /// Encodings that no operation yields are among them.
    pub fn extended(&mut self) -> u128 {
        let (exponent, fraction) = self.parts(15, 63);
        let sign_and_exponent = u128::from(self.below(2) << 15 | exponent) << 64;
        let one = if exponent == 0 { self.once_in(4) } else { !self.once_in(20) };
        sign_and_exponent | u128::from(one) << 63 | u128::from(fraction)
    }

    /// A vector of one kind.
    pub fn vector(&mut self) -> u128 {
        match self.below(4) {
            0 => self.wide(),
            1 => u128::from(self.integer()) << 64 | u128::from(self.integer()),
            2 => (0..4).fold(0, |all, n| all | u128::from(self.single()) << (32 * n)),
            _ => u128::from(self.double()) << 64 | u128::from(self.double()),
        }
    }

    /// Ten bytes of packed decimal, now and then with digits that are none.
    pub fn decimal(&mut self) -> u128 {
        let digits = (0..18).fold(0, |all, n| all | u128::from(self.below(10)) << (4 * n));
        if self.once_in(8) { self.wide() >> 48 } else { digits | u128::from(self.below(2)) << 79 }
    }
}
