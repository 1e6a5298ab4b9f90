//! One guest, several things that run it: how many operations a second each does, by a clock outside the guest.
//!
//! Story: the guest says `time: begin PHASE UNIT=COUNT` and `time: end PHASE ..` on its serial port. The lines are stamped
//! as they come out of the process that runs it, so what is compared is wall time, whatever the guest's own clock does, and
//! no start-up is in it. Holds: a run that does not end with the guest's `verdict=PASS` yields no figure.
//! Limits: a line is stamped some tens of microseconds late, alike for all; a phase should take milliseconds.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// A phase of a run, as seen from outside.
#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    /// The guest's name for it: `spin.loop`.
    pub name: String,
    /// What it counts: `instructions`.
    pub unit: String,
    /// How many of them.
    pub count: u64,
    /// From the line that begins it to the one that ends it.
    pub took: Duration,
}

impl Phase {
    /// Operations a second.
    pub fn rate(&self) -> f64 {
        self.count as f64 / self.took.as_secs_f64().max(1e-9)
    }
}

/// What the lines of a run have said so far.
#[derive(Debug, Default)]
pub struct Transcript {
    phases: Vec<Phase>,
    open: Option<(Phase, Instant)>,
    passed: bool,
}

impl Transcript {
    /// Takes in a line that came at `at`. A line that is not about time or the verdict is ignored.
    pub fn line(&mut self, line: &str, at: Instant) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["time:", "begin", name, counted] => self.open = begin(name, counted).map(|phase| (phase, at)),
            ["time:", "end", name, ..] => {
                if let Some((phase, begun)) = self.open.take().filter(|(phase, _)| phase.name == name) {
                    self.phases.push(Phase { took: at.saturating_duration_since(begun), ..phase });
                }
            }
            ["pager:", "verdict=PASS", ..] => self.passed = true,
            _ => {}
        }
    }

    /// The phases, if the guest passed and there are any.
    pub fn phases(self) -> Option<Vec<Phase>> {
        Some(self.phases).filter(|phases| self.passed && !phases.is_empty())
    }
}

fn begin(name: &str, counted: &str) -> Option<Phase> {
    let (unit, count) = counted.split_once('=')?;
    let (name, unit, count) = (name.to_owned(), unit.to_owned(), count.parse().ok()?);
    Some(Phase { name, unit, count, took: Duration::ZERO })
}

/// Runs `command` to its end and times the guest's phases.
///
/// # Errors
///
/// A sentence, when it cannot be started, takes longer than `limit`, or the guest does not pass.
pub fn run(command: &mut Command, limit: Duration) -> Result<Vec<Phase>, String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("cannot start {command:?}: {error}"))?;
    let (lines, words) = (stamped(child.stdout.take()), stamped(child.stderr.take()));
    let transcript = follow(&lines, Instant::now() + limit);
    let ended = end(&mut child, transcript.is_some());
    let phases = transcript.and_then(Transcript::phases);
    phases.ok_or_else(|| {
        let said: Vec<String> = words.into_iter().map(|(_, line)| line).collect();
        format!("{command:?} {ended}; it said: {}", said.join(" | "))
    })
}

/// The lines of a pipe, each with the moment it was read.
fn stamped(pipe: Option<impl std::io::Read + Send + 'static>) -> Receiver<(Instant, String)> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let Some(pipe) = pipe else { return };
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
            let stamped = (Instant::now(), String::from_utf8_lossy(&line).trim_end().to_owned());
            line.clear();
            if sender.send(stamped).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Reads to the end; `None` when that does not come before `deadline`.
fn follow(lines: &Receiver<(Instant, String)>, deadline: Instant) -> Option<Transcript> {
    let mut transcript = Transcript::default();
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok((at, line)) => transcript.line(&line, at),
            Err(RecvTimeoutError::Disconnected) => return Some(transcript),
            Err(RecvTimeoutError::Timeout) => return None,
        }
    }
}

/// Reaps the child, by force unless it has closed its output; says how it ended.
fn end(child: &mut Child, in_time: bool) -> String {
    if !in_time {
        // It may have ended just now; then there is nothing to kill.
        let _ = child.kill();
    }
    match child.wait() {
        Ok(_) if !in_time => "took too long".to_owned(),
        Ok(status) => format!("ended without passing, {status}"),
        Err(error) => format!("cannot be awaited: {error}"),
    }
}

/// The value at quantile `q` (0..=1) of a few; NaN of none.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((q * last as f64).round() as usize).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transcript(lines: &[(u64, &str)]) -> Option<Vec<Phase>> {
        let start = Instant::now();
        let mut transcript = Transcript::default();
        for (millis, line) in lines {
            transcript.line(line, start + Duration::from_millis(*millis));
        }
        transcript.phases()
    }

    const PASS: (u64, &str) = (99, "pager: verdict=PASS workload=spin paging=pae checks=4 errors=0");

    #[test]
    fn a_phase_lasts_from_its_begin_to_its_end() {
        let lines = [
            (0, "pager: boot paging=pae"),
            (10, "time: begin spin.loop instructions=3000"),
            (40, "time: end spin.loop tsc1024=5"),
            PASS,
        ];
        let phases = transcript(&lines).expect("a run that passed");
        assert_eq!(phases.len(), 1);
        assert_eq!((phases[0].name.as_str(), phases[0].unit.as_str()), ("spin.loop", "instructions"));
        assert!((phases[0].rate() - 100_000.0).abs() < 1.0);
    }

    #[test]
    fn a_run_that_fails_or_times_nothing_has_no_figure() {
        let phase = [(10, "time: begin a b=1"), (40, "time: end a tsc1024=5")];
        assert_eq!(transcript(&phase), None, "no verdict");
        assert_eq!(transcript(&[phase[0], (40, "time: end other tsc1024=5"), PASS]), None, "no such begin");
        assert_eq!(transcript(&[(10, "time: begin a b=many"), phase[1], PASS]), None, "no number");
    }

    #[test]
    fn a_program_that_does_not_pass_or_hangs_is_said_so() {
        let shell = |script: &str, limit| run(Command::new("sh").args(["-c", script]), limit);
        let failed = shell("echo why >&2; exit 3", Duration::from_secs(60)).expect_err("it fails");
        assert!(failed.contains("why") && failed.contains('3'), "{failed}");
        let hung = shell("exec sleep 60", Duration::from_millis(50)).expect_err("it hangs");
        assert!(hung.contains("too long"), "{hung}");
    }

    #[test]
    fn quantiles_are_values_of_the_sample() {
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 1.0), 3.0);
        assert!(quantile(&[], 0.5).is_nan());
    }
}
