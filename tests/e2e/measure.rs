//! `umbra measure`: what it counts is what the MMU counts, and its phases are parts of the whole. No time is judged.

use std::collections::BTreeMap;
use std::fs;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::Deserializer;
use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
use libtest_mimic::{Failed, Trial};
use serde_json::Value;

use super::umbra::{KVM, SOFT, Way, expect_sentence, status, umbra};
use crate::ensure;
use crate::support::process::{End, Outcome};
use crate::support::{Verdict, case};

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let measured = |way: Way| {
        case(format!("{}_measure_counts_what_the_mmu_counts", way.name), way.needs, move || counts(way))
    };
    let alone = [
        case("measure_of_another_guest_takes_no_contents", &[], other_guest),
        case("measure_of_importers_is_the_same_in_every_file", &[], importers),
        case("measure_starts_as_often_as_its_rate_says", &[], rates),
        case("measure_of_stopped_importers_takes_their_deadline", &[], stopped),
        case("measure_of_importers_that_are_late_says_so", &[], late),
        case("measure_of_a_halted_guest_has_nobody_to_kick", &[], halted),
        case("measure_refuses_what_makes_no_sense_before_the_run", &[], refused),
    ];
    [SOFT, KVM].into_iter().map(measured).chain(alone).collect()
}

fn measure(way: Way, options: &[&str]) -> Result<(Outcome, Value), Failed> {
    let folder = tempfile::tempdir()?;
    let json = folder.path().join("measured.json").to_string_lossy().into_owned();
    let lasts = if options.contains(&"--for") { &[][..] } else { &["--for", "600ms"] };
    let times = ["--warm-up", "100ms", "--json", &json];
    let run = umbra(["measure"].iter().chain(way.options).chain(&times).chain(lasts).chain(options))?;
    let text = std::fs::read_to_string(json)?;
    Ok((run, serde_json::from_str(&text).unwrap_or(Value::Null)))
}

/// The same, with importers that have so long to answer.
fn measure_importers(options: &[&str], deadline: &str) -> Result<(Outcome, Value), Failed> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("export").to_string_lossy().into_owned();
    measure(SOFT, &[options, &["--export", &socket, "--export-deadline", deadline]].concat())
}

fn number(value: &Value, field: &str) -> Result<u64, Failed> {
    value[field].as_u64().ok_or_else(|| format!("no {field} in {value:#}").into())
}

fn list<'a>(value: &'a Value, field: &str) -> Result<&'a Vec<Value>, Failed> {
    value[field].as_array().ok_or_else(|| format!("no {field} in {value:#}").into())
}

fn counts(way: Way) -> Verdict {
    let options = ["--causes", "discard,page-out,balloon", "--rate", "200/s", "--pages", "2"];
    let (run, report) = measure(way, &options)?;
    ensure!(run.end == End::Status(0), "expected 0:\n{run}");
    ensure!(run.stderr.contains("open schedule"), "coordinated omission is not said:\n{run}");
    check_sums(&report)?;
    for cause in list(&report, "causes")? {
        check_phases(cause)?;
    }
    let floors: Vec<_> = list(&report, "floors")?.iter().filter_map(|floor| floor["name"].as_str()).collect();
    ensure!(floors.contains(&"punch"), "floors: {floors:?}");
    for cause in ["discard", "page-out", "balloon"] {
        let found = list(&report, "causes")?.iter().find(|one| one["cause"] == cause);
        let count = found.map_or(Ok(0), |one| number(one, "invalidations"))?;
        ensure!(count > 0, "no {cause}: {report:#}");
    }
    Ok(())
}

/// All causes, and what was lost, come to the MMU's own totals.
fn check_sums(report: &Value) -> Verdict {
    let sum = |name: &str, field| {
        list(report, name)?.iter().map(|one| number(one, field)).sum::<Result<u64, Failed>>()
    };
    let lost = number(&report["lost"], "records")?;
    ensure!(lost == 0, "{lost} records are lost: {report:#}");
    for (ours, theirs) in [("invalidations", "count"), ("pages", "pages"), ("kicked", "kicked")] {
        let (ours, theirs) = (sum("causes", ours)?, sum("mmu", theirs)?);
        ensure!(ours == theirs, "{ours}, and the MMU has {theirs}: {report:#}");
    }
    let starts = &report["starts"];
    ensure!(number(starts, "begun")? <= number(starts, "planned")?, "{starts}");
    Ok(())
}

