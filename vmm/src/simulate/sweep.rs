//! Runs of seeds, each in a process of its own.
//!
//! Story: seeds are started in their order, so that when one has failed all lower ones have been started. Those are waited for, the
//! others killed: the lowest that fails is what was found.
//!
//! Limits: the guest's output is thrown away.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, BufReader, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::args::Order;
use super::timeline;
use crate::child::{Child, LOOK, Outcome};
use crate::machine::memory_file;
use crate::pressure::progress::Progress;
use crate::status::Status;

/// How long is looked for a shorter way to a failure, in the host's time, and among how many choices.
const SHRINK_MAX: Duration = Duration::from_secs(120);
const CHOICES_MAX: u64 = 1 << 32;

/// A seed whose run did not end with 0.
#[derive(Clone, Debug)]
pub struct Failed {
    /// It.
    pub seed: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// Its last words.
    pub said: String,
    /// How few of the seed's choices are enough for it, where that was found out.
    pub choices: Option<u64>,
}

/// What a sweep came to.
#[derive(Clone, Debug)]
pub struct Report {
    /// The lowest seed that failed.
    pub failed: Option<Failed>,
    /// Runs that ended with 0, or by the failure of their swap that was asked for.
    pub passed: u64,
    /// The latter.
    pub by_swap: u64,
    /// An operator has ended it before it was through.
    pub interrupted: bool,
    /// How long it took.
    pub took: Duration,
}

impl Report {
    /// The exit status.
    pub fn code(&self) -> u8 {
        match &self.failed {
            Some(failed) => failed.outcome.code(),
            None if self.interrupted => Status::Quit.code(),
            None => Status::Pass.code(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.took.as_secs_f64();
        let a_minute = self.passed as f64 * 60.0 / seconds.max(0.001);
        let seeds = if self.passed == 1 { "seed" } else { "seeds" };
        write!(f, "{} {seeds} passed in {seconds:.1} s, {a_minute:.0} a minute", self.passed)?;
        match self.by_swap {
            0 => Ok(()),
            count => write!(f, ", {count} ended by their swap"),
        }
    }
}

/// Why a sweep or a replay could not go on.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// A run could not be started.
    #[error(
        "starting the run of seed {seed}: {source}; does the host have room for {jobs} runs at a time? --jobs has fewer"
    )]
    Start {
        /// Whose.
        seed: u64,
        /// How many there were to be.
        jobs: usize,
        /// Why.
        source: io::Error,
    },
    /// What became of it cannot be told.
    #[error("waiting for the run of seed {seed}: {source}")]
    Wait {
        /// Whose.
        seed: u64,
        /// Why.
        source: io::Error,
    },
    /// The timeline could not be written.
    #[error("writing the timeline of seed {seed} to standard output: {source}")]
    Timeline {
        /// Whose.
        seed: u64,
        /// Why.
        source: io::Error,
    },
}

/// A running one.
struct Run {
    seed: u64,
    child: Child,
}

impl Run {
    /// Starts it, with more options than the order has.
    fn start(order: &Order, seed: u64, more: &[String]) -> Result<Run, SweepError> {
        let child = Child::start(order.played(seed).chain(more.iter().map(OsString::from)), false);
        let child = child.map_err(|source| SweepError::Start { seed, jobs: order.jobs, source })?;
        Ok(Run { seed, child })
    }

    /// How it has ended, if it has.
    fn look(&mut self, patience: Duration) -> Result<Option<Outcome>, SweepError> {
        self.child.look(patience).map_err(|source| SweepError::Wait { seed: self.seed, source })
    }

    /// Waits for its end; nothing where a signal has come first.
    fn finish(
        &mut self,
        patience: Duration,
        signals: &dyn Fn() -> u32,
    ) -> Result<Option<Outcome>, SweepError> {
        while signals() == 0 {
            if let Some(outcome) = self.look(patience)? {
                return Ok(Some(outcome));
            }
            std::thread::sleep(LOOK);
        }
        Ok(None)
    }

    /// Its last words.
    fn said(&mut self) -> Result<String, SweepError> {
        self.child.said().map_err(|source| SweepError::Wait { seed: self.seed, source })
    }
}

/// Runs the seeds, and shows how far it is. `signals` says how many signals have come: one ends it.
///
/// # Errors
///
/// When the host has no room for the runs.
pub fn run(order: &Order, signals: &dyn Fn() -> u32) -> Result<Report, SweepError> {
    let begun = Instant::now();
    let (count, mut seeds) = (order.seeds.end - order.seeds.start, order.seeds.clone());
    let mut report = Report { failed: None, passed: 0, by_swap: 0, interrupted: false, took: Duration::ZERO };
    let mut running: Vec<Run> = Vec::new();
    let mut progress = Progress::on_stderr();
    loop {
        report.interrupted = signals() > 0;
        while report.failed.is_none() && !report.interrupted && running.len() < order.jobs {
            let Some(seed) = seeds.next() else { break };
            running.push(Run::start(order, seed, &[])?);
        }
        if running.is_empty() || report.interrupted {
            report.took = begun.elapsed();
            if let Some(failed) =
                report.failed.as_mut().filter(|failed| matches!(failed.outcome, Outcome::Status(_)))
            {
                failed.choices = shrink(order, failed, signals, &mut progress)?;
            }
            return Ok(report);
        }
        let mut at = 0;
        while at < running.len() {
            match running[at].look(order.patience)? {
                None => at += 1,
                Some(Outcome::Status(0)) => {
                    running.swap_remove(at);
                    report.passed += 1;
                }
                // The terminal's Ctrl-C is the run's, too.
                Some(_) if signals() > 0 => drop(running.swap_remove(at)),
                Some(outcome) => {
                    let mut run = running.swap_remove(at);
                    let said = run.said()?;
                    if order.io_failures && is_of_swap(outcome, &said) {
                        report.passed += 1;
                        report.by_swap += 1;
                        continue;
                    }
                    let failed = Failed { seed: run.seed, outcome, said, choices: None };
                    let before = report.failed.take().filter(|before| before.seed < failed.seed);
                    report.failed = Some(before.unwrap_or(failed));
                }
            }
        }
        if let Some(failed) = &report.failed {
            running.retain(|run| run.seed < failed.seed);
        }
        report.took = begun.elapsed();
        let done = report.passed as f64 / count as f64;
        progress.show(report.took, done, || format!("of {count}: {report}"));
        std::thread::sleep(LOOK);
    }
}

