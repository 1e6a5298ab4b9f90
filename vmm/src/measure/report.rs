//! What a measurement came to: in words, and in JSON.
//!
//! Story: a [`Report`] has the numbers alone, and can be written and read back; a later run is compared with it.

use std::fmt;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use umbra_mmu::records::{Cause, Totals};

use super::Order;
use super::causes::Asked;
use super::collect::{self, By, Group, IMPORTERS, KICKED, Measure, RESPONSE, SERVICE, Slowest, TOTAL};
use super::floors::{DEADLINE, KICK, NOTIFIER, OUTSIDE, PUNCH};
use super::session::{Findings, Stop};
use crate::vm::Summary;

/// The version of the JSON's schema: it rises when a field changes its meaning or goes.
pub const SCHEMA: u32 = 1;

/// All of it. Times are in nanoseconds, where not said otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// `SCHEMA`.
    pub schema: u32,
    /// Version of Umbra.
    pub version: String,
    /// What was asked for, and with what.
    pub setting: Setting,
    /// True when all of it was measured; else `end` says why not.
    pub complete: bool,
    /// How it ended, in words.
    pub end: String,
    /// How long was measured, without the rounds of floors.
    pub nanos: u64,
    /// The starts, all causes together.
    pub starts: Starts,
    /// What it could not do without.
    pub floors: Vec<Times>,
    /// Those that were asked for, then those that came by themselves.
    pub causes: Vec<CauseReport>,
    /// The same as `causes` has for starts, by how many importers were told; empty where none were asked for.
    #[serde(default)]
    pub told: Vec<CauseReport>,
    /// Those importers that were waited for when all others of those told had answered, and how long that took beyond the vCPUs.
    #[serde(default)]
    pub slowest: Vec<Times>,
    /// Sleeps of vCPUs at the gates of pages that were changing hands.
    pub gate_sleeps: Times,
    /// What was lost before it could be counted.
    pub lost: Lost,
    /// The MMU's own totals over the same time, by its causes.
    pub mmu: Vec<MmuTotals>,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The guest: its image's name and its command line.
    pub guest: String,
    /// "kvm" or "soft".
    pub backend: String,
    /// "kick" or "notifier".
    pub shootdown: String,
    /// vCPUs.
    pub vcpus: u32,
    /// Bytes of guest memory.
    pub mem: u64,
    /// Causes, in turn.
    pub causes: Vec<String>,
    /// Starts a second.
    pub rate: u32,
    /// Pages of a start.
    pub pages: u32,
    /// How many importers had the pages, in turn.
    #[serde(default)]
    pub importers: Vec<u32>,
    /// How long they took to answer, in nanoseconds.
    #[serde(default)]
    pub ack_delay: u64,
    /// Each was awaited before the next was told.
    #[serde(default)]
    pub in_turn: bool,
    /// They were stopped.
    #[serde(default)]
    pub stopped: bool,
    /// No vCPU touched the pages.
    #[serde(default)]
    pub untouched: bool,
}

/// Starts of an open schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Starts {
    /// As many as there were to be.
    pub planned: u64,
    /// Those that have begun in their time.
    pub begun: u64,
    /// Those of them whose time had come before the one before had ended.
    pub late: u64,
}

/// What was lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// Records of invalidations.
    pub records: u64,
    /// Sleeps at gates.
    pub waits: u64,
}

/// Quantiles of times.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// Of what.
    pub name: String,
    /// How many.
    pub count: u64,
    /// The shortest.
    pub min: u64,
    /// Their mean.
    pub mean: f64,
    /// The median.
    pub p50: u64,
    /// So many of a hundred were as short.
    pub p90: u64,
    /// See `p90`.
    pub p99: u64,
    /// So many of a thousand.
    pub p999: u64,
    /// The longest.
    pub max: u64,
    /// The median over that of each floor that it has.
    pub over: Vec<Ratio>,
    /// The same by interval, where there was anything.
    pub intervals: Vec<Slice>,
    /// The percentile curve.
    #[serde(default)]
    pub curve: Vec<Point>,
}

