//! Guests of several CPUs: the memory model, and the workloads. `UMBRA_ROUNDS` says how often each property is tried.

use libtest_mimic::Trial;

use super::pressure::env;
use super::umbra::{Way, ways};
use crate::ensure;
use crate::support::litmus::{self, Litmus};
use crate::support::process::End;
use crate::support::{Verdict, case};

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    ways()
        .map(|way| case(format!("{}_memory_is_as_x86_has_it", way.name), way.needs, move || order(way)))
        .collect()
}

/// Each round waits for two threads to have a CPU in turn, on a busy machine.
fn order(way: Way) -> Verdict {
    let rounds = env("UMBRA_ROUNDS", 1000) as u32;
    litmus::ALL.into_iter().try_for_each(|litmus| holds(way, litmus, rounds))
}

fn holds(way: Way, litmus: Litmus, rounds: u32) -> Verdict {
    let run = way.boot(&litmus.guest(rounds), &["--vcpus", "2"])?;
    ensure!(run.end == End::Status(0), "{litmus:?} does not hold, or did not end:\n{run}");
    Ok(())
}
