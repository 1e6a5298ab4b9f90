//! The interpreter against the CPU that runs the test.
//!
//! Story: a 64-bit process can run 32-bit code natively (compatibility mode). A case is some code, registers, segments
//! and memory; it runs in a child process under a seccomp filter (`worker`) and in the interpreter (`twin`), and
//! both must end the same way: by the same exception, with the same error code, CR2, registers, flags, selectors and
//! memory.
//!
//! `generate` and `fit` make cases, `bench` compares and cuts what differs down, `pinned` keeps what once did.
//! UMBRA_CASES and UMBRA_SEED make longer and other runs.
//!
//! Holds: flags and results that the architecture leaves undefined, what PUSH of a segment register leaves above it, and which of two
//! faults comes first, are compared on AMD CPUs only, whose values and order the interpreter follows.
//!
//! Limits: `forms::excluded` names the forms that are not compared, and why. Of instructions that push or pop several
//! values and fault, what the CPU has left below the stack pointer, or popped, is not compared (the interpreter does
//! all or nothing). Linux makes no call gates, no present conforming code and no inner rings for LDTs.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod bench;
mod case;
mod fit;
mod forms;
mod generate;
mod layout;
mod pinned;
mod random;
mod run;
mod segments;
mod twin;
mod worker;

use std::collections::BTreeMap;

use bench::{Bench, Difference};
use case::Case;
use forms::{INTEGER, always_faults, forms};
use iced_x86::Code;
use random::Random;
use run::is_amd;
use segments::Ldt;

/// Cases of each bounded run; the environment's UMBRA_CASES is for longer ones.
const CASES: u64 = 6_000;
/// How many differences end a run.
const DIFFERENCES_MAX: usize = 200;
/// How many cases share a descriptor table.
const BATCH: u64 = 64;

fn cases() -> u64 {
    std::env::var("UMBRA_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(CASES)
}

fn seed() -> u64 {
    std::env::var("UMBRA_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// Fails with the differences, if any.
fn none_differ(differences: &[Difference]) {
    let mut shown = BTreeMap::new();
    for difference in differences {
        let count: &mut u32 = shown.entry(&difference.kind).or_default();
        if *count == 0 {
            println!("{}\n{}\n", difference.kind, difference.text);
        }
        *count += 1;
    }
    println!("{shown:#?}");
    assert!(differences.is_empty(), "{} cases differ, seed {}", differences.len(), seed());
}

fn report(bench: &Bench) {
    println!("{} cases and {} instructions compared", bench.compared, bench.retired);
    println!("ended by vector: {:?}", bench.vectors);
    println!("not compared: {:?}, {} that differed once and not again", bench.skipped, bench.unstable);
}

/// Runs batches of cases from `make`, each with a descriptor table of its own, until there are no more or too many
/// differ.
fn run_batches(
    bench: &mut Bench,
    batches: u64,
    mut make: impl FnMut(&mut Random, &Ldt, &mut Bench) -> Option<Case>,
) {
    let mut differences = Vec::new();
    for batch in 0..batches {
        let mut random = Random::new(seed().wrapping_mul(1 << 32) + batch);
        let ldt = Ldt::random(&mut random);
        bench.twin.set_ldt(&ldt);
        let cases: Vec<_> = (0..BATCH).map_while(|_| make(&mut random, &ldt, bench)).collect();
        differences.extend(bench.compare(&ldt, &cases));
        if cases.is_empty() || differences.len() > DIFFERENCES_MAX {
            break;
        }
    }
    report(bench);
    none_differ(&differences);
    let skipped: u64 = bench.skipped.values().sum();
    // What goes on from undefined flags, as other CPUs have them, says nothing.
    let least = if is_amd() { 3 * skipped } else { skipped };
    assert!(bench.compared > least, "hardly anything could be compared");
    assert!(bench.unstable <= 2 + bench.compared / 20_000, "differences come and go");
}

/// What once differed. Fault orders that the architecture leaves open are compared on AMD alone.
#[test]
fn what_once_differed_agrees() {
    let Some(mut bench) = Bench::new(INTEGER) else { return };
    if !is_amd() {
        println!("skipped: the order of faults is AMD's");
        return;
    }
    let ldt = pinned::descriptors();
    for pinned in pinned::all() {
        let compared = bench.compared;
        let differences = bench.compare(&ldt, &[pinned.case()]);
        println!("{}", pinned.what);
        none_differ(&differences);
        assert_eq!(bench.compared, compared + 1, "{}: {:?}", pinned.what, bench.skipped);
        assert_eq!(bench.last_end, pinned.ends, "{}", pinned.what);
    }
}

/// Random sequences of all integer forms, branches among them, in random segments.
#[test]
fn sequences_agree() {
    let Some(mut bench) = Bench::new(INTEGER) else { return };
    let forms = forms(INTEGER);
    run_batches(&mut bench, cases().div_ceil(BATCH), |random, ldt, bench| {
        let length = 1 + random.below(24);
        Some(generate::sequence(random, ldt, &mut bench.twin, &forms, length))
    });
}

/// Bytes that nobody chose.
#[test]
fn random_bytes_agree() {
    let Some(mut bench) = Bench::new(INTEGER) else { return };
    run_batches(&mut bench, cases().div_ceil(BATCH), |random, ldt, _| Some(generate::noise(random, ldt)));
}

/// Each integer form that 32-bit mode has, alone: compared so often that its operands have seen most kinds.
#[test]
fn every_form_is_compared() {
    let Some(mut bench) = Bench::new(INTEGER) else { return };
    let forms = forms(INTEGER);
    let wanted = (cases() / 500).max(1) as u32;
    let missing = |bench: &Bench, code: Code| {
        let tally = bench.tallies.get(&code).copied().unwrap_or_default();
        let compared = if always_faults(code) { tally.retired + tally.faulted } else { tally.retired };
        compared < wanted
    };
    // Branches to 16-bit targets retire in local code segments alone.
    let rounds = u64::from(wanted) * 40;
    let (mut at, mut round) = (0, 0);
    run_batches(&mut bench, rounds * forms.len() as u64 / BATCH, |random, ldt, bench| {
        // The next form in turn that still lacks comparisons.
        while round < rounds {
            (at, round) = if at + 1 == forms.len() { (0, round + 1) } else { (at + 1, round) };
            if missing(bench, forms[at]) {
                return Some(generate::sequence(random, ldt, &mut bench.twin, &forms[at..=at], 1));
            }
        }
        None
    });
    let lacking: Vec<_> = forms.iter().filter(|code| missing(&bench, **code)).collect();
    println!("{} forms, each {wanted} times", forms.len());
    assert!(lacking.is_empty(), "not compared {wanted} times: {lacking:?}");
}
