//! Histograms of what was measured, by cause and phase: in all, and by interval.
//!
//! Story: records of the MMU and the clock's readings around each start come in as they are; at the end of an interval its
//! quantiles are kept, and its histograms added to those of the whole.
//!
//! Holds: memory is bounded: a histogram has a fixed number of buckets ([`DIGITS`] digits up to [`NANOS_MAX`]), there are as many as
//! there are causes and phases, and at most [`super::session::INTERVALS_MAX`] intervals.

use hdrhistogram::Histogram;
use umbra_mmu::records::{Cause, GateWait, Record, Taken};

use super::causes::Asked;

/// Digits that are kept of a time.
pub const DIGITS: u8 = 3;
/// The longest time that is told from longer ones, in nanoseconds: an hour.
pub const NANOS_MAX: u64 = 3600 * 1_000_000_000;

/// A part of an invalidation that has a time of its own.
#[derive(Debug)]
pub struct Phase {
    /// Its name in reports.
    pub name: &'static str,
    /// Its time, in nanoseconds.
    pub nanos: fn(&Record) -> u64,
}

/// The phases of an invalidation, in order; the last is all of it.
pub const PHASES: [Phase; 7] = [
    Phase { name: "gate", nanos: |record| record.gate },
    Phase { name: "unmap", nanos: |record| record.unmap },
    Phase { name: "tell", nanos: |record| record.tell },
    Phase { name: "shootdown", nanos: |record| record.shootdown },
    Phase { name: "external", nanos: |record| record.external },
    Phase { name: "finish", nanos: |record| record.finish },
    Phase { name: TOTAL, nanos: |record| record.total },
];

/// From the first phase to the gates' opening.
pub const TOTAL: &str = "total";
/// From a start's beginning to its end, giving frames back to the host and all.
pub const SERVICE: &str = "service";
/// From when it should have begun to its end.
pub const RESPONSE: &str = "response";
/// The total of those invalidations for which some vCPU had to be kicked.
pub const KICKED: &str = "kicked";
/// From the first importer's being told to the last one's answer, vCPUs flushing meanwhile; of those that had to be told.
pub const IMPORTERS: &str = "importers";
/// The group and the measure of a vCPU's sleeps at gates.
pub const VCPUS: &str = "vcpus";
/// See [`VCPUS`].
pub const GATE_SLEEP: &str = "gate-sleep";

/// Quantiles of an interval, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interval {
    /// When it began, in nanoseconds since the measurement did.
    pub at: u64,
    /// How long it was.
    pub lasted: u64,
    /// How many values it has.
    pub count: u64,
    /// The median.
    pub p50: u64,
    /// So many of a hundred were shorter.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

/// Times of one kind.
#[derive(Clone, Debug)]
pub struct Measure {
    /// Its name in reports.
    pub name: &'static str,
    /// All of them, but those of the interval that has not ended.
    pub all: Histogram<u64>,
    /// The intervals that have ended, in order.
    pub intervals: Vec<Interval>,
    now: Histogram<u64>,
}

/// An empty histogram.
fn histogram() -> Histogram<u64> {
    // The bounds are right by themselves; the fallback keeps this free of panics.
    let mut histogram = Histogram::new_with_bounds(1, 2 * 1024, DIGITS)
        .or_else(|_| Histogram::new(1))
        .unwrap_or_else(|error| unreachable!("{DIGITS} digits are possible: {error}"));
    histogram.auto(true);
    histogram
}

impl Measure {
    /// None yet.
    pub fn new(name: &'static str) -> Measure {
        Measure { name, all: histogram(), intervals: Vec::new(), now: histogram() }
    }

    /// One more, in nanoseconds.
    pub fn record(&mut self, nanos: u64) {
        // It grows as need be; saturating, it would not.
        let recorded = self.now.record(nanos.min(NANOS_MAX));
        debug_assert!(recorded.is_ok(), "{recorded:?}");
    }

    /// The interval ends: its histogram, if `keep` wants it.
    pub fn end_interval(&mut self, at: u64, lasted: u64, keep: impl FnOnce(&Histogram<u64>)) {
        let now = &self.now;
        self.intervals.push(Interval {
            at,
            lasted,
            count: now.len(),
            p50: now.value_at_quantile(0.5),
            p99: now.value_at_quantile(0.99),
            max: now.max(),
        });
        if !now.is_empty() {
            keep(now);
        }
        // It grows as need be, to the same bounds.
        let added = self.all.add(&self.now);
        debug_assert!(added.is_ok(), "{added:?}");
        self.now.reset();
    }
}

