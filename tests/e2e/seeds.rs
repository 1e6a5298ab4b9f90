//! Rules of Umbra's that the built-in guest does not miss, left out of small guests that do, seed by seed: `umbra simulate`.
//!
//! Story: a rule that owes a flush for something is hidden by whatever else owes one. These guests do one thing, in each round. With
//! the rule in force they pass by the same seed, and by others.

use std::ffi::OsStr;
use std::time::Instant;

use libtest_mimic::Trial;

use super::umbra::{file_of, status, umbra};
use crate::ensure;
use crate::support::crowd::Crowd;
use crate::support::host::Need;
use crate::support::litmus::{Form, Litmus, Place};
use crate::support::pair::Pair;
use crate::support::process::{End, Outcome};
use crate::support::remap::Remap;
use crate::support::{Verdict, case, image, segments, spin};

/// The tests of this file: only a build for tests can leave a rule out.
pub fn cases() -> Vec<Trial> {
    if std::env::var_os("UMBRA_BIN").is_some() || Need::Rig.met().is_ok() {
        return Vec::new();
    }
    let trial = |missed: &'static Missed| {
        case(format!("simulated_guest_misses_{}", missed.rule), &[], move || found(missed))
    };
    MISSED.iter().map(trial).collect()
}

/// A guest that misses a rule.
struct Missed {
    rule: &'static str,
    guest: fn() -> Vec<u8>,
    options: &'static [&'static str],
}

const fn missed(rule: &'static str, guest: fn() -> Vec<u8>, options: &'static [&'static str]) -> Missed {
    Missed { rule, guest, options }
}

const ONE: &[&str] = &["--mem", "24M", "--tlb", "sticky"];
const TWO: &[&str] = &["--mem", "24M", "--vcpus", "2"];
const PAIR: &[&str] = &["--mem", "24M", "--vcpus", "2", "--tlb", "sticky"];
const FEW_TABLES: &[&str] = &["--mem", "24M", "--tlb", "sticky", "--shadow-pages", "64"];
const SHRINKING: &[&str] = &[
    "--mem",
    "24M",
    "--tlb",
    "sticky",
    "--shadow-pages",
    "256",
    "--low",
    "1M",
    "--frames",
    "4M@0s,2M@4ms,4M@7ms,2M@8ms,4M@11ms,2M@12ms,4M@15ms,2M@16ms,4M@19ms,2M@20ms,4M@23ms",
];
/// Little more than the guest's own pages: what is taken is theirs.
const STRESSED: &[&str] = &["--mem", "3M", "--low", "1M", "--tlb", "sticky", "--stress"];
const STRESSED_MORE: &[&str] = &["--mem", "2304K", "--low", "1M", "--tlb", "sticky", "--stress"];
const STRESSED_PAIR: &[&str] =
    &["--mem", "2304K", "--low", "1088K", "--vcpus", "2", "--tlb", "sticky", "--stress"];
/// Native code, on the model of hardware.
const MODEL_PAIR: &[&str] = &["--mem", "24M", "--vcpus", "2", "--backend", "model", "--supervisor", "native"];
const HUGE: &[&str] = &["--mem", "24M", "--tlb", "sticky", "--low", "4M", "--frames", "40M", "--huge", "on"];

/// Seeds that pass with the rule in force: the one that fails without it, and so many before; at least the first few.
const SEEDS_IN_FORCE: u32 = 20;
const SEEDS_MIN: u32 = 3;

const MISSED: &[Missed] = &[
    missed("code-at-store", || Litmus::Code.guest(Form::Right, 4, 200), TWO),
    missed("bus-at-split", || Litmus::Counter(Place::AcrossPages).guest(Form::Right, 4, 200), TWO),
    missed("code-at-flush", || Remap::Code.guest(100), ONE),
    missed("debt-of-unlink", || Remap::Directory.guest(100), ONE),
    missed("debt-of-narrowing", || Remap::Right.guest(100), ONE),
    missed("flush-at-mode-change", || Remap::Global.guest(100), ONE),
    missed("debt-of-eviction", || Crowd::Tables.guest(20), FEW_TABLES),
    missed("shootdown-before-reuse", || Crowd::Tables.guest(20), FEW_TABLES),
    missed("shootdown-before-giving-back", || Crowd::Rested.guest(8), SHRINKING),
    missed("shootdown-before-root", || Crowd::Spaces.guest(5), ONE),
    missed("debt-of-root", || Crowd::Shared.guest(20), PAIR),
    missed("split-at-protection", || Remap::Within.guest(20), HUGE),
    missed("debt-of-fill", || Remap::Executable.guest(100), ONE),
    missed("sync-at-promotion", || Remap::Promoted.guest(100), ONE),
    missed("await-stores", || Pair::Seen.guest(200), PAIR),
    missed("sync-at-tracking", || Pair::Often.guest(200), PAIR),
    missed("entry-at-fill", || Pair::Recursive.guest(200), PAIR),
    missed("debt-of-put-back", || Remap::Nothing.guest(4000), STRESSED),
    missed("removal-under-way", || Remap::Page.guest(20_000), STRESSED_MORE),
    missed("kick-at-shootdown", || spin::guest(300), STRESSED_PAIR),
    missed("shootdown-at-descriptors", || segments::guest(100), MODEL_PAIR),
    missed("shootdown-at-watch", || segments::guest(100), MODEL_PAIR),
    missed("flush-of-large-page", || Remap::Block.guest(300), HUGE),
];

/// Umbra's own invariants do not hold.
fn is_breach(run: &Outcome) -> bool {
    (run.end == status::INCOHERENT || run.end == status::FAILURE) && run.stderr.contains("INV-")
}

fn found(missed: &Missed) -> Verdict {
    let Missed { rule, guest, options } = missed;
    let image = file_of(&image::multiboot(&guest()))?;
    let sweep = |seeds: &str, omit: &[&str]| {
        let words = ["simulate", "--seeds", seeds, "--"].map(OsStr::new);
        let words = words.into_iter().chain([image.path().as_os_str()]);
        umbra(words.chain(options.iter().chain(omit).map(OsStr::new)))
    };
    let begun = Instant::now();
    let run = sweep("0..200", &["--omit", rule])?;
    let caught = matches!(run.end, End::Status(code) if code % 2 == 1) || is_breach(&run);
    ensure!(caught, "without {rule} it should not:\n{run}");
    println!("without {rule}, in {:.1?}:\n{}", begun.elapsed(), run.stderr);
    // What was found is the rule's, and no other mistake that seeds find.
    let seed = run.stderr.split("umbra: seed ").nth(1).and_then(|rest| rest.split(':').next());
    let seed: u32 = seed.and_then(|seed| seed.parse().ok()).ok_or("the seed is not named")?;
    let end = (seed + 1).max(SEEDS_MIN);
    let in_force = sweep(&format!("{}..{end}", end.saturating_sub(SEEDS_IN_FORCE)), &[])?;
    ensure!(in_force.end == End::Status(0), "with {rule} in force it should pass:\n{in_force}");
    Ok(())
}
