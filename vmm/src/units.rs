//! Sizes and durations as people write them.
//!
//! Story: the command line's value parsers, and what prints their values back. Sizes count in powers of two, as
//! memory does: `64M` and `64MiB` are 67108864 bytes. The decimal `MB` is refused rather than guessed at.
//!
//! Limits: [`SIZE_MAX`], [`DURATION_MAX`]; what a size or duration is for sets its own limits on top.

#![forbid(unsafe_code)]

use std::time::Duration;

/// The largest size, 1 TiB.
pub const SIZE_MAX: u64 = 1 << 40;
/// The longest duration, 30 days.
pub const DURATION_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Units by their letter, ascending, with log2 of their bytes.
const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// Why a text is no size or duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// There is no number, or something else than a number before the unit.
    #[error("'{0}' is not a size; write a whole number and a unit, such as 64M, 512K, 1G or 24MiB")]
    NotASize(String),
    /// A decimal unit.
    #[error(
        "'{0}' has a decimal unit; sizes count in powers of two, so write K, M, G or T (or KiB, MiB, ..)"
    )]
    DecimalUnit(String),
    /// An unknown unit.
    #[error("'{0}' has a unit that is not known; use K, M, G or T (or KiB, MiB, ..), or none for bytes")]
    UnknownUnit(String),
    /// Over [`SIZE_MAX`].
    #[error("'{0}' is more than {max}, the largest size there is", max = format_size(SIZE_MAX))]
    SizeTooLarge(String),
    /// Not a duration.
    #[error("'{text}' is not a duration ({reason}); write a number and a unit, such as 10s, 250ms or 2m")]
    NotADuration {
        /// What was written.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Over [`DURATION_MAX`].
    #[error("'{0}' is more than 30 days, the longest duration there is (m is minutes, M is months)")]
    DurationTooLong(String),
}

/// Reads a size: a whole number, then nothing or `B` for bytes, or K, M, G, T in either case, alone or as KiB and
/// so on.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let trimmed = text.trim();
    let digits = trimmed.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = trimmed.split_at(digits);
    let shift = unit_shift(unit.trim_start(), text)?;
    if number.is_empty() {
        return Err(UnitError::NotASize(text.into()));
    }
    // A number of digits alone fails to parse only by being too large.
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.filter(|&bytes| bytes <= SIZE_MAX).ok_or_else(|| UnitError::SizeTooLarge(text.into()))
}

/// log2 of a unit's bytes. `text` is the whole, for the error.
fn unit_shift(unit: &str, text: &str) -> Result<u32, UnitError> {
    let upper = unit.to_ascii_uppercase();
    let mut letters = upper.chars();
    let Some(first) = letters.next().filter(|_| upper != "B") else { return Ok(0) };
    let known = UNITS.iter().find(|(letter, _)| *letter == first);
    match (known, letters.as_str()) {
        (Some(&(_, shift)), "" | "IB") => Ok(shift),
        (Some(_), "B") => Err(UnitError::DecimalUnit(text.into())),
        _ if !first.is_ascii_alphabetic() => Err(UnitError::NotASize(text.into())),
        _ => Err(UnitError::UnknownUnit(text.into())),
    }
}

/// Writes a size exactly, in the largest unit that divides it: `24M`, `1536K`, `4097`.
/// [`parse_size`] reads it back.
pub fn format_size(bytes: u64) -> String {
    let fits = |shift: &u32| bytes != 0 && bytes.is_multiple_of(1 << shift);
    match UNITS.iter().rev().find(|(_, shift)| fits(shift)) {
        Some((letter, shift)) => format!("{}{letter}", bytes >> shift),
        None => bytes.to_string(),
    }
}

/// Writes a size for reading, to three digits or so: `23.4M`, `512K`, `900`.
pub fn approximate_size(bytes: u64) -> String {
    let Some((letter, shift)) = UNITS.iter().rev().find(|(_, shift)| bytes >> shift != 0) else {
        return bytes.to_string();
    };
    let units = bytes as f64 / (1u64 << shift) as f64;
    if units >= 100.0 || bytes.is_multiple_of(1 << shift) {
        format!("{units:.0}{letter}")
    } else {
        format!("{units:.1}{letter}")
    }
}

/// Reads a duration: numbers with units, such as `10s`, `250ms`, `2m` or `1m 30s`.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let duration = humantime::parse_duration(text.trim())
        .map_err(|error| UnitError::NotADuration { text: text.into(), reason: error.to_string() })?;
    if duration > DURATION_MAX {
        return Err(UnitError::DurationTooLong(text.into()));
    }
    Ok(duration)
}

/// Writes a duration exactly, as [`parse_duration`] reads it: `1m 30s`, `250ms`.
pub fn format_duration(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    #[test]
    fn sizes_count_in_powers_of_two() {
        let sizes = [
            ("4096", 4096),
            ("0", 0),
            ("12B", 12),
            ("64K", 64 << 10),
            ("64k", 64 << 10),
            ("24MiB", 24 << 20),
            (" 24 mib ", 24 << 20),
            ("1G", 1 << 30),
            ("1T", 1 << 40),
        ];
        for (text, bytes) in sizes {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_says_why() {
        type Make = fn(String) -> UnitError;
        let wrong: [(&str, Make); 12] = [
            ("", UnitError::NotASize),
            ("M", UnitError::NotASize),
            ("-1", UnitError::NotASize),
            ("1.5G", UnitError::NotASize),
            ("0x1000", UnitError::UnknownUnit),
            ("64MB", UnitError::DecimalUnit),
            ("64kb", UnitError::DecimalUnit),
            ("64X", UnitError::UnknownUnit),
            ("64Mi", UnitError::UnknownUnit),
            ("1025G", UnitError::SizeTooLarge),
            ("99999999999999999999", UnitError::SizeTooLarge),
            ("18446744073709551615T", UnitError::SizeTooLarge),
        ];
        for (text, error) in wrong {
            assert_eq!(parse_size(text), Err(error(text.into())));
        }
    }

    #[test]
    fn sizes_print_exactly_or_for_reading() {
        let sizes = [
            (0, "0", "0"),
            (900, "900", "900"),
            (1536 << 10, "1536K", "1.5M"),
            (4097, "4097", "4.0K"),
            (24 << 20, "24M", "24M"),
            ((123 << 20) + 1, "128974849", "123M"),
            (SIZE_MAX, "1T", "1T"),
        ];
        for (bytes, exact, approximate) in sizes {
            assert_eq!((format_size(bytes).as_str(), approximate_size(bytes).as_str()), (exact, approximate));
        }
    }

    #[test]
    fn durations_need_their_unit_and_an_end() {
        assert_eq!(parse_duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration(" 2m "), Ok(Duration::from_secs(120)));
        assert_eq!(parse_duration("1m 30s"), Ok(Duration::from_secs(90)));
        for text in ["", "10", "s", "10 parsecs", "-1s", "99999999999999999999s"] {
            assert!(matches!(parse_duration(text), Err(UnitError::NotADuration { .. })), "{text}");
        }
        assert_eq!(parse_duration("2M"), Err(UnitError::DurationTooLong("2M".into())));
    }

    proptest! {
        #[test]
        fn whatever_is_printed_reads_back(bytes in 0..=SIZE_MAX, shift in 0u32..40, nanos in 0..1u64 << 50) {
            let bytes = bytes >> shift << shift;
            prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
            let duration = Duration::from_nanos(nanos);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".*") {
            let _ = parse_size(&text);
            let _ = parse_duration(&text);
        }
    }
}