/// What a group of measures is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// Invalidations that a start of ours has made.
    Asked(Asked),
    /// Those that came by themselves.
    Other(Cause),
    /// The same that starts have made, by how many importers were told.
    Told(u32),
    /// vCPUs.
    Vcpus,
    /// What it could not do without.
    Floors,
}

impl By {
    /// Its name in reports and file names.
    pub fn name(self) -> String {
        match self {
            By::Asked(asked) => asked.name().into(),
            By::Other(cause) => format!("other-{}", cause.name()),
            By::Told(count) => format!("told-{count}"),
            By::Vcpus => VCPUS.into(),
            By::Floors => "floor".into(),
        }
    }
}

/// What the records of a group count together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Invalidations.
    pub invalidations: u64,
    /// Pages taken.
    pub pages: u64,
    /// Pages left alone.
    pub skipped: u64,
    /// Frames made free.
    pub freed: u64,
    /// Kicks.
    pub kicked: u64,
    /// Importers told.
    pub told: u64,
    /// Those of them that did not answer in their time.
    pub late: u64,
}

/// Measures of one cause, or of something else.
#[derive(Clone, Debug)]
pub struct Group {
    /// What it is of.
    pub by: By,
    /// What its records count.
    pub sums: Sums,
    /// Starts that could not have what they were to have, and why the last of them.
    pub failed: (u64, Option<&'static str>),
    /// The measures, in order.
    pub measures: Vec<Measure>,
}

impl Group {
    /// A group of these measures.
    pub fn new(by: By, names: &[&'static str]) -> Group {
        let measures = names.iter().map(|name| Measure::new(name)).collect();
        Group { by, sums: Sums::default(), failed: (0, None), measures }
    }

    /// The measure of that name.
    pub fn measure(&mut self, name: &str) -> Option<&mut Measure> {
        self.measures.iter_mut().find(|measure| measure.name == name)
    }

    fn add(&mut self, record: &Record) {
        let sums = &mut self.sums;
        sums.invalidations += 1;
        sums.pages += u64::from(record.pages);
        sums.skipped += u64::from(record.skipped);
        sums.freed += u64::from(record.freed);
        sums.kicked += u64::from(record.kicked);
        sums.told += u64::from(record.told);
        sums.late += u64::from(record.late);
        let outside = record.tell + record.shootdown + record.external;
        for (name, counts, nanos) in
            [(KICKED, record.kicked > 0, record.total), (IMPORTERS, record.told > 0, outside)]
        {
            if let Some(measure) = self.measure(name).filter(|_| counts) {
                measure.record(nanos);
            }
        }
        for (phase, measure) in PHASES.iter().zip(&mut self.measures) {
            measure.record((phase.nanos)(record));
        }
    }
}

/// A start that has ended. Times are in nanoseconds of the MMU's clock.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// What it was.
    pub asked: Asked,
    /// When it should have begun.
    pub intended: u64,
    /// When it did.
    pub began: u64,
    /// When it ended.
    pub ended: u64,
}

/// How often an importer was waited for when all others had answered, and how long importers took then, beyond the vCPUs.
#[derive(Clone, Debug)]
pub struct Slowest {
    /// Its number.
    pub importer: u32,
    /// The waits.
    pub waits: Measure,
}

/// All that was measured.
#[derive(Clone, Debug, Default)]
pub struct Collected {
    /// In the order in which they came first.
    pub groups: Vec<Group>,
    /// Importers that were the slowest of those told, where that is known.
    pub slowest: Vec<Slowest>,
    /// Records are counted by how many importers were told, too.
    pub by_told: bool,
    /// Records that were lost before they were taken.
    pub records_lost: u64,
    /// Waits at gates that were.
    pub waits_lost: u64,
}

impl Collected {
    /// The group, made if it is not there.
    pub fn group(&mut self, by: By) -> &mut Group {
        let at = self.groups.iter().position(|group| group.by == by).unwrap_or_else(|| {
            let phases = PHASES.iter().map(|phase| phase.name);
            let names: Vec<&'static str> = match by {
                By::Asked(_) => phases.chain([KICKED, IMPORTERS, SERVICE, RESPONSE]).collect(),
                By::Told(_) => phases.chain([KICKED, IMPORTERS]).collect(),
                By::Other(_) => phases.collect(),
                By::Vcpus => vec![GATE_SLEEP],
                By::Floors => Vec::new(),
            };
            self.groups.push(Group::new(by, &names));
            self.groups.len() - 1
        });
        &mut self.groups[at]
    }