/// Phases are the parts of the total: all of it, and none is longer, but for the digits that a histogram keeps.
fn check_phases(cause: &Value) -> Verdict {
    let phases = list(cause, "phases")?;
    let named = |name: &str| {
        phases
            .iter()
            .find(|phase| phase["name"] == name)
            .ok_or_else(|| Failed::from(format!("no {name} in {cause:#}")))
    };
    let mean = |phase: &Value| phase["mean"].as_f64().unwrap_or(f64::NAN);
    let total = named("total")?;
    let names = ["gate", "unmap", "tell", "shootdown", "external", "finish"];
    let parts = names.into_iter().map(named).collect::<Result<Vec<_>, _>>()?;
    for part in &parts {
        ensure!(number(part, "count")? == number(cause, "invalidations")?, "not one for each: {cause:#}");
        ensure!(
            number(part, "max")? <= number(total, "max")?.next_multiple_of(2) * 1002 / 1000 + 2,
            "{part:#}"
        );
    }
    let sum: f64 = parts.into_iter().map(mean).sum();
    let fits = (mean(total) * 0.99 - 10.0..=mean(total) * 1.01 + 10.0).contains(&sum);
    ensure!(fits, "the parts come to {sum}: {cause:#}");
    Ok(())
}

fn other_guest() -> Verdict {
    let (run, report) = measure(SOFT, &["--append", "workload=kmap scale=4000", "--rate", "200/s"])?;
    ensure!(!list(&report, "causes")?.is_empty(), "nothing was measured:\n{run}");
    let taken = list(&report, "causes")?.iter().any(|one| one["cause"] == "discard");
    ensure!(!taken, "contents were taken from a guest that may want them: {report:#}");
    check_sums(&report)
}

/// Rates that no interval is a multiple of, and one start for each time that importers have all pages.
fn rates() -> Verdict {
    for (options, planned) in [
        (&["--rate", "1/s", "--for", "2s"][..], 2),
        (&["--rate", "7/s", "--for", "1s"], 7),
        (&["--rate", "3/s", "--for", "500ms"], 2),
        (&["--importers", "1", "--pages", "512", "--rate", "301/s", "--for", "200ms"], 61),
    ] {
        let (run, report) = measure(SOFT, options)?;
        ensure!(run.end == End::Status(0), "{options:?}: expected 0:\n{run}");
        let starts = number(&report["starts"], "planned")?;
        ensure!(starts == planned, "{options:?}: {starts} starts, not {planned}");
        let taken = list(&report, "causes")?.iter().find(|one| one["cause"] == "discard");
        let taken = taken.map_or(Ok(0), |one| number(one, "invalidations"))?;
        ensure!(taken > 0, "{options:?}: nothing was taken");
    }
    Ok(())
}

/// Two importers have half of the pages that are taken.
fn importers() -> Verdict {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (page, files, kept) = (path("measured.html"), path("files"), path("kept.json"));
    let files_of = ["--html", &page, "--hgrm", &files];
    let (run, report) =
        measure_importers(&[&["--importers", "0,2", "--rate", "200/s"], &files_of[..]].concat(), "60s")?;
    ensure!(run.end == End::Status(0), "expected 0:\n{run}");
    check_sums(&report)?;
    for (name, importers) in [("told-0", 0), ("told-2", 2)] {
        let group = list(&report, "told")?.iter().find(|one| one["cause"] == name);
        let group = group.ok_or_else(|| format!("no {name} in {report:#}"))?;
        let invalidations = number(group, "invalidations")?;
        ensure!(invalidations > 0 && number(group, "told")? == importers * invalidations, "{group:#}");
    }
    let page = fs::read_to_string(page)?;
    ensure!(page.contains("<svg") && page.contains("told-2"), "nothing is drawn");
    ensure!(!page.contains("src=") && !page.contains("@import"), "the page fetches");
    let mut logged = logged(&fs::read(format!("{files}/intervals.hlog"))?)?;
    for groups in ["causes", "told"] {
        for group in list(&report, groups)? {
            for phase in list(group, "phases")? {
                let of = (group["cause"].as_str(), phase["name"].as_str(), number(phase, "count")?);
                let (Some(group), Some(phase), count) = of else { return Err("no names".into()) };
                if count == 0 {
                    continue;
                }
                let distribution = fs::read_to_string(format!("{files}/{group}.{phase}.hgrm"))?;
                let total = distribution.split("Total count    =").nth(1).map(|rest| rest.replace(']', ""));
                let total = total.and_then(|rest| rest.lines().next()?.trim().parse().ok());
                ensure!(total == Some(count), "{group}.{phase}.hgrm has {total:?}, not {count}");
                let log = logged.remove(&format!("{group}.{phase}"));
                ensure!(log == Some(count), "intervals.hlog has {log:?} of {group}.{phase}, not {count}");
            }
        }
    }
    fs::write(&kept, report.to_string())?;
    let compared = umbra(["measure", "--compare", &kept, &kept])?;
    ensure!(compared.end == End::Status(0), "expected 0:\n{compared}");
    let said = format!("{}{}", String::from_utf8_lossy(&compared.stdout), compared.stderr);
    let rows: Vec<_> = said.lines().filter(|line| line.starts_with("told-2 ")).collect();
    ensure!(said.contains("asked for the same") && rows.len() > 5, "{compared}");
    ensure!(rows.iter().all(|row| row.contains("1.00x") && !row.contains("1.01x")), "{compared}");
    Ok(())
}

