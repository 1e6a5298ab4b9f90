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

/// So many starts a second, over as many stretches of time as there are: what is left of a period at the end of one is the next
/// one's.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    rate: u64,
    /// How far the next start is away, in nanoseconds times `rate`: less than a period, [`SECOND`].
    due: u64,
}

impl Pace {
    /// `rate` starts a second, the first at once.
    pub fn new(rate: u32) -> Pace {
        Pace { rate: u64::from(rate.max(1)), due: 0 }
    }

    /// The starts of the next stretch, which begins at `first` and lasts so long.
    pub fn stretch(&mut self, first: u64, lasts: u64) -> Schedule {
        let (rate, due) = (self.rate, self.due);
        let (whole, period) = (u128::from(lasts) * u128::from(rate), u128::from(SECOND));
        let planned = whole.saturating_sub(due.into()).div_ceil(period);
        self.due = (u128::from(due) + planned * period - whole) as u64;
        let planned = u64::try_from(planned).unwrap_or(u64::MAX);
        Schedule { first, lasts, rate, due, planned, begun: 0, ended: first, late: 0 }
    }
}

/// Intended starts, evenly in time. Times are in nanoseconds.
#[derive(Clone, Debug)]
pub struct Schedule {
    first: u64,
    lasts: u64,
    rate: u64,
    /// As [`Pace`] has it, when this begins.
    due: u64,
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
    /// The next start, if there is one. Whether it is late is known by now.
    pub fn next(&mut self) -> Option<Start> {
        if self.begun >= self.planned {
            return None;
        }
        let after =
            (u128::from(self.begun) * u128::from(SECOND) + u128::from(self.due)) / u128::from(self.rate);
        let intended = self.first.saturating_add(u64::try_from(after).unwrap_or(u64::MAX));
        self.begun += 1;
        self.late += u64::from(self.ended > intended);
        Some(Start { intended })
    }

    /// The last start has come to its end, at that time.
    pub fn end(&mut self, at: u64) {
        self.ended = at;
    }

    /// When its time is over.
    pub fn over(&self) -> u64 {
        self.first.saturating_add(self.lasts)
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

    fn schedule(first: u64, rate: u32, lasts: u64) -> Schedule {
        Pace::new(rate).stretch(first, lasts)
    }

    #[test]
    fn starts_are_evenly_in_time_whatever_the_rate() {
        let mut schedule = schedule(7, 3, 2 * SECOND);
        let starts: Vec<u64> =
            std::iter::from_fn(|| schedule.next()).map(|start| start.intended - 7).collect();
        assert_eq!(starts, [0, 333_333_333, 666_666_666, SECOND, 1_333_333_333, 1_666_666_666]);
        assert_eq!((schedule.over(), schedule.counts().planned), (7 + 2 * SECOND, 6));
        assert_eq!(Pace::new(100_000).stretch(0, 30 * 24 * 3600 * SECOND).planned, 259_200_000_000);
    }

    /// Stretches of any length, many of them shorter than a period, have the starts of one of their whole length, at the same times.
    #[test]
    fn stretches_have_the_starts_of_one_as_long_as_all_of_them() {
        for (rate, lasts) in [(1, 250), (3, 250), (300, 3), (300, 700), (7, 1), (999, 13), (100_000, 1)] {
            let (mut pace, mut starts, mut planned) = (Pace::new(rate), Vec::new(), 0);
            // And a nanosecond that no period is a multiple of.
            let lasts = lasts * MILLI + 1;
            for n in 0..40 {
                let mut stretch = pace.stretch(n * lasts, lasts);
                starts.extend(std::iter::from_fn(|| stretch.next()).map(|start| start.intended));
                planned += stretch.counts().planned;
            }
            let mut one = schedule(0, rate, 40 * lasts);
            let whole: Vec<u64> = std::iter::from_fn(|| one.next()).map(|start| start.intended).collect();
            assert!(!whole.is_empty() && planned == one.counts().planned, "{rate}/s: {planned} of {one:?}");
            assert_eq!(starts, whole, "{rate}/s");
        }
    }

    #[test]
    fn a_slow_one_makes_those_late_that_should_have_begun_meanwhile_and_moves_none() {
        let mut schedule = schedule(0, 1000, 10 * MILLI);
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
        let mut schedule = schedule(0, 1000, 10 * MILLI);
        assert!(schedule.next().is_some() && schedule.next().is_some());
        assert_eq!(schedule.counts(), Counts { planned: 10, begun: 2, late: 0 });
    }
}
