//! Guest time, and how device clocks divide it.
//!
//! Story: the board has no clock. Whoever calls it says what time it is: real time since the start of the run on
//! the kvm backend, virtual time on the soft one.
//!
//! Holds: ticks of a device clock are computed from the nanoseconds since zero, never accumulated, so that a
//! periodic device does not drift.

/// Nanoseconds in a second.
pub const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// A point in guest time, in nanoseconds since the guest was created. Lasts 584 years.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Nanos(pub u64);

impl Nanos {
    /// The point `nanos` later; the end of time at most.
    pub fn plus(self, nanos: u64) -> Nanos {
        Nanos(self.0.saturating_add(nanos))
    }

    /// Nanoseconds from `earlier` to here, 0 if `earlier` is later.
    pub fn since(self, earlier: Nanos) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Whole ticks of a clock of `hertz` (1 to 10^9) that started at zero. Seconds and the rest apart, so that 64
    /// bits are enough.
    pub fn ticks(self, hertz: u64) -> u64 {
        let (seconds, rest) = (self.0 / NANOS_PER_SECOND, self.0 % NANOS_PER_SECOND);
        seconds * hertz + rest * hertz / NANOS_PER_SECOND
    }

    /// The first nanosecond at which a clock of `hertz` shows `ticks`; the inverse of [`Nanos::ticks`].
    pub fn of_tick(ticks: u64, hertz: u64) -> Nanos {
        let (seconds, rest) = (ticks / hertz, ticks % hertz);
        Nanos(seconds.saturating_mul(NANOS_PER_SECOND)).plus((rest * NANOS_PER_SECOND).div_ceil(hertz))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_tick_is_the_first_nanosecond_that_shows_the_tick() {
        for hertz in [32_768, 1_193_182, NANOS_PER_SECOND] {
            for tick in [1, 2, 3, 1000, 1_193_181, 1_193_182, 987_654_321_012] {
                let at = Nanos::of_tick(tick, hertz);
                assert_eq!(at.ticks(hertz), tick, "{hertz} Hz");
                assert_eq!(Nanos(at.0 - 1).ticks(hertz), tick - 1, "{hertz} Hz");
            }
        }
    }

    #[test]
    fn end_of_time_does_not_overflow() {
        for hertz in [1, 32_768, 1_193_182, NANOS_PER_SECOND] {
            let ticks = Nanos(u64::MAX).ticks(hertz);
            let exact = u128::from(u64::MAX) * u128::from(hertz) / u128::from(NANOS_PER_SECOND);
            assert_eq!(u128::from(ticks), exact, "{hertz} Hz");
            assert!(Nanos::of_tick(ticks, hertz) <= Nanos(u64::MAX));
            assert_eq!(Nanos::of_tick(u64::MAX, 1), Nanos(u64::MAX));
        }
    }
}