    /// What the MMU has left since the last time. Records of `during`'s cause that began since it did are its own.
    pub fn take(&mut self, taken: &Taken, during: Option<&Ended>) {
        for record in &taken.records {
            let ours = during.filter(|one| one.asked.recorded() == record.cause && record.at >= one.began);
            let by = ours.map_or(By::Other(record.cause), |one| By::Asked(one.asked));
            self.group(by).add(record);
            if self.by_told && ours.is_some() {
                self.group(By::Told(record.told)).add(record);
                self.slowest(record);
            }
        }
        if !taken.waits.is_empty() {
            let sleeps = &mut self.group(By::Vcpus).measures[0];
            taken.waits.iter().for_each(|GateWait { nanos, .. }| sleeps.record(*nanos));
        }
        self.records_lost += taken.records_lost;
        self.waits_lost += taken.waits_lost;
    }

    fn slowest(&mut self, record: &Record) {
        let Some(importer) = record.slowest.map(|importer| importer.0) else { return };
        let at = self.slowest.iter().position(|one| one.importer == importer).unwrap_or_else(|| {
            self.slowest.push(Slowest { importer, waits: Measure::new("waited-for") });
            self.slowest.len() - 1
        });
        self.slowest[at].waits.record(record.external);
    }

    /// A start has ended.
    pub fn start(&mut self, one: &Ended, failed: Option<&'static str>) {
        let group = self.group(By::Asked(one.asked));
        if failed.is_some() {
            group.failed = (group.failed.0 + 1, failed);
        }
        for (name, since) in [(SERVICE, one.began), (RESPONSE, one.intended)] {
            if let Some(measure) = group.measure(name) {
                measure.record(one.ended.saturating_sub(since));
            }
        }
    }

    /// A floor was measured.
    pub fn floor(&mut self, name: &'static str, nanos: u64) {
        let group = self.group(By::Floors);
        if group.measure(name).is_none() {
            group.measures.push(Measure::new(name));
        }
        if let Some(measure) = group.measure(name) {
            measure.record(nanos);
        }
    }

