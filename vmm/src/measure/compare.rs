//! Two measurements beside each other: `umbra measure --compare A.json B.json`.
//!
//! Story: for each group and measure that both have, the ratio of B to A, by percentile, and whether it is more than noise. What noise
//! is, each run says itself: the medians of its intervals lie in a band, and where the bands of both overlap, their difference is
//! not told from the machine's having been busy.
//!
//! Limits: a file has at most 64 MiB. A band is of the median; the other percentiles have their ratios without a judgement.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use super::files::FileError;
use super::report::{Report, SCHEMA, Setting, Times, show};

/// The longest file that is read.
const BYTES_MAX: u64 = 64 << 20;
/// Intervals that a band needs.
const INTERVALS_MIN: usize = 3;
const READ: &str = "name a file that umbra measure --json has left";

/// Reads a report.
///
/// # Errors
///
/// When there is none, or it is not one that this Umbra knows.
pub fn read(path: &Path) -> Result<Report, FileError> {
    let failed = |source| FileError::new("--compare", path, READ, source);
    let mut text = String::new();
    File::open(path).and_then(|file| file.take(BYTES_MAX + 1).read_to_string(&mut text)).map_err(failed)?;
    parse(&text).map_err(|why| failed(io::Error::new(io::ErrorKind::InvalidData, why)))
}

fn parse(text: &str) -> Result<Report, String> {
    if text.len() as u64 > BYTES_MAX {
        return Err(format!("it is longer than {BYTES_MAX} bytes"));
    }
    let value: serde_json::Value =
        serde_json::from_str(text).map_err(|error| format!("it is no JSON: {error}"))?;
    match value.get("schema").map(|schema| schema.as_u64()) {
        Some(Some(schema)) if schema == u64::from(SCHEMA) => {}
        Some(schema) => {
            let found = schema.map_or("something else".into(), |schema| schema.to_string());
            return Err(format!("its schema is {found}, and this Umbra knows {SCHEMA}"));
        }
        None => return Err("it has no schema".into()),
    }
    serde_json::from_value(value).map_err(|error| format!("it is no measurement: {error}"))
}

/// What is said of a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The medians of the intervals of both overlap.
    Noise,
    /// All of B's are shorter than all of A's.
    Shorter,
    /// All of B's are longer.
    Longer,
    /// Too few intervals to say.
    Unknown,
}

/// A measure of both.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its group.
    pub group: String,
    /// Its name.
    pub name: String,
    /// The medians, in nanoseconds.
    pub medians: (u64, u64),
    /// B over A: p50, p90, p99, p99.9, max; `None` where A has 0.
    pub ratios: [Option<f64>; 5],
    /// Is it more than noise?
    pub verdict: Verdict,
}

