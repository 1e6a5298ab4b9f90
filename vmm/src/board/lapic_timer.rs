//! The local APIC's timer.
//!
//! Story: the bus clock ticks once a nanosecond (1 GHz, QEMU's rate) and the divide register slows it by 1 to 128.
//! The current count is computed from the time at hand; nothing ticks.
//!
//! Holds: a periodic timer's expiries lie at whole periods from where it was started, however late it is asked;
//! expiries that were missed count as one.
//!
//! Not here: masking and the vector, which are the LVT's.
//!
//! See: Intel SDM vol. 3A, 11.5.4.

use super::time::Nanos;

/// A count-down timer.
#[derive(Clone, Debug)]
pub(super) struct ApicTimer {
    /// The divide configuration register as written: bits 0, 1 and 3.
    divide: u32,
    /// The initial-count register.
    initial: u32,
    /// The count at `base`; 0 when the timer stands still.
    left: u32,
    base: Nanos,
}

impl ApicTimer {
    /// A timer that stands still, dividing by 2.
    pub(super) fn new() -> ApicTimer {
        ApicTimer { divide: 0, initial: 0, left: 0, base: Nanos(0) }
    }

    /// log2 of the divisor. The register's three bits count 2, 4, .. 128 and then 1.
    fn shift(&self) -> u32 {
        let bits = (self.divide & 3) | ((self.divide >> 1) & 4);
        (bits + 1) & 7
    }

    pub(super) fn divide(&self) -> u32 {
        self.divide
    }

    pub(super) fn initial(&self) -> u32 {
        self.initial
    }

    /// Starts counting down from `count`; 0 stops.
    pub(super) fn start(&mut self, now: Nanos, count: u32) {
        self.initial = count;
        self.left = count;
        self.base = now;
    }

    /// Changes the divisor; the count goes on from where it stands.
    pub(super) fn set_divide(&mut self, now: Nanos, value: u32) {
        self.left = self.current(now);
        self.base = now;
        self.divide = value & 0b1011;
    }

    /// The current-count register. Call [`ApicTimer::advance`] up to `now` first.
    pub(super) fn current(&self, now: Nanos) -> u32 {
        let gone = now.since(self.base) >> self.shift();
        self.left.saturating_sub(u32::try_from(gone).unwrap_or(u32::MAX))
    }

    /// When the count next reaches zero.
    pub(super) fn expiry(&self) -> Option<Nanos> {
        (self.left != 0).then(|| self.base.plus(u64::from(self.left) << self.shift()))
    }

    /// Moves to `now`; true if the count reached zero on the way, once or many times.
    pub(super) fn advance(&mut self, now: Nanos, periodic: bool) -> bool {
        let Some(expiry) = self.expiry().filter(|&expiry| expiry <= now) else {
            return false;
        };
        self.left = 0;
        if periodic && self.initial != 0 {
            let period = u64::from(self.initial) << self.shift();
            let whole = now.since(expiry) / period * period;
            self.base = expiry.plus(whole);
            self.left = self.initial;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divide_register_encodes_the_eight_divisors() {
        let encoded = [0b0000, 0b0001, 0b0010, 0b0011, 0b1000, 0b1001, 0b1010, 0b1011];
        for (bits, divisor) in encoded.into_iter().zip([2u64, 4, 8, 16, 32, 64, 128, 1]) {
            let mut timer = ApicTimer::new();
            timer.set_divide(Nanos(0), bits);
            timer.start(Nanos(50), 10);
            assert_eq!(timer.expiry(), Some(Nanos(50 + 10 * divisor)), "{bits:#b}");
        }
    }

    #[test]
    fn one_shot_counts_down_and_stops() {
        let mut timer = ApicTimer::new();
        timer.start(Nanos(100), 10);
        assert_eq!(timer.current(Nanos(100)), 10);
        assert_eq!(timer.current(Nanos(105)), 8);
        assert!(!timer.advance(Nanos(119), false));
        assert_eq!(timer.current(Nanos(119)), 1);
        assert!(timer.advance(Nanos(120), false));
        assert_eq!(timer.current(Nanos(120)), 0);
        assert_eq!(timer.expiry(), None);
        assert!(!timer.advance(Nanos(1_000_000), false));
    }

    #[test]
    fn periodic_does_not_drift_and_coalesces_what_it_missed() {
        let mut timer = ApicTimer::new();
        timer.set_divide(Nanos(0), 0b1011);
        timer.start(Nanos(7), 1000);
        let mut fired = 0;
        let mut now = 0;
        // Ask at odd moments, always late by a different amount, sometimes by several periods.
        for step in (0..10_000u64).map(|i| 1 + i * 7919 % 2503) {
            now += step;
            fired += u64::from(timer.advance(Nanos(now), true));
            let expiry = timer.expiry().unwrap();
            assert!(expiry > Nanos(now));
            assert_eq!((expiry.0 - 7) % 1000, 0);
            assert!(expiry.0 - now.max(7) <= 1000);
        }
        assert!(fired > 5000 && fired < now / 1000, "{fired}");
    }

    #[test]
    fn a_period_of_one_tick_a_century_late_costs_one_step() {
        let mut timer = ApicTimer::new();
        timer.set_divide(Nanos(0), 0b1011);
        timer.start(Nanos(0), 1);
        assert!(timer.advance(Nanos(3_000_000_000_000_000_000), true));
        assert_eq!(timer.expiry(), Some(Nanos(3_000_000_000_000_000_001)));
    }

    #[test]
    fn changing_the_divisor_keeps_the_count() {
        let mut timer = ApicTimer::new();
        timer.start(Nanos(0), 100);
        timer.set_divide(Nanos(100), 0b1011);
        assert_eq!(timer.current(Nanos(100)), 50);
        assert_eq!(timer.expiry(), Some(Nanos(150)));
    }
}