/// A point of a percentile curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// So many, of one.
    pub quantile: f64,
    /// Were as short.
    pub nanos: u64,
}

/// Where curves have points: a point for each half of what is left.
const CURVE: [f64; 17] = [
    0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975, 0.99, 0.995, 0.9975, 0.999, 0.9995, 0.9999, 0.999_95,
    0.999_99, 1.0,
];

/// A ratio to a floor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Which.
    pub floor: String,
    /// The ratio.
    pub ratio: f64,
}

/// An interval of a measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slice {
    /// When it began, since the measurement did.
    pub at: u64,
    /// How many there were.
    pub count: u64,
    /// The median.
    pub p50: u64,
    /// So many of a hundred were as short.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

/// The invalidations of one cause.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CauseReport {
    /// Its name; "other-" before it where it came by itself.
    pub cause: String,
    /// Invalidations.
    pub invalidations: u64,
    /// And in a second.
    pub rate: f64,
    /// Pages taken.
    pub pages: u64,
    /// Pages left alone.
    pub skipped: u64,
    /// Frames made free.
    pub freed: u64,
    /// Kicks.
    pub kicked: u64,
    /// Importers told.
    #[serde(default)]
    pub told: u64,
    /// Those of them that did not answer in their time.
    #[serde(default)]
    pub late: u64,
    /// Starts that could not have what they were to have.
    pub failed: u64,
    /// Why the last of them could not.
    pub failed_why: Option<String>,
    /// Times of each phase, and of the starts.
    pub phases: Vec<Times>,
}

/// The MMU's totals of one of its causes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmuTotals {
    /// Its name.
    pub cause: String,
    /// Invalidations.
    pub count: u64,
    /// Pages taken.
    pub pages: u64,
    /// Kicks.
    pub kicked: u64,
    /// Nanoseconds, all together.
    pub nanos: u64,
}

/// Which floors a phase stands on.
fn floors_of(phase: &str, by: By) -> Vec<&'static str> {
    let floors: &[&str] = match (phase, by) {
        ("shootdown" | TOTAL, _) => &[KICK, NOTIFIER],
        (KICKED, _) => &[KICK],
        (IMPORTERS, By::Told(count)) => match OUTSIDE.get(count as usize) {
            // The first of them is what is told first and awaited after.
            Some((first, _)) => return vec![first, DEADLINE],
            None => &[],
        },
        // Frames go back to the host before the call ends.
        (SERVICE, By::Asked(Asked::Discard | Asked::Balloon)) => &[KICK, NOTIFIER, PUNCH],
        _ => &[],
    };
    floors.to_vec()
}

impl Times {
    fn of(measure: &Measure) -> Times {
        let all = &measure.all;
        let at = |quantile| all.value_at_quantile(quantile);
        let filled = measure.intervals.iter().filter(|interval| interval.count > 0);
        let slice = |interval: &collect::Interval| Slice {
            at: interval.at,
            count: interval.count,
            p50: interval.p50,
            p99: interval.p99,
            max: interval.max,
        };
        Times {
            name: measure.name.into(),
            count: all.len(),
            min: all.min(),
            mean: mean(all),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: all.max(),
            over: Vec::new(),
            intervals: filled.map(slice).collect(),
            curve: match all.is_empty() {
                true => Vec::new(),
                false => CURVE.map(|quantile| Point { quantile, nanos: at(quantile) }).to_vec(),
            },
        }
    }

    fn stand_on(mut self, floors: &[Times], names: &[&str]) -> Times {
        let mut ratio = |floor: &Times| {
            if floor.p50 > 0 && self.count > 0 {
                let ratio = self.p50 as f64 / floor.p50 as f64;
                self.over.push(Ratio { floor: floor.name.clone(), ratio });
            }
        };
        floors.iter().filter(|floor| names.contains(&floor.name.as_str())).for_each(&mut ratio);
        self
    }
}

/// 0 of nothing.
fn mean(all: &Histogram<u64>) -> f64 {
    if all.is_empty() { 0.0 } else { all.mean() }
}

