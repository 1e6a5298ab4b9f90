//! The files that a measurement leaves. They are opened before the run, so that a wrong path costs no run.
//!
//! | file | what is in it |
//! |---|---|
//! | `--json` | the report |
//! | `--html` | the same, as a page with plots (`super::page`) |
//! | `--hgrm DIR`, `GROUP.MEASURE.hgrm` | the percentile distribution of a measure in microseconds, as HdrHistogram prints one |
//! | `--hgrm DIR`, `intervals.hlog` | a histogram in nanoseconds for each measure and interval, as HdrHistogram logs them, `Tag=GROUP.MEASURE` |

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

use super::collect::Collected;
use super::{Measured, Order, page};
use crate::output::OutputFile;

/// The name of the interval log.
pub const LOG_NAME: &str = "intervals.hlog";

/// A file could not be written, or read.
#[derive(Debug, thiserror::Error)]
#[error("{option} {}: {source}; {remedy}", path.display())]
pub struct FileError {
    option: &'static str,
    path: PathBuf,
    remedy: &'static str,
    source: io::Error,
}

impl FileError {
    /// What was tried, on what, why not, and what to do.
    pub fn new(option: &'static str, path: &Path, remedy: &'static str, source: io::Error) -> FileError {
        FileError { option, path: path.into(), remedy, source }
    }
}

const WRITE: &str = "name a file in a folder that exists and that you may write to";
const FOLDER: &str = "name a folder that exists, or that can be made, and that you may write to";

/// One of them.
#[derive(Debug)]
struct Sink {
    option: &'static str,
    path: PathBuf,
    /// `None` for standard error.
    file: Option<OutputFile>,
}

impl Sink {
    fn open(option: &'static str, path: &Path) -> Result<Sink, FileError> {
        let is_stderr = path == Path::new("-");
        let file = match is_stderr {
            true => None,
            false => {
                Some(OutputFile::open(path).map_err(|error| FileError::new(option, path, WRITE, error))?)
            }
        };
        Ok(Sink { option, path: path.into(), file })
    }

    fn write(&self, bytes: &[u8]) -> Result<(), FileError> {
        let written = match &self.file {
            Some(file) => file.replace(bytes),
            None => io::stderr().write_all(bytes),
        };
        written.map_err(|source| FileError::new(self.option, &self.path, WRITE, source))
    }
}

/// A folder of distributions.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    log: OutputFile,
}

impl Folder {
    fn open(path: &Path) -> Result<Folder, FileError> {
        let log = std::fs::create_dir_all(path).and_then(|()| OutputFile::open(&path.join(LOG_NAME)));
        let log = log.map_err(|source| FileError::new("--hgrm", path, FOLDER, source))?;
        Ok(Folder { path: path.into(), log })
    }

    fn write(&self, all: &Collected, log: &[u8]) -> Result<(), FileError> {
        let written = distributions(all).try_for_each(|(name, histogram)| {
            std::fs::write(self.path.join(format!("{name}.hgrm")), distribution(histogram))
        });
        written
            .and_then(|()| self.log.replace(log))
            .map_err(|source| FileError::new("--hgrm", &self.path, FOLDER, source))
    }
}

/// All of them.
#[derive(Debug)]
pub struct Files {
    json: Option<Sink>,
    html: Option<Sink>,
    hgrm: Option<Folder>,
}

impl Files {
    /// Opens what `order` names.
    ///
    /// # Errors
    ///
    /// When one cannot be made.
    pub fn open(order: &Order) -> Result<Files, FileError> {
        let sink =
            |option, path: &Option<PathBuf>| path.as_deref().map(|path| Sink::open(option, path)).transpose();
        Ok(Files {
            json: sink("--json", &order.json)?,
            html: sink("--html", &order.html)?,
            hgrm: order.hgrm.as_deref().map(Folder::open).transpose()?,
        })
    }

    /// Writes them.
    ///
    /// # Errors
    ///
    /// When one does not take it.
    pub fn write(&self, measured: &Measured) -> Result<(), FileError> {
        let report = &measured.report;
        if let Some(json) = &self.json {
            let failed =
                |source: serde_json::Error| FileError::new(json.option, &json.path, WRITE, source.into());
            let mut text = serde_json::to_string_pretty(report).map_err(failed)?;
            text.push('\n');
            json.write(text.as_bytes())?;
        }
        if let Some(html) = &self.html {
            html.write(page::html(report).as_bytes())?;
        }
        self.hgrm.as_ref().map_or(Ok(()), |folder| folder.write(&measured.all, &measured.log))
    }
}

