//! `umbra import`: has all pages of a segment, again and again, and says what came of it.

use std::fmt;
use std::io::{self, Write};
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use umbra_mmu::PAGE_SIZE;

use super::{Access, Attachment, ImportError, Importer, Manners, PAGE, Rights, Stats};
use crate::export::protocol::{Code, FAULT_MAX};
use crate::units::{parse_duration, parse_size};

/// Options of `import`.
#[derive(Args, Clone, Debug)]
pub struct ImportArgs {
    /// The socket of the running guest.
    #[arg(long, value_name = "SOCKET")]
    pub export: PathBuf,
    /// Import this segment, which another importer has made.
    #[arg(long, value_name = "ID", required_unless_present = "make", conflicts_with = "make")]
    pub segment: Option<u32>,
    /// Make a segment of this part of guest-physical memory, such as 16M..20M, and import it. It goes when this command ends.
    #[arg(long, value_name = "FROM..TO", value_parser = parse_range)]
    pub make: Option<Range<u64>>,
    /// Have the pages to be written too; nothing is written. With --make, others may as well.
    #[arg(long)]
    pub read_write: bool,
    /// Go on for so long, one pass over all pages after the other. One pass if left out.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub hold: Option<Duration>,
    /// Compare each page with what the guest's VMM reads there.
    #[arg(long)]
    pub verify: bool,
    /// Take so long to answer when pages must be given up.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub ack_delay: Option<Duration>,
}

fn parse_range(text: &str) -> Result<Range<u64>, String> {
    let (from, to) = text
        .split_once("..")
        .ok_or("give the first address and the one behind the last, such as 16M..20M")?;
    let size = |text: &str| match text {
        "0" => Ok(0),
        text => parse_size(text).map_err(|error| error.to_string()),
    };
    let (from, to) = (size(from)?, size(to)?);
    if from >= to || from % PAGE_SIZE != 0 || to % PAGE_SIZE != 0 || to > 1 << 36 {
        return Err("give whole pages of 4096 bytes, the lower address first, below 64G".into());
    }
    Ok(from..to)
}

/// What an import has come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The segment.
    pub segment: u32,
    /// Its pages.
    pub pages: u32,
    /// Passes over all of them, the last of which may not have come to its end.
    pub passes: u64,
    /// Pages read.
    pub read: u64,
    /// Pages that could not be had, each time that they were tried.
    pub refused: u64,
    /// Pages compared, and found the same.
    pub agreed: u64,
    /// Pages that changed while they were compared.
    pub changed: u64,
    /// Pages that did not change, and were something else.
    pub wrong: Vec<u32>,
    /// What has come to us.
    pub stats: Stats,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stats { invalidations, pages, answer_max, answer_sum } = self.stats;
        let mean = answer_sum.checked_div(u32::try_from(invalidations).unwrap_or(u32::MAX));
        write!(
            f,
            "segment={} pages={} passes={} read={} refused={} agreed={} changed={} wrong={} invalidations={} given_up={} \
             answer_mean={:.1}us answer_max={:.1}us",
            self.segment,
            self.pages,
            self.passes,
            self.read,
            self.refused,
            self.agreed,
            self.changed,
            self.wrong.len(),
            invalidations,
            pages,
            mean.unwrap_or_default().as_secs_f64() * 1e6,
            answer_max.as_secs_f64() * 1e6,
        )
    }
}

/// Imports as asked. Says on `out` what the segment's number is as soon as it is known.
///
/// # Errors
///
/// When there is no such segment, or the connection ends before its time.
pub fn run(args: &ImportArgs, out: &mut dyn Write) -> Result<Report, ImportError> {
    let manners = Manners { ack_delay: args.ack_delay.unwrap_or_default() };
    let importer = Importer::connect(&args.export, manners)?;
    let segment = match (&args.make, args.segment) {
        (Some(range), _) => {
            let (first, pages) = (range.start / PAGE_SIZE, (range.end - range.start) / PAGE_SIZE);
            importer.make(first as u32, pages as u32, args.read_write)?
        }
        (None, number) => number.unwrap_or_default(),
    };
    let access = importer.get(segment, args.read_write)?;
    let (number, first, pages) = (importer.number(), access.first, access.pages);
    // A reader that has gone is no reason to fail.
    let _ = writeln!(out, "segment={segment} importer={number} first={first:#x} pages={pages}");
    let _ = out.flush();
    let attachment = importer.attach(&access, first, pages)?;
    let mut work = Work { args, importer: &importer, access: &access, attachment: &attachment };
    let mut report = Report { segment, pages, ..Report::default() };
    let until = args.hold.map(|hold| Instant::now() + hold);
    loop {
        report.passes += 1;
        let over = work.pass(&mut report, until)?;
        if over || until.is_none() {
            break;
        }
    }
    report.stats = importer.stats();
    Ok(report)
}

struct Work<'a> {
    args: &'a ImportArgs,
    importer: &'a Importer,
    access: &'a Access,
    attachment: &'a Attachment,
}

impl Work<'_> {
    /// Has every page once. True when the time is over.
    fn pass(&mut self, report: &mut Report, until: Option<Instant>) -> Result<bool, ImportError> {
        let end = self.access.first + self.access.pages;
        let rights = if self.args.read_write { Rights::Write } else { Rights::Read };
        for first in (self.access.first..end).step_by(FAULT_MAX as usize) {
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(true);
            }
            let pages = FAULT_MAX.min(end - first);
            // Only to have them together: a page that is not among them is asked for by itself.
            passed_over(self.attachment.fault(first, pages, rights))?;
            for page in first..first + pages {
                match passed_over(self.page(page, report))? {
                    Some(()) => report.read += 1,
                    None => report.refused += 1,
                }
            }
        }
        Ok(until.is_some_and(|until| Instant::now() >= until))
    }

    fn page(&self, page: u32, report: &mut Report) -> Result<(), ImportError> {
        let before = self.sum(page)?;
        if !self.args.verify {
            return Ok(());
        }
        let theirs = self.importer.sum(self.access, page)?;
        let after = self.sum(page)?;
        if before != after {
            report.changed += 1;
        } else if theirs == before {
            report.agreed += 1;
        } else {
            report.wrong.push(page);
        }
        Ok(())
    }

    fn sum(&self, page: u32) -> Result<u32, ImportError> {
        let mut bytes = [0; PAGE];
        self.attachment.read(page, 0, &mut bytes)?;
        Ok(crc32fast::hash(&bytes))
    }
}

/// A page that cannot be had now is no reason to stop.
fn passed_over<T>(result: Result<T, ImportError>) -> Result<Option<T>, ImportError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(ImportError::Refused { code: Code::Held | Code::Short, .. } | ImportError::Starved(_)) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// [`run`], with what it says on standard output.
///
/// # Errors
///
/// The same.
pub fn run_on_stdout(args: &ImportArgs) -> Result<Report, ImportError> {
    run(args, &mut io::stdout())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_of_whole_pages_the_lower_first() {
        assert_eq!(parse_range("16M..20M"), Ok(16 << 20..20 << 20));
        assert_eq!(parse_range("0..4K"), Ok(0..4096));
        for wrong in ["16M", "20M..16M", "16M..16M", "1..2", "0..128G", "..", "a..b"] {
            assert!(parse_range(wrong).is_err(), "{wrong}");
        }
    }
}