impl CauseReport {
    fn of(group: &Group, nanos: u64, floors: &[Times]) -> CauseReport {
        let phase = |measure| {
            let times = Times::of(measure);
            let names = floors_of(&times.name, group.by);
            times.stand_on(floors, &names)
        };
        CauseReport {
            cause: group.by.name(),
            invalidations: group.sums.invalidations,
            rate: per_second(group.sums.invalidations, nanos),
            pages: group.sums.pages,
            skipped: group.sums.skipped,
            freed: group.sums.freed,
            kicked: group.sums.kicked,
            told: group.sums.told,
            late: group.sums.late,
            failed: group.failed.0,
            failed_why: group.failed.1.map(Into::into),
            phases: group.measures.iter().map(phase).collect(),
        }
    }
}

fn per_second(count: u64, nanos: u64) -> f64 {
    if nanos == 0 { 0.0 } else { count as f64 * 1e9 / nanos as f64 }
}

impl Report {
    /// What `findings` of `order` come to. `summary` is of the run that they are of.
    pub fn new(order: &Order, findings: &Findings, summary: &Summary) -> Report {
        let groups = &findings.all.groups;
        let of = |by| groups.iter().find(|group| group.by == by);
        let floors =
            of(By::Floors).map_or(Vec::new(), |group| group.measures.iter().map(Times::of).collect());
        let asked = order.causes.iter().filter_map(|asked| of(By::Asked(*asked)));
        let others = groups.iter().filter(|group| matches!(group.by, By::Other(_)));
        let report = |group| CauseReport::of(group, findings.lasted, &floors);
        let causes = asked.chain(others).map(report).collect();
        let count = |group: &&Group| match group.by {
            By::Told(count) => Some(count),
            _ => None,
        };
        let mut told: Vec<&Group> = groups.iter().filter(|group| count(group).is_some()).collect();
        told.sort_by_key(count);
        let told = told.into_iter().map(report).collect();
        let slowest = findings.all.slowest.iter().map(|one| of_importer(one, &findings.importers)).collect();
        let none = Measure::new(collect::GATE_SLEEP);
        let gate_sleeps = Times::of(of(By::Vcpus).map_or(&none, |group| &group.measures[0]));
        Report {
            schema: SCHEMA,
            version: summary.version.into(),
            setting: Setting::of(order, findings),
            complete: findings.why == Stop::Done,
            end: end(findings, summary),
            nanos: findings.lasted,
            starts: Starts {
                planned: findings.starts.planned,
                begun: findings.starts.begun,
                late: findings.starts.late,
            },
            floors,
            causes,
            told,
            slowest,
            gate_sleeps,
            lost: Lost { records: findings.all.records_lost, waits: findings.all.waits_lost },
            mmu: totals(&findings.totals),
        }
    }
}

impl Setting {
    fn of(order: &Order, findings: &Findings) -> Setting {
        let name = match (&order.run.image, &order.guest) {
            (Some(path), _) => path.display().to_string(),
            (None, Some(guest)) => guest.name.into(),
            (None, None) => "pager".into(),
        };
        Setting {
            guest: format!("{name} {}", order.run.append).trim_end().into(),
            backend: findings.backend.into(),
            shootdown: findings.shootdown.into(),
            vcpus: order.run.vcpus,
            mem: order.run.mem,
            causes: order.causes.iter().map(|asked| asked.name().into()).collect(),
            rate: order.rate,
            pages: order.pages,
            importers: order.importers.clone(),
            ack_delay: order.ack_delay.as_nanos() as u64,
            in_turn: order.in_turn,
            stopped: order.stop_importers,
            untouched: order.settled.as_range() != order.targets.as_range()
                && order.targets.as_range().map(|range| range.0)
                    != order.settled.as_range().map(|range| range.0),
        }
    }
}

/// By its place among the importers, the first being 1.
fn of_importer(one: &Slowest, numbers: &[u32]) -> Times {
    let at = numbers.iter().position(|number| *number == one.importer);
    let name = at.map_or(format!("number {}", one.importer), |at| format!("importer {}", at + 1));
    Times { name, ..Times::of(&one.waits) }
}

