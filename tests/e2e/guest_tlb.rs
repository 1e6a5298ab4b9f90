//! `--check-guest-tlb`: each flush that the guest's kernel makes is left out, one at a time, and caught; with none left out nothing is.
//!
//! Story: guest/src/kernel/omit.h names the flushes. For each there is a run here in which it matters. It is caught as *certain* (status
//! 18), as *suspect* (the summary counts it), or by the *guest* itself, whose own checks fail. docs/GUEST-RULES.md is the table in
//! print. Limits: with several vCPUs it is the host's scheduling that decides whether a flush matters in a run, and so between the
//! classes: such a run is tried with one seed after the other until something is caught.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use libtest_mimic::{Failed, Trial};
use umbra::scenario::guest_rules::{FLUSHES, Flush};

use super::umbra::{SOFT, SOFT_STICKY, Way, status};
use crate::ensure;
use crate::support::process::{End, Outcome};
use crate::support::{Verdict, case};

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let mut trials = vec![
        case("guest_omission_of_each_flush_is_caught", &[], each_is_caught),
        case("guest_rules_in_print_are_those_of_the_kernel", &[], in_print),
        case("guest_check_needs_the_soft_backend", &[], needs_soft),
    ];
    for (number, run) in CLEAN.into_iter().enumerate() {
        trials.push(case(format!("guest_without_omission_is_clean_{number}"), &[], move || clean(&run)));
    }
    trials
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Certain,
    Suspect,
    Guest,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Class::Certain => "certain",
            Class::Suspect => "suspect",
            Class::Guest => "guest",
        })
    }
}

/// How often a run with several vCPUs is tried.
const SEEDS: u32 = 20;
const SHOOT: &str = "workload=shoot scale=20";
const ACCESS: &str = "workload=access scale=2";

fn check(way: Way, vcpus: u32, append: &str, options: &[&str]) -> Result<Outcome, Failed> {
    let vcpus = vcpus.to_string();
    way.run(&[&["--check-guest-tlb", "--vcpus", &vcpus, "--append", append], options].concat())
}

/// Suspects of the summary: frames, rights, accessed or dirty bits, tables, pointers.
fn suspects(run: &Outcome) -> Result<Vec<u64>, Failed> {
    let line = run.stderr.lines().find_map(|line| line.split_once("guest TLB: ")?.1.split_once("suspect "));
    let (_, counts) = line.ok_or_else(|| format!("no line of the guest's TLB:\n{run}"))?;
    let numbers = counts.split('=').skip(1).map(|part| part.split(' ').next().unwrap_or_default().parse());
    Ok(numbers.collect::<Result<_, _>>()?)
}

/// All ways in which a run has caught something.
fn caught(run: &Outcome) -> Result<BTreeSet<Class>, Failed> {
    let mut classes = BTreeSet::new();
    if run.end == status::GUEST_TLB {
        let report = ["(certain)", "edit: entry at", "since then: ", "missing flush: "];
        ensure!(report.iter().all(|part| run.stderr.contains(part)), "the report lacks a part:\n{run}");
        classes.insert(Class::Certain);
    }
    if suspects(run)?.iter().any(|count| *count > 0) {
        classes.insert(Class::Suspect);
    }
    // A check that fails, a panic, or worse.
    if run.end == status::RESET || matches!(run.end, End::Status(code) if code % 2 == 1) {
        classes.insert(Class::Guest);
    }
    Ok(classes)
}

/// As what it was caught, and in how many seconds.
fn try_one(omission: &Flush) -> Result<(BTreeSet<Class>, f64), Failed> {
    let begun = Instant::now();
    let seeds = if omission.vcpus == 1 { 1 } else { SEEDS };
    let mut classes = BTreeSet::new();
    for seed in 1..=seeds {
        let append = format!("{} omit={} seed={seed}", omission.append, omission.name);
        classes = caught(&check(SOFT_STICKY, omission.vcpus, &append, &["--timeout", "10s"])?)?;
        if !classes.is_empty() {
            break;
        }
    }
    Ok((classes, begun.elapsed().as_secs_f64()))
}

/// Two at a time.
fn each_is_caught() -> Verdict {
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(omission) = FLUSHES.get(next.fetch_add(1, Ordering::Relaxed)) {
            let result = try_one(omission);
            results.lock().unwrap_or_else(PoisonError::into_inner).push((omission.name, result));
        }
    };
    thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("| flush left out | run | caught as | seconds |\n|---|---|---|---|");
    let mut missed = Vec::new();
    for omission in FLUSHES {
        let Some((_, result)) = results.iter().find(|(name, _)| *name == omission.name) else { continue };
        let (classes, took) = match result {
            Ok((classes, took)) => (classes, *took),
            Err(why) => {
                return Err(format!("{}: {}", omission.name, why.message().unwrap_or_default()).into());
            }
        };
        let names: Vec<_> = classes.iter().map(ToString::to_string).collect();
        let Flush { name, vcpus, append, .. } = omission;
        let by = if names.is_empty() { "MISSED".to_owned() } else { names.join(", ") };
        println!("| `{name}` | `--vcpus {vcpus}`, `{append}` | {by} | {took:.1} |");
        if names.is_empty() {
            missed.push(*name);
        }
    }
    ensure!(missed.is_empty() && results.len() == FLUSHES.len(), "not caught: {missed:?}");
    Ok(())
}