/// Every measure that has something in it, with the name of its file.
fn distributions(all: &Collected) -> impl Iterator<Item = (String, &Histogram<u64>)> {
    let of_groups = all.groups.iter().flat_map(|group| {
        group.measures.iter().map(|measure| (format!("{}.{}", group.by.name(), measure.name), &measure.all))
    });
    let of_importers = all
        .slowest
        .iter()
        .map(|one| (format!("importer-{}.{}", one.importer, one.waits.name), &one.waits.all));
    of_groups.chain(of_importers).filter(|(_, histogram)| !histogram.is_empty())
}

/// A percentile distribution in microseconds, as HdrHistogram's `outputPercentileDistribution` prints it.
fn distribution(histogram: &Histogram<u64>) -> String {
    /// Lines until the rest is halved.
    const TICKS: u32 = 5;
    /// Nanoseconds of a unit, and the digits behind its point.
    const UNIT: f64 = 1e3;
    /// That a histogram of three digits has in a bucket.
    const SUB_BUCKETS: u32 = 2048;
    let mut text = String::new();
    // A string takes everything.
    let _ = writeln!(
        text,
        "{:>12} {:>14} {:>10} {:>14}\n",
        "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
    );
    let mut count = 0;
    for step in histogram.iter_quantiles(TICKS) {
        count += step.count_since_last_iteration();
        let (value, quantile) = (step.value_iterated_to() as f64 / UNIT, step.quantile_iterated_to());
        let _ = write!(text, "{value:12.3} {quantile:14.12} {count:10}");
        let _ = match quantile < 1.0 {
            true => writeln!(text, " {:14.2}", 1.0 / (1.0 - quantile)),
            false => writeln!(text),
        };
    }
    let (mean, deviation) = (histogram.mean() / UNIT, histogram.stdev() / UNIT);
    let (max, total) = (histogram.max() as f64 / UNIT, histogram.len());
    let _ = writeln!(text, "#[Mean    = {mean:12.3}, StdDeviation   = {deviation:12.3}]");
    let _ = writeln!(text, "#[Max     = {max:12.3}, Total count    = {total:12}]");
    let _ = writeln!(text, "#[Buckets = {:12}, SubBuckets     = {SUB_BUCKETS:12}]", histogram.buckets());
    text
}

/// Histograms by interval, as they are logged.
#[derive(Debug)]
pub struct IntervalLog {
    bytes: Vec<u8>,
}

impl IntervalLog {
    /// One that begins now.
    pub fn new() -> IntervalLog {
        let mut log = IntervalLog { bytes: Vec::new() };
        let now = SystemTime::now();
        log.write(
            IntervalLogWriterBuilder::new()
                .add_comment("[Histogram log format version 1.3]")
                .add_comment("[Logged by umbra measure; values are in nanoseconds, Interval_Max too]")
                .with_start_time(now)
                .with_base_time(now),
            None,
        );
        log
    }

    /// One more, of an interval that began at `at` nanoseconds and lasted so many.
    pub fn add(&mut self, group: &str, measure: &str, at: u64, lasted: u64, histogram: &Histogram<u64>) {
        let tag = format!("{group}.{measure}");
        self.write(&mut IntervalLogWriterBuilder::new(), Some((&tag, at, lasted, histogram)));
    }

    fn write(
        &mut self,
        begin: &mut IntervalLogWriterBuilder,
        one: Option<(&str, u64, u64, &Histogram<u64>)>,
    ) {
        let mut serializer = V2DeflateSerializer::new();
        let Ok(mut writer) = begin.begin_log_with(&mut self.bytes, &mut serializer) else { return };
        if let Some((tag, at, lasted, histogram)) = one {
            let (at, lasted) = (Duration::from_nanos(at), Duration::from_nanos(lasted));
            // Memory takes everything, and the histogram's range is the serializer's.
            let written = writer.write_histogram(histogram, at, lasted, Tag::new(tag));
            debug_assert!(written.is_ok(), "{written:?}");
        }
    }

    /// The log.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    use super::super::causes::Asked;
    use super::super::collect::{By, Ended};
    use super::*;

    fn histogram(values: impl Iterator<Item = u64>) -> Histogram<u64> {
        let mut histogram = Histogram::new(3).expect("three digits");
        values.for_each(|value| histogram.record(value).expect("it grows"));
        histogram
    }