impl Setting {
    /// Importers, in words.
    pub fn of_importers(&self) -> String {
        let counts: Vec<String> = self.importers.iter().map(u32::to_string).collect();
        let how = match (self.stopped, self.in_turn) {
            (true, _) => ", stopped",
            (_, true) => ", each awaited before the next is told",
            _ => ", all told and then all awaited",
        };
        let delay = if self.ack_delay > 0 {
            format!(", answering after {}", show(self.ack_delay))
        } else {
            String::new()
        };
        let whose = if self.untouched { ", of pages that no vCPU touches" } else { "" };
        format!("importers in turn: {}{delay}{how}{whose}", counts.join(", "))
    }
}

fn end(findings: &Findings, summary: &Summary) -> String {
    match findings.why {
        Stop::NoImporters => findings.trouble.clone().unwrap_or_else(|| "there were no importers".into()),
        Stop::NoStart => {
            "no invalidation began in its time: the machine has too much else to do; give it longer (--for)"
                .into()
        }
        Stop::Done => "all of it was measured".into(),
        Stop::Interrupted => "it was interrupted".into(),
        Stop::GuestEnded => format!("the guest's run ended: {}", summary.end),
        Stop::NotSettled => "the guest has not touched its pages in 20 s".into(),
    }
}

fn totals(totals: &[Totals; Cause::ALL.len()]) -> Vec<MmuTotals> {
    let named = Cause::ALL.iter().zip(totals);
    let total = |(cause, totals): (&Cause, &Totals)| MmuTotals {
        cause: cause.name().into(),
        count: totals.count,
        pages: totals.pages,
        kicked: totals.kicked,
        nanos: totals.nanos,
    };
    named.map(total).collect()
}

/// A time for reading: `0.42us`, `12.3us`, `4.57ms`.
pub fn show(nanos: u64) -> String {
    let (value, unit) = match nanos {
        0..1_000_000 => (nanos as f64 / 1e3, "us"),
        1_000_000..1_000_000_000 => (nanos as f64 / 1e6, "ms"),
        _ => (nanos as f64 / 1e9, "s"),
    };
    let places = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.places$}{unit}")
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let setting = &self.setting;
        writeln!(
            f,
            "measured {:.2}s of '{}' on {} with {} vCPU(s), who forget by {}: {} of {} page(s), {}/s",
            self.nanos as f64 / 1e9,
            setting.guest,
            setting.backend,
            setting.vcpus,
            setting.shootdown,
            setting.causes.join(", "),
            setting.pages,
            setting.rate
        )?;
        if !setting.importers.is_empty() {
            writeln!(f, "{}", setting.of_importers())?;
        }
        head(f, "cause", "phase")?;
        for cause in &self.causes {
            cause
                .phases
                .iter()
                .filter(|times| times.count > 0)
                .try_for_each(|times| row(f, &cause.cause, times))?;
        }
        for told in &self.told {
            told.phases
                .iter()
                .filter(|times| times.count > 0)
                .try_for_each(|times| row(f, &told.cause, times))?;
        }
        self.slowest.iter().try_for_each(|times| row(f, "slowest", times))?;
        if self.gate_sleeps.count > 0 {
            row(f, collect::VCPUS, &self.gate_sleeps)?;
        }
        self.floors.iter().try_for_each(|floor| row(f, "floor", floor))?;
        self.words(f)
    }
}

fn head(f: &mut fmt::Formatter<'_>, cause: &str, phase: &str) -> fmt::Result {
    writeln!(
        f,
        "{cause:<20} {phase:<12} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}  median over floor",
        "count", "p50", "p90", "p99", "p99.9", "max"
    )
}

fn row(f: &mut fmt::Formatter<'_>, cause: &str, times: &Times) -> fmt::Result {
    let over: Vec<_> = times.over.iter().map(|over| format!("{:.2} x {}", over.ratio, over.floor)).collect();
    let line = format!(
        "{cause:<20} {:<12} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}  {}",
        times.name,
        times.count,
        show(times.p50),
        show(times.p90),
        show(times.p99),
        show(times.p999),
        show(times.max),
        over.join(", ")
    );
    writeln!(f, "{}", line.trim_end())
}