/// By tag: how many values an interval log has, as HdrHistogram's own reader has it.
fn logged(log: &[u8]) -> Result<BTreeMap<String, u64>, Failed> {
    let mut counts = BTreeMap::new();
    for entry in IntervalLogIterator::new(log) {
        let entry = entry.map_err(|why| format!("intervals.hlog: {why:?}"))?;
        if let LogEntry::Interval(one) = entry {
            let bytes = STANDARD.decode(one.encoded_histogram())?;
            let histogram: Histogram<u64> = Deserializer::new()
                .deserialize(&mut &bytes[..])
                .map_err(|why| format!("intervals.hlog: {why:?}"))?;
            let tag = one.tag().map(|tag| tag.as_str().to_owned()).unwrap_or_default();
            *counts.entry(tag).or_default() += histogram.len();
        }
    }
    Ok(counts)
}

fn stopped() -> Verdict {
    const DEADLINE: u64 = 20_000_000;
    let (run, report) = measure_importers(
        &["--importers", "2", "--stop-importers", "--untouched", "--rate", "20/s", "--causes", "discard"],
        "20ms",
    )?;
    ensure!(run.end == End::Status(0), "expected 0:\n{run}");
    let [group] = &list(&report, "told")?[..] else { return Err(format!("{report:#}").into()) };
    let told = number(group, "told")?;
    ensure!(told >= 2 && number(group, "late")? == told, "who is stopped has answered: {group:#}");
    let phase = list(group, "phases")?.iter().find(|phase| phase["name"] == "importers");
    let phase = phase.ok_or_else(|| format!("no importers in {group:#}"))?;
    // A histogram keeps three digits.
    ensure!(number(phase, "min")? >= DEADLINE * 999 / 1000, "they were not given their time: {phase:#}");
    Ok(())
}

fn late() -> Verdict {
    let options = ["--importers", "1", "--untouched", "--ack-delay", "100ms", "--causes", "discard"];
    let (run, _) = measure_importers(&options, "5ms")?;
    ensure!(run.end == End::Status(6), "expected 6:\n{run}");
    ensure!(
        run.stderr.contains("did not come within 5ms, and who is late is parted with"),
        "not why:\n{run}"
    );
    Ok(())
}

/// The bare kick is measured where a vCPU runs, and not where all halt: there is nobody to kick.
fn halted() -> Verdict {
    for (more, runs) in [(&["--halted"][..], false), (&[], true)] {
        let options = [&["--importers", "1", "--untouched", "--causes", "discard"], more].concat();
        let (run, report) = measure(SOFT, &options)?;
        ensure!(run.end == End::Status(0), "{more:?}: expected 0:\n{run}");
        let discards = list(&report, "causes")?.iter().find(|cause| cause["cause"] == "discard");
        let taken = discards.map_or(Ok(0), |cause| number(cause, "invalidations"))?;
        let kicked = list(&report, "floors")?.iter().any(|floor| floor["name"] == "kick");
        ensure!(taken > 0 && kicked == runs, "{more:?}: {taken} pages taken, somebody was kicked: {kicked}");
    }
    Ok(())
}

fn refused() -> Verdict {
    for options in [
        &["--causes", "discard", "--append", "workload=mm"][..],
        &["--causes", "discard,discard"],
        &["--causes", "revoke"],
        &["--importers", "1", "--halted"],
        &["--rate", "0"],
        &["--rate", "100001/s"],
        &["--pages", "513"],
        &["--for", "10ms"],
        &["--mem", "2M"],
        &["--deterministic"],
    ] {
        let run = umbra(["measure"].iter().chain(options))?;
        ensure!(run.end == status::USAGE, "{options:?}: expected {:?}:\n{run}", status::USAGE);
    }
    let nowhere = "/no/such/folder/measured.json";
    expect_sentence(&umbra(["measure", "--json", nowhere])?, &["--json", nowhere, "folder that exists"])?;
    let one = tempfile::NamedTempFile::new()?;
    let path = one.path().to_str().ok_or("a name that is not UTF-8")?;
    let twice = umbra(["measure", "--json", path, "--html", path])?;
    expect_sentence(&twice, &["--html", path, "another option"])
}