/// How few of the seed's choices are enough for the run to end as it did; nothing where all are needed, or nobody waits for an answer. More
/// of them need not fail as fewer do: it is the least that was met on the way.
fn shrink(
    order: &Order,
    failed: &Failed,
    signals: &dyn Fn() -> u32,
    progress: &mut Progress,
) -> Result<Option<u64>, SweepError> {
    let begun = Instant::now();
    let mut fails = |choices: u64| {
        let mut run = Run::start(order, failed.seed, &["--choices".into(), choices.to_string()])?;
        let words = || format!("seed {} {}; with {choices} of its choices?", failed.seed, failed.outcome);
        progress.show(begun.elapsed(), 0.0, words);
        let left = SHRINK_MAX.saturating_sub(begun.elapsed()).min(order.patience);
        let is_same = run.finish(left, signals)? == Some(failed.outcome);
        let said = run.said()?;
        let is_asked_for = order.io_failures && is_of_swap(failed.outcome, &said);
        Ok(is_same && !is_asked_for && breach(&said) == breach(&failed.said))
    };
    let (mut too_few, mut enough) = (0, 0);
    while !fails(enough)? {
        if signals() > 0 || enough > CHOICES_MAX || begun.elapsed() > SHRINK_MAX {
            return Ok(None);
        }
        (too_few, enough) = (enough + 1, (2 * enough).max(1));
    }
    while too_few < enough && signals() == 0 && begun.elapsed() < SHRINK_MAX {
        let middle = too_few + (enough - too_few) / 2;
        match fails(middle)? {
            true => enough = middle,
            false => too_few = middle + 1,
        }
    }
    Ok(Some(enough))
}

/// The run has ended by a failure of its swap, and by nothing else: no invariant is broken, nobody has panicked.
fn is_of_swap(outcome: Outcome, said: &str) -> bool {
    let failed = said.lines().any(|line| line.contains("swap: ") && line.contains("(os error 5)"));
    let is_clean = breach(said).is_none() && !said.contains("panicked");
    outcome == Outcome::Status(Status::Failure.code()) && failed && is_clean
}

/// Which invariant a run says that it has broken, if any: two failures of one status may be two.
fn breach(said: &str) -> Option<&str> {
    said.split([' ', ':']).find(|word| word.starts_with("INV-"))
}

/// Runs the first seed, and writes its timeline to `out`.
///
/// # Errors
///
/// When it cannot be run, or not be written.
pub fn replay(order: &Order, signals: &dyn Fn() -> u32, out: &mut impl Write) -> Result<Failed, SweepError> {
    let seed = order.seeds.start;
    let log = memory_file(c"umbra-event-log", 0);
    let mut log = log.map_err(|source| SweepError::Start { seed, jobs: 1, source })?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), log.as_raw_fd());
    let mut run = Run::start(order, seed, &["--event-log".into(), path])?;
    let outcome = run.finish(order.patience, signals)?.unwrap_or(Outcome::Status(Status::Quit.code()));
    let ended = Failed { seed, outcome, said: run.said()?, choices: None };
    drop(run);
    let mut write = || {
        let events = timeline::Actors::of(BufReader::new(&log))?;
        log.seek(SeekFrom::Start(0))?;
        events.write(BufReader::new(&log), out)
    };
    write().map_err(|source| SweepError::Timeline { seed, source })?;
    Ok(ended)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_ends_by_its_swap_alone_is_told_from_others() {
        let failure = Outcome::Status(Status::Failure.code());
        let said = "umbra: swap: writing 13 pages at slot 82 failed: Input/output error (os error 5); the guest is stopped\n";
        assert!(is_of_swap(failure, said));
        assert!(
            !is_of_swap(failure, &format!("{said}umbra: audit: INV-RMAP-1: an spte\n")),
            "not by it alone"
        );
        assert!(!is_of_swap(failure, &format!("{said}thread 'vcpu 0' panicked at x.rs:1:2:\n")), "nor here");
        assert!(!is_of_swap(failure, "umbra: swap is full\n"), "another failure");
        assert!(!is_of_swap(Outcome::Status(Status::Deadlock.code()), said), "another end");
        assert!(!is_of_swap(Outcome::Hung(Duration::ZERO), said), "none");
    }
}