/// Two runs beside each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// What differs in what was asked for: what, in A, in B.
    pub setting: Vec<(&'static str, String, String)>,
    /// Those that both have.
    pub rows: Vec<Row>,
    /// Those that one has: which, and who.
    pub only: Vec<(String, &'static str)>,
    /// A run that is not whole: which, and how it ended.
    pub broken: Vec<(&'static str, String)>,
}

impl Comparison {
    /// `second` against `first`.
    pub fn new(first: &Report, second: &Report) -> Comparison {
        let (a, b) = (measures(first), measures(second));
        let in_both = a.iter().filter_map(|(name, times)| {
            let (_, other) = b.iter().find(|(other, _)| other == name)?;
            Some(Row::of(name, times, other))
        });
        let rows = in_both.collect();
        let lacks = |of: &[Named<'_>], name: &Name| !of.iter().any(|(other, _)| other == name);
        let only_a = a.iter().filter(|(name, _)| lacks(&b, name)).map(|(name, _)| (name, "A"));
        let only_b = b.iter().filter(|(name, _)| lacks(&a, name)).map(|(name, _)| (name, "B"));
        let only =
            only_a.chain(only_b).map(|((group, name), who)| (format!("{group} {name}"), who)).collect();
        let broken = [("A", first), ("B", second)];
        let broken = broken.into_iter().filter(|(_, run)| !run.complete);
        Comparison {
            setting: differences(first, second),
            rows,
            only,
            broken: broken.map(|(which, run)| (which, run.end.clone())).collect(),
        }
    }
}

type Name = (String, String);
type Named<'a> = (Name, &'a Times);

/// All that was measured, by group and name.
fn measures(run: &Report) -> Vec<Named<'_>> {
    let of_groups = run.causes.iter().chain(&run.told).flat_map(|cause| {
        cause.phases.iter().map(|times| ((cause.cause.clone(), times.name.clone()), times))
    });
    let named = |group: &'static str| move |times| (group, times);
    let others = run.floors.iter().map(named("floor")).chain([("vcpus", &run.gate_sleeps)]);
    let others = others.map(|(group, times): (&str, &Times)| ((group.into(), times.name.clone()), times));
    of_groups.chain(others).filter(|(_, times)| times.count > 0).collect()
}

fn differences(first: &Report, second: &Report) -> Vec<(&'static str, String, String)> {
    let list = |list: &[String]| list.join(",");
    let fields = |run: &Report| {
        let Setting { guest, backend, shootdown, vcpus, mem, causes, rate, pages, .. } = &run.setting;
        [
            ("version", run.version.clone()),
            ("guest", guest.clone()),
            ("backend", backend.clone()),
            ("shootdown", shootdown.clone()),
            ("vcpus", vcpus.to_string()),
            ("mem", mem.to_string()),
            ("causes", list(causes)),
            ("rate", format!("{rate}/s")),
            ("pages", pages.to_string()),
            (
                "importers",
                if run.setting.importers.is_empty() { "none".into() } else { run.setting.of_importers() },
            ),
        ]
    };
    let pairs = fields(first).into_iter().zip(fields(second));
    pairs.filter(|((_, a), (_, b))| a != b).map(|((name, a), (_, b))| (name, a, b)).collect()
}

impl Row {
    fn of((group, name): &Name, a: &Times, b: &Times) -> Row {
        let ratio = |of: fn(&Times) -> u64| (of(a) > 0).then(|| of(b) as f64 / of(a) as f64);
        Row {
            group: group.clone(),
            name: name.clone(),
            medians: (a.p50, b.p50),
            ratios: [
                ratio(|times| times.p50),
                ratio(|times| times.p90),
                ratio(|times| times.p99),
                ratio(|times| times.p999),
                ratio(|times| times.max),
            ],
            verdict: judge(a, b),
        }
    }
}

/// The least and the greatest median of an interval, where there are enough.
fn band(times: &Times) -> Option<(u64, u64)> {
    let medians = || times.intervals.iter().map(|interval| interval.p50);
    let enough = times.intervals.len() >= INTERVALS_MIN;
    enough.then(|| medians().min().zip(medians().max())).flatten()
}

fn judge(a: &Times, b: &Times) -> Verdict {
    match (band(a), band(b)) {
        (Some(a), Some(b)) if b.1 < a.0 => Verdict::Shorter,
        (Some(a), Some(b)) if b.0 > a.1 => Verdict::Longer,
        (Some(_), Some(_)) => Verdict::Noise,
        _ => Verdict::Unknown,
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (which, end) in &self.broken {
            writeln!(f, "{which} is not whole: {end}")?;
        }
        if self.setting.is_empty() {
            writeln!(f, "both were asked for the same")?;
        }
        for (name, a, b) in &self.setting {
            writeln!(f, "{name}: A {a}, B {b}")?;
        }
        writeln!(
            f,
            "{:<20} {:<18} {:>9} {:>9} {:>7} {:>7} {:>7} {:>7} {:>7}  B against A",
            "group", "measure", "A's p50", "B's p50", "p50", "p90", "p99", "p99.9", "max"
        )?;
        for row in &self.rows {
            let [p50, p90, p99, p999, max] =
                row.ratios.map(|ratio| ratio.map_or("-".into(), |ratio| format!("{ratio:.2}x")));
            let verdict = match row.verdict {
                Verdict::Noise => "within noise",
                Verdict::Shorter => "shorter",
                Verdict::Longer => "longer",
                Verdict::Unknown => "too few intervals",
            };
            writeln!(
                f,
                "{:<20} {:<18} {:>9} {:>9} {p50:>7} {p90:>7} {p99:>7} {p999:>7} {max:>7}  {verdict}",
                row.group,
                row.name,
                show(row.medians.0),
                show(row.medians.1)
            )?;
        }
        if self.rows.is_empty() {
            writeln!(f, "they have nothing in common")?;
        }
        self.only.iter().try_for_each(|(name, who)| writeln!(f, "only {who} has {name}"))?;
        writeln!(
            f,
            "noise: the medians of the intervals of both runs overlap; it is judged by the median alone"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Slice;
    use super::super::report::tests::example;
    use super::*;

    /// With its service's intervals having these medians.
    fn with(medians: &[u64]) -> Report {
        let mut run = example();
        let times = &mut run.causes[0].phases[0];
        times.p50 = medians[0];
        times.intervals =
            medians.iter().map(|p50| Slice { p50: *p50, count: 9, ..Slice::default() }).collect();
        run
    }

    #[test]
    fn bands_of_medians_tell_a_difference_from_noise() {
        let verdict = |a: &[u64], b: &[u64]| Comparison::new(&with(a), &with(b)).rows[0].verdict;
        assert_eq!(verdict(&[100, 110, 120], &[115, 130, 140]), Verdict::Noise);
        assert_eq!(verdict(&[100, 110, 120], &[121, 130, 140]), Verdict::Longer);
        assert_eq!(verdict(&[100, 110, 120], &[80, 90, 99]), Verdict::Shorter);
        assert_eq!(verdict(&[100, 110], &[1, 1, 1]), Verdict::Unknown);
    }

    #[test]
    fn ratios_are_of_b_over_a_and_what_one_lacks_is_said() {
        let (a, mut b) = (with(&[100, 100, 100]), with(&[250, 250, 250]));
        b.setting.rate = 5;
        b.complete = false;
        b.floors.clear();
        let comparison = Comparison::new(&a, &b);
        assert_eq!(comparison.rows[0].ratios[0], Some(2.5));
        let text = comparison.to_string();
        for part in ["2.50x", "longer", "rate: A 1000/s, B 5/s", "B is not whole", "only A has floor kick"] {
            assert!(text.contains(part), "{part}:\n{text}");
        }
        assert!(Comparison::new(&a, &a).to_string().contains("asked for the same"));
    }

    #[test]
    fn what_was_written_is_read_and_garbage_is_refused_in_a_sentence() {
        let text = serde_json::to_string(&example()).expect("JSON");
        assert_eq!(parse(&text), Ok(example()));
        let newer = text.replacen("\"schema\":1", "\"schema\":77", 1);
        for (garbage, why) in [
            ("", "no JSON"),
            ("\u{0}\u{1}", "no JSON"),
            (&"[".repeat(100_000), "no JSON"),
            ("[]", "no schema"),
            ("{\"schema\": 1}", "no measurement"),
            ("{\"schema\": \"x\"}", "something else"),
            ("{\"schema\": 1, \"version\": 5}", "no measurement"),
            (newer.as_str(), "schema is 77"),
        ] {
            let refused = parse(garbage).expect_err("garbage");
            assert!(refused.contains(why), "{why}: {refused}");
        }
        let error = read(Path::new("/no/such.json")).expect_err("no file");
        assert!(error.to_string().contains("--compare /no/such.json"), "{error}");
    }
}
