//! When invalidations begin: an open schedule.
//!
//! Story: the times are settled beforehand, so many a second, and do not wait for what was begun before to end. Where each start
//! waited for the end of the last, a slow one would keep those away that would have been slow with it, and nobody would count
//! them (*coordinated omission*). Here they come late, and their response time is counted from when they should have come.
//!
//! Limits: one thread begins them all, so that they stand in a queue; what has not begun at the end of its time never does, and
//! is counted.

/// Nanoseconds of a second.
const SECOND: u64 = 1_000_000_000;

/// Intended starts, evenly in time. Times are in nanoseconds.
#[derive(Clone, Debug)]
pub struct Schedule {
    first: u64,
    rate: u64,
    planned: u64,
    begun: u64,
    /// When the last one ended.
    ended: u64,
    late: u64,
}

/// A start whose time has been given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// When it is to begin.
    pub intended: u64,
}

impl Schedule {
    /// `rate` starts a second from `first` on, for `lasts`.
    pub fn new(first: u64, rate: u32, lasts: u64) -> Schedule {
        let rate = u64::from(rate.max(1));
        let planned = u128::from(lasts) * u128::from(rate) / u128::from(SECOND);
        Schedule {
            first,
            rate,
            planned: u64::try_from(planned).unwrap_or(u64::MAX),
            begun: 0,
            ended: first,
            late: 0,
        }
    }

    /// The next start, if there is one. Whether it is late is known by now.
    pub fn next(&mut self) -> Option<Start> {
        if self.begun >= self.planned {
            return None;
        }
        let after = u128::from(self.begun) * u128::from(SECOND) / u128::from(self.rate);
        let intended = self.first.saturating_add(u64::try_from(after).unwrap_or(u64::MAX));
        self.begun += 1;
        self.late += u64::from(self.ended > intended);
        Some(Start { intended })
    }

    /// The last start has come to its end, at that time.
    pub fn end(&mut self, at: u64) {
        self.ended = at;
    }

    /// When all that was planned should be done.
    pub fn over(&self) -> u64 {
        let lasts = u128::from(self.planned) * u128::from(SECOND) / u128::from(self.rate);
        self.first.saturating_add(u64::try_from(lasts).unwrap_or(u64::MAX))
    }

    /// What came of it so far.
    pub fn counts(&self) -> Counts {
        Counts { planned: self.planned, begun: self.begun, late: self.late }
    }
}

/// Starts of a schedule, or of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// As many as there were to be.
    pub planned: u64,
    /// Those that have begun.
    pub begun: u64,
    /// Those of them whose time had come before the one before had ended.
    pub late: u64,
}

impl Counts {
    /// The sum of two.
    pub fn plus(self, other: Counts) -> Counts {
        Counts {
            planned: self.planned + other.planned,
            begun: self.begun + other.begun,
            late: self.late + other.late,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: u64 = 1_000_000;

    #[test]
    fn starts_are_evenly_in_time_whatever_the_rate() {
        let mut schedule = Schedule::new(7, 3, 2 * SECOND);
        let starts: Vec<u64> =
            std::iter::from_fn(|| schedule.next()).map(|start| start.intended - 7).collect();
        assert_eq!(starts, [0, 333_333_333, 666_666_666, SECOND, 1_333_333_333, 1_666_666_666]);
        assert_eq!((schedule.over(), schedule.counts().planned), (7 + 2 * SECOND, 6));
        assert_eq!(Schedule::new(0, 100_000, 30 * 24 * 3600 * SECOND).counts().planned, 259_200_000_000);
    }

    #[test]
    fn a_slow_one_makes_those_late_that_should_have_begun_meanwhile_and_moves_none() {
        let mut schedule = Schedule::new(0, 1000, 10 * MILLI);
        let mut intended = Vec::new();
        let (mut now, mut n) = (0, 0);
        while let Some(start) = schedule.next() {
            intended.push(start.intended);
            now = start.intended.max(now);
            // The third takes 3.5 ms, each other 0.1.
            now += if n == 2 { 3 * MILLI + MILLI / 2 } else { MILLI / 10 };
            schedule.end(now);
            n += 1;
        }
        assert_eq!(intended, (0..10).map(|n| n * MILLI).collect::<Vec<_>>(), "an open schedule");
        assert_eq!(schedule.counts(), Counts { planned: 10, begun: 10, late: 3 }, "those of 3, 4 and 5 ms");
    }

    #[test]
    fn who_breaks_off_has_fewer_begun_than_planned() {
        let mut schedule = Schedule::new(0, 1000, 10 * MILLI);
        assert!(schedule.next().is_some() && schedule.next().is_some());
        assert_eq!(schedule.counts(), Counts { planned: 10, begun: 2, late: 0 });
    }
}
