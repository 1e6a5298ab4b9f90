//! `umbra measure`: what it counts is what the MMU counts, and its phases are parts of the whole. No time is judged.

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
        case("measure_refuses_what_makes_no_sense_before_the_run", &[], refused),
    ];
    [SOFT, KVM].into_iter().map(measured).chain(alone).collect()
}

fn measure(way: Way, options: &[&str]) -> Result<(Outcome, Value), Failed> {
    let folder = tempfile::tempdir()?;
    let json = folder.path().join("measured.json").to_string_lossy().into_owned();
    let times = ["--for", "600ms", "--warm-up", "100ms", "--json", &json];
    let run = umbra(["measure"].iter().chain(way.options).chain(&times).chain(options))?;
    let text = std::fs::read_to_string(json)?;
    Ok((run, serde_json::from_str(&text).unwrap_or(Value::Null)))
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

/// Each phase is a part of the total: in its mean, and in its longest but for the digits that a histogram keeps.
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
    let parts = [named("gate")?, named("unmap")?, named("shootdown")?, named("external")?, named("finish")?];
    for part in parts {
        ensure!(number(part, "count")? == number(cause, "invalidations")?, "not one for each: {cause:#}");
        ensure!(
            number(part, "max")? <= number(total, "max")?.next_multiple_of(2) * 1002 / 1000 + 2,
            "{part:#}"
        );
    }
    let sum: f64 = parts.into_iter().map(mean).sum();
    let fits = sum <= mean(total) * 1.01 + 10.0;
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

fn refused() -> Verdict {
    for options in [
        &["--causes", "discard", "--append", "workload=mm"][..],
        &["--causes", "discard,discard"],
        &["--causes", "revoke"],
        &["--rate", "0"],
        &["--rate", "100001/s"],
        &["--pages", "513"],
        &["--for", "10ms"],
        &["--mem", "2M"],
    ] {
        let run = umbra(["measure"].iter().chain(options))?;
        ensure!(run.end == status::USAGE, "{options:?}: expected {:?}:\n{run}", status::USAGE);
    }
    let nowhere = "/no/such/folder/measured.json";
    expect_sentence(&umbra(["measure", "--json", nowhere])?, &["--json", nowhere, "folder that exists"])
}