/// A run without omission.
#[derive(Clone, Copy)]
struct Clean {
    way: Way,
    vcpus: u32,
    append: &'static str,
    options: &'static [&'static str],
    /// Reclaim ages pages of CPUs that are anywhere: such suspects are counted, and may be.
    ages: bool,
}

const fn of(way: Way, vcpus: u32, append: &'static str) -> Clean {
    Clean { way, vcpus, append, options: &[], ages: false }
}

const PRESSED: &[&str] = &["--frames", "5M", "--low", "2M"];

const CLEAN: [Clean; 14] = [
    of(SOFT_STICKY, 1, "workload=kmap"),
    of(SOFT_STICKY, 2, "workload=kmap"),
    of(SOFT, 4, "workload=kmap paging=legacy"),
    of(SOFT_STICKY, 1, SHOOT),
    of(SOFT_STICKY, 3, SHOOT),
    of(SOFT_STICKY, 1, "workload=age"),
    of(SOFT_STICKY, 2, "workload=age"),
    of(SOFT, 4, "workload=age paging=legacy"),
    of(SOFT_STICKY, 2, "workload=mm"),
    of(SOFT, 1, "workload=mm paging=legacy"),
    of(SOFT_STICKY, 1, ACCESS),
    of(SOFT_STICKY, 1, "workload=storm scale=1"),
    Clean { options: PRESSED, ..of(SOFT_STICKY, 2, "workload=mm") },
    Clean { ages: true, ..of(SOFT_STICKY, 2, "workload=reclaim scale=1 pace=slow") },
];

fn clean(clean: &Clean) -> Verdict {
    let run = check(clean.way, clean.vcpus, clean.append, clean.options)?;
    ensure!(run.end == End::Status(0), "the guest did not pass:\n{run}");
    let suspects = suspects(&run)?;
    println!("--vcpus {} {}: suspects {suspects:?}", clean.vcpus, clean.append);
    let others =
        suspects.iter().enumerate().filter(|(sort, count)| **count > 0 && !(clean.ages && *sort == 2));
    ensure!(others.count() == 0, "suspects in a guest that leaves nothing out:\n{run}");
    Ok(())
}

fn needs_soft() -> Verdict {
    let run = super::umbra::umbra(["run", "--backend", "kvm", "--check-guest-tlb"])?;
    ensure!(
        run.end == status::OPERATOR && run.stderr.contains("use --backend soft"),
        "expected a refusal:\n{run}"
    );
    Ok(())
}

/// Names and purposes, as omit.h has them.
fn of_the_kernel() -> Result<Vec<(String, String)>, Failed> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest/src/kernel/omit.h");
    let text = std::fs::read_to_string(path)?;
    let rows = text.lines().filter_map(|line| line.trim().strip_prefix("X(")?.split_once(", \""));
    let row = |(_, rest): (&str, &str)| {
        let (name, rest) = rest.split_once("\", \"")?;
        Some((name.to_owned(), rest.split_once('"')?.0.to_owned()))
    };
    Ok(rows.filter_map(row).collect())
}

fn in_print() -> Verdict {
    let rules = of_the_kernel()?;
    let ours: Vec<_> = FLUSHES.iter().map(|flush| (flush.name.to_owned(), flush.what.to_owned())).collect();
    ensure!(rules == ours, "omit.h has {rules:?}, and Umbra {ours:?}");
    let mut text = String::from(
        "# The guest's flushes\n\n\
         Each flush of a TLB in the built-in guest's kernel has a name (`guest/src/kernel/omit.h`). `omit=NAME` leaves it out, and\n\
         `umbra run --check-guest-tlb` catches that, as *certain* or as *suspect*, unless the guest's own checks fail before. The test\n\
         `guest_omission_of_each_flush_is_caught` leaves out each in turn, and prints as what it was caught. Here is what that mostly\n\
         is; with several vCPUs it may be another.\n\n\
         `umbra scenario run guest-rules/NAME --bug` leaves one out of a simulation of the same guest, seed by seed until that is caught.\n\
         The first suspect ends such a run (`--check-guest-tlb=strict`), and counts if the same seed has none where the flush is made.\n\n\
         | flush | what for | left out in | caught as |\n|---|---|---|---|\n",
    );
    for Flush { name, what, vcpus, append, usually } in FLUSHES {
        text += &format!("| `{name}` | {what} | `--vcpus {vcpus}`, `{append}` | {} |\n", usually.name());
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/GUEST-RULES.md");
    if std::env::var_os("UMBRA_BLESS").is_some() {
        std::fs::write(path, &text)?;
    }
    ensure!(
        std::fs::read_to_string(path)? == text,
        "docs/GUEST-RULES.md is another: UMBRA_BLESS=1 prints it anew"
    );
    Ok(())
}