impl Report {
    /// What no table says.
    fn words(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for cause in self.causes.iter().filter(|cause| cause.invalidations > 0) {
            writeln!(
                f,
                "{}: {} invalidations ({:.0}/s), {} pages taken, {} left alone, {} frames free, {} kicks",
                cause.cause,
                cause.invalidations,
                cause.rate,
                cause.pages,
                cause.skipped,
                cause.freed,
                cause.kicked
            )?;
        }
        for cause in &self.causes {
            if let Some(why) = &cause.failed_why {
                writeln!(
                    f,
                    "{}: {} starts could not have what they were to have; the last: {why}",
                    cause.cause, cause.failed
                )?;
            }
        }
        if let Some(slowest) = self.slowest.iter().max_by_key(|one| one.count) {
            let all: u64 = self.slowest.iter().map(|one| one.count).sum();
            let (name, times) = (&slowest.name, slowest.count);
            writeln!(
                f,
                "slowest: {name}, {times} times of the {all} when one importer was waited for alone"
            )?;
        }
        let Starts { planned, begun, late } = self.starts;
        writeln!(
            f,
            "starts: {begun} of {planned}, by an open schedule; {late} late, because the one before had not ended, and {} never. \
             '{RESPONSE}' counts from when a start should have begun, '{SERVICE}' from when it did",
            planned - begun
        )?;
        if self.lost != Lost::default() {
            writeln!(
                f,
                "lost: {} records and {} sleeps, which are in no number above",
                self.lost.records, self.lost.waits
            )?;
        }
        write!(f, "{}", self.end)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// One of a run that was measured, in small.
    pub(in super::super) fn example() -> Report {
        let times = |name: &str, count: u64| Times {
            name: name.into(),
            count,
            min: 100,
            mean: 1000.5,
            p50: 1000,
            p90: 2000,
            p99: 3000,
            p999: 4000,
            max: 5000,
            over: vec![Ratio { floor: "kick".into(), ratio: 1.5 }],
            intervals: (0..4)
                .map(|n| Slice { at: n * 1_000_000, count: 9, p50: 1000 + n, p99: 3000, max: 5000 })
                .collect(),
            curve: CURVE
                .map(|quantile| Point { quantile, nanos: 1000 + (quantile * 4000.0) as u64 })
                .to_vec(),
        };
        let cause = |cause: &str| CauseReport {
            cause: cause.into(),
            invalidations: 36,
            rate: 9.0,
            pages: 36,
            skipped: 0,
            freed: 36,
            kicked: 3,
            told: 8,
            late: 0,
            failed: 0,
            failed_why: None,
            phases: ["gate", "unmap", "tell", "shootdown", "external", "finish", "total", "importers"]
                .map(|name| times(name, 36))
                .to_vec(),
        };
        Report {
            schema: SCHEMA,
            version: "1".into(),
            setting: Setting {
                guest: "touch".into(),
                backend: "soft".into(),
                shootdown: "kick".into(),
                vcpus: 2,
                mem: 64 << 20,
                causes: vec!["revoke".into()],
                rate: 1000,
                pages: 1,
                importers: vec![1, 8],
                ack_delay: 1_000_000,
                in_turn: false,
                stopped: false,
                untouched: true,
            },
            complete: true,
            end: "all of it was measured".into(),
            nanos: 4_000_000_000,
            starts: Starts { planned: 40, begun: 36, late: 1 },
            floors: vec![times("kick", 5)],
            causes: vec![cause("revoke")],
            told: vec![cause("told-1"), cause("told-8")],
            slowest: vec![times("importer 3", 8), times("importer 1", 2)],
            gate_sleeps: times("gate-sleep", 1),
            lost: Lost::default(),
            mmu: Vec::new(),
        }
    }

    #[test]
    fn words_name_the_slowest_importer_and_how_they_were_told() {
        let text = example().to_string();
        for part in [
            "importers in turn: 1, 8, answering after 1.00ms, all told and then all awaited, of pages that no vCPU touches",
            "slowest: importer 3, 8 times of the 10 when",
            "told-8",
            "1.50 x kick",
        ] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
    }
}