    /// The interval ends; `keep` is shown each histogram that has something in it, with the name of its group.
    pub fn end_interval(&mut self, at: u64, lasted: u64, mut keep: impl FnMut(&str, &str, &Histogram<u64>)) {
        for group in &mut self.groups {
            let by = group.by.name();
            for measure in &mut group.measures {
                let name = measure.name;
                measure.end_interval(at, lasted, |histogram| keep(&by, name, histogram));
            }
        }
        for one in &mut self.slowest {
            let by = format!("importer-{}", one.importer);
            let name = one.waits.name;
            one.waits.end_interval(at, lasted, |histogram| keep(&by, name, histogram));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use umbra_mmu::Gfn;

    fn record(cause: Cause, at: u64, phases: [u64; 5]) -> Record {
        let [gate, unmap, shootdown, external, finish] = phases;
        let total = phases.iter().sum::<u64>() + 10;
        Record {
            at,
            pages: 2,
            freed: 2,
            kicked: 1,
            gate,
            unmap,
            shootdown,
            external,
            finish,
            total,
            ..Record::new(cause, &[Gfn(1), Gfn(2)])
        }
    }

    fn taken(records: Vec<Record>) -> Taken {
        Taken { records, ..Taken::default() }
    }

    #[test]
    fn phases_add_up_to_the_total_as_records_have_them() {
        let mut all = Collected::default();
        let start = Ended { asked: Asked::Discard, intended: 50, began: 100, ended: 400 };
        let records =
            (0..100).map(|n| record(Cause::Discard, 100 + n, [n, 2 * n, 3 * n, 4 * n, 5 * n])).collect();
        all.take(&taken(records), Some(&start));
        all.start(&start, None);
        all.end_interval(0, 1000, |_, _, _| ());
        let group = all.group(By::Asked(Asked::Discard)).clone();
        let names: Vec<_> = group.measures.iter().map(|measure| measure.name).collect();
        assert_eq!(
            names,
            [
                "gate",
                "unmap",
                "tell",
                "shootdown",
                "external",
                "finish",
                "total",
                "kicked",
                "importers",
                "service",
                "response"
            ]
        );
        let sum = |measure: &Measure| {
            measure.all.iter_recorded().map(|v| v.value_iterated_to() * v.count_at_value()).sum::<u64>()
        };
        let sums: Vec<u64> = group.measures.iter().map(sum).collect();
        assert_eq!(sums[..7], [4950, 9900, 0, 14850, 19800, 24750, 74250 + 1000]);
        assert_eq!(sums[7..], [75250, 0, 300, 350], "all were kicked, nobody was told");
        let counts = Sums { invalidations: 100, pages: 200, freed: 200, kicked: 100, ..Sums::default() };
        assert_eq!(group.sums, counts);
    }

    #[test]
    fn importers_are_counted_by_how_many_were_told_and_the_slowest_by_name() {
        let mut all = Collected { by_told: true, ..Collected::default() };
        let start = Ended { asked: Asked::Revoke, intended: 100, began: 100, ended: 400 };
        let told = |told, slowest: u32| Record {
            tell: 7,
            told,
            late: 1,
            slowest: Some(umbra_mmu::external::ImporterId(slowest)),
            kicked: 0,
            ..record(Cause::Revoke, 200, [1, 1, 10, 100, 1])
        };
        let alone = Record { kicked: 0, ..record(Cause::Revoke, 200, [1; 5]) };
        all.take(&taken(vec![told(2, 5), told(2, 5), told(4, 6), alone]), Some(&start));
        // What no start has made is nobody's.
        all.take(&taken(vec![told(8, 9)]), None);
        all.end_interval(0, 1000, |_, _, _| ());
        let mut count = |by, name| all.group(by).measure(name).map(|one| (one.all.len(), one.all.max()));
        assert_eq!(count(By::Asked(Asked::Revoke), IMPORTERS), Some((3, 117)));
        assert_eq!(count(By::Told(2), IMPORTERS), Some((2, 117)));
        assert_eq!(count(By::Told(0), IMPORTERS), Some((0, 0)));
        assert_eq!(count(By::Told(0), TOTAL).map(|one| one.0), Some(1));
        assert_eq!(count(By::Told(2), KICKED), Some((0, 0)));
        let sums = all.group(By::Told(2)).sums;
        assert_eq!((sums.told, sums.late), (4, 2));
        let slowest: Vec<_> = all.slowest.iter().map(|one| (one.importer, one.waits.all.len())).collect();
        assert_eq!(slowest, [(5, 2), (6, 1)]);
        assert!(!all.groups.iter().any(|group| group.by == By::Told(8)));
    }

    #[test]
    fn what_came_by_itself_is_not_taken_for_a_starts() {
        let mut all = Collected::default();
        let start = Ended { asked: Asked::Budget, intended: 100, began: 100, ended: 400 };
        let records = vec![
            record(Cause::Reclaim, 99, [1; 5]),
            record(Cause::Reclaim, 100, [1; 5]),
            record(Cause::Track, 200, [1; 5]),
        ];
        all.take(&taken(records), Some(&start));
        all.take(&taken(vec![record(Cause::Reclaim, 500, [1; 5])]), None);
        let count = |by| all.clone().group(by).sums.invalidations;
        assert_eq!(count(By::Asked(Asked::Budget)), 1);
        assert_eq!((count(By::Other(Cause::Reclaim)), count(By::Other(Cause::Track))), (2, 1));
    }

    #[test]
    fn intervals_come_to_the_whole_and_are_kept_by_their_quantiles() {
        let mut measure = Measure::new("x");
        for interval in 1..=3 {
            (0..100).for_each(|n| measure.record(interval * 1000 + n));
            let mut kept = 0;
            measure.end_interval(interval, 1, |histogram| kept = histogram.len());
            assert_eq!(kept, 100);
        }
        measure.end_interval(4, 1, |_| panic!("nothing was in it"));
        assert_eq!(measure.all.len(), 300);
        let medians: Vec<u64> = measure.intervals.iter().map(|interval| interval.p50).collect();
        assert_eq!(medians, [1049, 2049, 3049, 0]);
    }

    #[test]
    fn a_time_beyond_all_bounds_is_the_longest_there_is_and_costs_no_memory() {
        let mut measure = Measure::new("x");
        [0, 1, u64::MAX].into_iter().for_each(|nanos| measure.record(nanos));
        measure.end_interval(0, 1, |_| ());
        let max = measure.all.max();
        assert!(measure.all.equivalent(max, NANOS_MAX), "{max}");
        assert!(measure.all.distinct_values() < 64 << 10, "{} buckets", measure.all.distinct_values());
    }
}
