//! How Umbra measures: batches, medians, one line a figure.
//!
//! Story: each bench prints lines `bench NAME=VALUE UNIT ...` that a script can read. A figure is the median over
//! batches, with the tenth percentile beside it: shared machines drift, and what is compared is compared in one run.
//! `--smoke` (or the environment's `UMBRA_BENCH_SMOKE`) runs a few batches, to see that a bench still works.
#![forbid(unsafe_code)]

pub mod c_peer;
pub mod peer;

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// How much to run.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Batches of each figure.
    pub batches: u32,
}

impl Effort {
    /// As the command line and the environment ask.
    pub fn from_args() -> Effort {
        let smoke =
            std::env::args().any(|a| a == "--smoke") || std::env::var_os("UMBRA_BENCH_SMOKE").is_some();
        Effort { batches: if smoke { 20 } else { 2000 } }
    }
}

/// Nanoseconds a call, by batch.
#[derive(Debug)]
pub struct Samples {
    /// In hundredths of a nanosecond, up to a second.
    histogram: Histogram<u64>,
}

impl Default for Samples {
    fn default() -> Samples {
        Samples::new()
    }
}

impl Samples {
    /// No samples.
    pub fn new() -> Samples {
        Samples {
            histogram: Histogram::new_with_bounds(1, 100_000_000_000, 3)
                .expect("bounds that a histogram takes"),
        }
    }

    /// Adds a figure in nanoseconds.
    pub fn add_nanos(&mut self, nanos: f64) {
        self.histogram.saturating_record((nanos * 100.0) as u64);
    }

    /// Adds a batch of `calls` calls that took `time`.
    pub fn add(&mut self, time: Duration, calls: u32) {
        self.histogram.saturating_record(time.as_nanos() as u64 * 100 / u64::from(calls.max(1)));
    }

    /// Nanoseconds at quantile `q` (0..=1).
    pub fn quantile(&self, q: f64) -> f64 {
        self.histogram.value_at_quantile(q) as f64 / 100.0
    }

    /// How many batches were added.
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// The median in nanoseconds.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Prints the figure's line.
    pub fn print(&self, name: &str, calls: u32) {
        println!(
            "bench {name}={:.1} ns p10={:.1} p90={:.1} batches={} calls={calls}",
            self.median(),
            self.quantile(0.1),
            self.quantile(0.9),
            self.histogram.len(),
        );
    }
}

/// Times `batch` (of `calls` calls) after an untimed `prepare`, `effort.batches` times.
pub fn measure(effort: Effort, calls: u32, mut prepare: impl FnMut(), mut batch: impl FnMut()) -> Samples {
    let mut samples = Samples::new();
    for _ in 0..effort.batches {
        prepare();
        let start = Instant::now();
        batch();
        samples.add(start.elapsed(), calls);
    }
    samples
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_counts_as_its_mean() {
        let mut samples = Samples::new();
        samples.add(Duration::from_nanos(1000), 10);
        assert!((samples.median() - 100.0).abs() < 1.0);
    }
}