    #[test]
    fn a_distribution_reads_as_hdrhistogram_prints_one() {
        let text = distribution(&histogram((1..=1000).map(|n| n * 1000)));
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("       Value     Percentile TotalCount 1/(1-Percentile)"));
        assert_eq!(lines.next(), Some(""));
        let (mut last, mut rows) = ((0.0, -1.0, 0), 0);
        for line in lines.by_ref().take_while(|line| !line.contains("1.000000000000")) {
            let fields: Vec<f64> =
                line.split_whitespace().map(|field| field.parse().expect("a number")).collect();
            let [value, quantile, count, inverse] = fields[..] else { panic!("{line}") };
            assert!(value >= last.0 && quantile > last.1 && count as u64 >= last.2, "{line}");
            assert!((inverse - 1.0 / (1.0 - quantile)).abs() <= 0.01 * inverse, "{line}");
            // The values are 1 to 1000 us, one each.
            assert!((value - count).abs() <= 1.0, "{line}");
            (last, rows) = ((value, quantile, count as u64), rows + 1);
        }
        assert!(rows > 20, "{rows} rows");
        let rest: Vec<_> = lines.collect();
        assert!(
            rest[0].starts_with("#[Mean    =      500.") && rest[0].contains(", StdDeviation   =      288.")
        );
        assert!(
            rest[1].starts_with("#[Max     =     1000.")
                && rest[1].ends_with("Total count    =         1000]")
        );
        assert!(rest[2].starts_with("#[Buckets = ") && rest[2].ends_with("SubBuckets     =         2048]"));
    }

    #[test]
    fn a_log_has_each_interval_with_its_tag_as_hdrhistogram_reads_it() {
        let mut log = IntervalLog::new();
        let second = 1_000_000_000;
        for interval in 0..3 {
            let values = histogram((1..=100).map(|n| n * 1000 * (interval + 1)));
            log.add("page-out", "total", interval * second, second, &values);
            log.add("floor", "punch", interval * second, second, &histogram([7].into_iter()));
        }
        let bytes = log.into_bytes();
        let (mut starts, mut found) = (0, Vec::new());
        for entry in IntervalLogIterator::new(&bytes) {
            match entry.expect("a log that can be read") {
                LogEntry::StartTime(_) | LogEntry::BaseTime(_) => starts += 1,
                LogEntry::Interval(one) => found.push(one),
            }
        }
        assert_eq!((starts, found.len()), (2, 6));
        let mut reader = Deserializer::new();
        for (n, one) in found.iter().step_by(2).enumerate() {
            assert_eq!(one.tag().map(|tag| tag.as_str()), Some("page-out.total"));
            assert_eq!(
                (one.start_timestamp(), one.duration()),
                (Duration::from_secs(n as u64), Duration::from_secs(1))
            );
            let encoded = STANDARD.decode(one.encoded_histogram()).expect("base64");
            let read: Histogram<u64> = reader.deserialize(&mut &encoded[..]).expect("a histogram");
            assert_eq!((read.len(), read.value_at_quantile(1.0) / 1000), (100, 100 * (n as u64 + 1)));
        }
    }

    #[test]
    fn what_was_measured_has_a_file_and_what_was_not_has_none() {
        let mut all = Collected::default();
        let start = Ended { asked: Asked::Discard, intended: 0, began: 1, ended: 5000 };
        all.start(&start, None);
        all.floor("punch", 700);
        all.end_interval(0, 1, |_, _, _| ());
        assert!(all.groups.iter().any(|group| group.by == By::Asked(Asked::Discard)));
        let names: Vec<_> = distributions(&all).map(|(name, _)| name).collect();
        assert_eq!(names, ["discard.service", "discard.response", "floor.punch"]);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("new");
        let files = Folder::open(&path).expect("it is made");
        files.write(&all, b"#log\n").expect("they are written");
        let text = std::fs::read_to_string(path.join("discard.service.hgrm")).expect("it is there");
        assert!(text.contains("Total count    =            1]"), "{text}");
        assert_eq!(std::fs::read(path.join(LOG_NAME)).expect("it is there"), b"#log\n");
        let error = Folder::open(Path::new("/proc/no/such")).expect_err("no folder there");
        assert!(error.to_string().contains("--hgrm /proc/no/such"), "{error}");
    }
}
