//! Cases in processes of their own, seed by seed, and what is said of them.

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write};
use std::thread;
use std::time::{Duration, Instant};

use super::args::{Order, Player};
use super::guest_rules;
use super::judge::{self, Verdict};
use super::story::{Fact, Story};
use super::table::{Case, Play, STRESS, options};
use crate::child::{Child, LOOK, Outcome};
use crate::pressure::progress::Progress;
use crate::status::Status;

/// Memory of a guest that plays.
const MEMORY: &str = "32M";

/// Why no more can be played.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// A process could not be started, or not be heard.
    #[error("playing {case} by seed {seed}: {source}; is there room for another process?")]
    Play {
        /// The case.
        case: &'static str,
        /// The seed.
        seed: u64,
        /// Why.
        source: io::Error,
    },
    /// Nobody reads what is said.
    #[error("writing to standard output: {0}")]
    Output(#[from] io::Error),
}

/// What all of them came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Cases, counted once for each seed, that were as they should be.
    pub good: u64,
    /// And those that were not.
    pub bad: u64,
    /// An operator has ended it.
    pub interrupted: bool,
    /// They went without their rules.
    pub bug: bool,
}

impl Report {
    /// The exit status.
    pub fn code(&self) -> u8 {
        match self {
            Report { interrupted: true, .. } => Status::Quit.code(),
            Report { bad: 0, good: 1.., .. } => Status::Pass.code(),
            Report { .. } => Status::Witness.code(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.bug { "caught" } else { "passed" };
        write!(f, "{} of {} {word}", self.good, self.good + self.bad)?;
        if self.interrupted { f.write_str(", interrupted") } else { Ok(()) }
    }
}

/// What one run of a case came to.
struct Played {
    verdict: Verdict,
    story: Story,
    said: String,
    seed: u64,
    took: Duration,
}

/// Plays what is ordered, and says on `out` what happens. `signals` says how many signals have come: one ends it.
///
/// # Errors
///
/// When the host has no room for another process, or nobody reads.
pub fn run(order: &Order, signals: &dyn Fn() -> u32, out: &mut impl Write) -> Result<Report, ScenarioError> {
    let mut report = Report { bug: order.bug, ..Report::default() };
    let (begun, mut progress) = (Instant::now(), Progress::on_stderr());
    let runs = order.cases.len() as u64 * (order.seeds.end - order.seeds.start);
    if order.explain {
        writeln!(out, "{}: {}", order.scenario.name, order.scenario.about)?;
        writeln!(out, "  {}", order.scenario.source)?;
        order.scenario.tale.iter().try_for_each(|text| writeln!(out, "\n{text}"))?;
    }
    for case in &order.cases {
        if order.explain {
            writeln!(out, "\n{}: {}", case.name, case.rule)?;
            if order.bug {
                writeln!(out, "  left out: {}", case.bug)?;
            }
        }
        let (mut good, mut last, mut slowest) = (0, None, Duration::ZERO);
        for seed in order.seeds.clone() {
            let Some(played) = play(order, case, seed, signals)? else {
                report.interrupted = true;
                return Ok(report);
            };
            let done = (report.good + report.bad) as f64 / runs as f64;
            progress.show(begun.elapsed(), done, || {
                format!("{}/{}, seed {seed}", order.scenario.name, case.name)
            });
            slowest = slowest.max(played.took);
            if played.verdict.is_good() {
                (good, report.good) = (good + 1, report.good + 1);
            } else {
                report.bad += 1;
                show(out, order, case, &played, true)?;
            }
            if order.explain && seed == order.seeds.start && played.verdict.is_good() {
                show(out, order, case, &played, true)?;
            }
            last = Some(played).filter(|played| played.verdict.is_good()).or(last);
        }
        if let Some(played) = last.filter(|_| !order.explain) {
            show(out, order, case, &played, false)?;
        }
        let seeds = order.seeds.end - order.seeds.start;
        if seeds > 1 {
            writeln!(out, "  {good} of {seeds} seeds, the slowest in {:.1} s", slowest.as_secs_f64())?;
        }
    }
    Ok(report)
}

/// What is said of a case.
fn show(out: &mut impl Write, order: &Order, case: &Case, played: &Played, all: bool) -> io::Result<()> {
    let name = format!("{}/{}", order.scenario.name, case.name);
    writeln!(out, "{name}: {}, seed {}, {:.1} s", played.verdict, played.seed, played.took.as_secs_f64())?;
    let is_told = |fact: &&Fact| match fact {
        Fact::Begin | Fact::Passed => false,
        Fact::Measured(_) => true,
        _ => all,
    };
    played.story.0.iter().filter(is_told).try_for_each(|fact| writeln!(out, "  {fact}"))?;
    if let Verdict::Caught(lines) = &played.verdict {
        lines.iter().try_for_each(|line| writeln!(out, "  {line}"))?;
    }
    if !played.verdict.is_good() || all && matches!(case.play, Play::Omission(..) | Play::Flush(..)) {
        played.said.lines().try_for_each(|line| writeln!(out, "    {line}"))?;
    }
    Ok(())
}

/// Plays a case by one seed; by seeds from there on, where it takes several to miss what is left out. Nothing where a signal has come.
fn play(
    order: &Order,
    case: &Case,
    seed: u64,
    signals: &dyn Fn() -> u32,
) -> Result<Option<Played>, ScenarioError> {
    let begun = Instant::now();
    let tries = if order.bug { case.play.tries() } else { 1 };
    for seed in seed..seed.saturating_add(tries) {
        let Some((outcome, heard, said)) = once(order, case, seed, order.bug, signals)? else {
            return Ok(None);
        };
        let story = Story::of(&heard, told_by(case));
        let verdict = match (order.bug, case.play) {
            (true, Play::Omission(..)) => judge::omission(outcome, &said),
            (true, Play::Flush(..)) => judge::without_flush(outcome, &said, || {
                once(order, case, seed, false, signals).map(|run| run.map(|(outcome, ..)| outcome))
            })?,
            (true, _) => Some(judge::left_out(case, outcome, &story)),
            (false, Play::Omission(..) | Play::Flush(..)) if outcome == Outcome::Status(0) => {
                Some(Verdict::Passed)
            }
            (false, _) => Some(judge::in_force(outcome, &story)),
        };
        if let Some(verdict) = verdict {
            return Ok(Some(Played { verdict, story, said, seed, took: begun.elapsed() }));
        }
    }
    let verdict = Verdict::Missed(format!("{tries} seeds from {seed} on found nothing"));
    Ok(Some(Played { verdict, story: Story::default(), said: String::new(), seed, took: begun.elapsed() }))
}

/// Who tells the facts.
fn told_by(case: &Case) -> &'static str {
    match case.play {
        Play::Guest(..) | Play::Omission(..) | Play::Flush(..) => case.name,
        Play::Scene(scene, _) => scene.name(),
    }
}

/// One run, with `bug` or without: how it ended, and what was said by the case and by Umbra.
fn once(
    order: &Order,
    case: &Case,
    seed: u64,
    bug: bool,
    signals: &dyn Fn() -> u32,
) -> Result<Option<(Outcome, String, String)>, ScenarioError> {
    let failed = |source| ScenarioError::Play { case: case.name, seed, source };
    let mut child = Child::start(words(order.player, case, seed, bug), true).map_err(failed)?;
    let outcome = loop {
        let outcome = child.look(order.patience).map_err(failed)?;
        // The terminal's Ctrl-C is the run's, too.
        if signals() > 0 {
            return Ok(None);
        }
        if let Some(outcome) = outcome {
            break outcome;
        }
        thread::sleep(LOOK);
    };
    let heard = child.heard().map_err(failed)?;
    Ok(Some((outcome, heard, child.said().map_err(failed)?)))
}

/// The arguments of the program that plays it.
fn words(player: Player, case: &Case, seed: u64, bug: bool) -> Vec<OsString> {
    let seed = seed.to_string();
    let simulated = ["play", "--deterministic", "--seed", &seed];
    let mut words: Vec<OsString> = Vec::new();
    let mut say = |all: &[&str]| words.extend(all.iter().map(OsString::from));
    match case.play {
        Play::Guest(workload, cpus) => {
            match player {
                Player::Soft => say(&simulated),
                Player::Kvm => say(&["play", "--backend", "kvm"]),
            }
            let bug = if bug { " bug" } else { "" };
            let append = format!("workload={workload} case={}{bug}", case.name);
            say(&["--vcpus", &cpus.to_string(), "--mem", MEMORY, "--append", &append]);
        }
        Play::Scene(scene, rule) => {
            say(&simulated);
            say(&["--scene", scene.name()]);
            rule.filter(|_| bug).iter().for_each(|rule| say(&["--without", rule.name()]));
        }
        Play::Omission(rule) => {
            say(&simulated);
            say(&options(rule));
            say(&STRESS);
            if bug {
                say(&["--without", rule.name()]);
            }
        }
        Play::Flush(flush) => {
            say(&simulated);
            say(&guest_rules::OPTIONS);
            let omit = if bug { format!(" omit={}", flush.name) } else { String::new() };
            say(&["--vcpus", &flush.vcpus.to_string(), "--append", &format!("{}{omit}", flush.append)]);
        }
    }
    words
}
