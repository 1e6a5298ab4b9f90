//! What is wanted of the guest over time: one step, a ramp, or a wave.
//!
//! Holds: everything here is a function of the time that has passed; sizes are whole pages wherever those of the shape are.

use std::time::Duration;

use umbra_mmu::PAGE_SIZE;

use crate::units::{UnitError, parse_size};

/// From one look at the guest to the next, and from one step of a ramp to the next.
pub const STEP: Duration = Duration::from_millis(100);

/// Two sizes in bytes, as written: `FROM..TO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub from: u64,
    /// The second.
    pub to: u64,
}

/// Why a text is no size or span of sizes that a guest could have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpanError {
    /// No size.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// Only one.
    #[error("'{0}' is one size; write two, such as 24M..12M")]
    One(String),
    /// Not whole pages.
    #[error("'{0}' is not a whole number of 4 KiB pages")]
    NotPages(String),
    /// Nothing at all.
    #[error("no guest can run on nothing; write a size that is not 0")]
    Zero,
    /// Twice the same.
    #[error("'{0}' goes nowhere; write two different sizes")]
    Same(String),
}

/// Reads a size that is whole pages, and not 0.
///
/// # Errors
///
/// When it is no such text.
pub fn parse_pages(text: &str) -> Result<u64, SpanError> {
    match parse_size(text)? {
        0 => Err(SpanError::Zero),
        bytes if bytes % PAGE_SIZE != 0 => Err(SpanError::NotPages(text.into())),
        bytes => Ok(bytes),
    }
}

/// Reads `FROM..TO`.
///
/// # Errors
///
/// When it is no such text.
pub fn parse_span(text: &str) -> Result<Span, SpanError> {
    let (from, to) = text.split_once("..").ok_or_else(|| SpanError::One(text.into()))?;
    let span = Span { from: parse_pages(from)?, to: parse_pages(to)? };
    if span.from == span.to { Err(SpanError::Same(text.into())) } else { Ok(span) }
}

/// How a size changes over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// It is this from the beginning on.
    Step(u64),
    /// It goes from one to the other, by a step each [`STEP`].
    Ramp {
        /// Which sizes.
        span: Span,
        /// How long that takes.
        over: Duration,
    },
    /// It is the one for half a period, then the other, and in the end what it was before.
    Wave {
        /// Which sizes, the lower one first.
        span: Span,
        /// Both halves together.
        period: Duration,
        /// How long it goes on.
        lasts: Duration,
    },
}

impl Shape {
    /// Until it is what it will be in the end.
    pub fn length(&self) -> Duration {
        match *self {
            Shape::Step(_) => Duration::ZERO,
            Shape::Ramp { over, .. } => over,
            Shape::Wave { lasts, .. } => lasts,
        }
    }

    /// What it is then. `None`: what it was before.
    pub fn end(&self) -> Option<u64> {
        match *self {
            Shape::Step(size) => Some(size),
            Shape::Ramp { span, .. } => Some(span.to),
            Shape::Wave { .. } => None,
        }
    }

    /// The smallest and the largest size that it comes to.
    pub fn bounds(&self) -> (u64, u64) {
        match *self {
            Shape::Step(size) => (size, size),
            Shape::Ramp { span, .. } | Shape::Wave { span, .. } => {
                (span.from.min(span.to), span.from.max(span.to))
            }
        }
    }

    /// What it is when so much time has passed. `None`: what it was before.
    pub fn at(&self, passed: Duration) -> Option<u64> {
        if passed >= self.length() {
            return self.end();
        }
        match *self {
            Shape::Step(size) => Some(size),
            Shape::Ramp { span, over } => Some(along(span, passed, over)),
            Shape::Wave { span, period, .. } => {
                let into = passed.as_nanos() % period.as_nanos().max(1);
                Some(if into * 2 < period.as_nanos() { span.from } else { span.to })
            }
        }
    }
}

/// Where a ramp is at its latest step.
fn along(span: Span, passed: Duration, over: Duration) -> u64 {
    let steps = over.as_nanos().div_ceil(STEP.as_nanos()).max(1);
    let step = (passed.as_nanos() / STEP.as_nanos()).min(steps);
    let (from, to) = (u128::from(span.from / PAGE_SIZE), u128::from(span.to / PAGE_SIZE));
    let way = from.abs_diff(to) * step / steps;
    let pages = if to > from { from + way } else { from - way };
    pages as u64 * PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn span(from: u64, to: u64) -> Span {
        Span { from: from * MIB, to: to * MIB }
    }

    #[test]
    fn spans_are_two_sizes_of_whole_pages() {
        assert_eq!(parse_span("24M..12M"), Ok(span(24, 12)));
        assert_eq!(parse_pages("8K"), Ok(8192));
        for (text, words) in [
            ("24M", "is one size"),
            ("24M..", "not a size"),
            ("..24M", "not a size"),
            ("0..24M", "not 0"),
            ("24M..24576K", "goes nowhere"),
            ("5000..24M", "whole number"),
            ("1M..2M..3M", "unit that is not known"),
            ("1M...2M", "not a size"),
            ("1MB..2M", "decimal"),
        ] {
            let error = parse_span(text).map_err(|error| error.to_string());
            assert!(error.as_ref().is_err_and(|error| error.contains(words)), "{text}: {error:?}");
        }
    }

    #[test]
    fn a_step_is_there_at_once_and_stays() {
        let step = Shape::Step(MIB);
        assert_eq!((step.length(), step.at(Duration::ZERO)), (Duration::ZERO, Some(MIB)));
        assert_eq!((step.at(Duration::MAX), step.end(), step.bounds()), (Some(MIB), Some(MIB), (MIB, MIB)));
    }

    #[test]
    fn a_ramp_has_a_step_each_tenth_of_a_second_and_ends_where_it_should() {
        let ramp = Shape::Ramp { span: span(20, 10), over: millis(1000) };
        let at = |ms| ramp.at(millis(ms)).map(|bytes| bytes / MIB);
        assert_eq!((at(0), at(99), at(100), at(199)), (Some(20), Some(20), Some(19), Some(19)));
        assert_eq!((at(900), at(999), at(1000), at(9999)), (Some(11), Some(11), Some(10), Some(10)));
        let up = Shape::Ramp { span: span(10, 20), over: millis(1000) };
        assert_eq!((up.at(millis(500)), up.bounds()), (Some(15 * MIB), (10 * MIB, 20 * MIB)));
    }

    #[test]
    fn a_wave_is_low_then_high_and_then_what_was_before() {
        let wave = Shape::Wave { span: span(8, 16), period: millis(400), lasts: millis(1000) };
        let at = |ms| wave.at(millis(ms)).map(|bytes| bytes / MIB);
        assert_eq!((at(0), at(199), at(200), at(399)), (Some(8), Some(8), Some(16), Some(16)));
        assert_eq!((at(400), at(999), at(1000), wave.end()), (Some(8), Some(8), None, None));
    }

    proptest! {
        #[test]
        fn sizes_are_whole_pages_within_the_bounds(
            from in 1u64..1 << 28, to in 1u64..1 << 28, over in 0u64..1 << 40, passed in any::<u64>(), ramp in any::<bool>(),
        ) {
            let span = Span { from: from * PAGE_SIZE, to: to * PAGE_SIZE };
            let (over, passed) = (millis(over), millis(passed));
            let shape = match ramp {
                true => Shape::Ramp { span, over },
                false => Shape::Wave { span, period: over / 3, lasts: over },
            };
            if let Some(bytes) = shape.at(passed) {
                let (low, high) = shape.bounds();
                prop_assert!((low..=high).contains(&bytes) && bytes % PAGE_SIZE == 0);
            }
        }
    }
}
