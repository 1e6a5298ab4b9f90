//! Guests of several CPUs: the memory model, and the workloads. `UMBRA_ROUNDS` says how often each property is tried.

use libtest_mimic::Trial;

use super::pressure::env;
use super::umbra::{SOFT, Way, ways};
use crate::ensure;
use crate::support::host::Need;
use crate::support::litmus::{self, Litmus};
use crate::support::process::End;
use crate::support::{Verdict, case};

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let orders = ways()
        .map(|way| case(format!("{}_memory_is_as_x86_has_it", way.name), way.needs, move || order(way)));
    let guests = ways().flat_map(|way| {
        PAGINGS.map(|paging| {
            let name = format!("{}_smp_{paging}_does_what_one_cpu_does", way.name);
            case(name, way.needs, move || same_as_one(way, paging))
        })
    });
    let bites = case("soft_stores_are_seen_late_where_no_fence_stands_between", &[], bites);
    orders.chain(guests).chain([bites]).collect()
}

const PAGINGS: [&str; 2] = ["pae", "legacy"];

/// It takes some hundred on a machine where both vCPUs have a CPU.
const ROUNDS_UNFENCED: u32 = 3_000_000;

/// What the guest prints is the same however many CPUs it has.
const SAME: [&str; 2] = ["workload=all", "workload=reclaim"];
/// Here it counts more checks with more CPUs.
const MORE: [&str; 2] = ["workload=fpu", "workload=shoot"];

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

/// Without a fence both CPUs miss the other's store now and then: what the fenced rounds look for can be seen.
fn bites() -> Verdict {
    let run = SOFT.boot(&Litmus::Unfenced.guest(ROUNDS_UNFENCED), &["--vcpus", "2"])?;
    ensure!(run.end == End::Status(3), "in {ROUNDS_UNFENCED} rounds each store was seen at once:\n{run}");
    Ok(())
}

/// With KVM, which may emulate and then takes milliseconds for a kick, two CPUs and a workload that does not live on kicks.
fn same_as_one(way: Way, paging: &str) -> Verdict {
    let slow = way.needs.contains(&Need::Kvm);
    let (counts, same, more): (&[&str], &[&str], &[&str]) =
        if slow { (&["2"], &["workload=mm"], &[]) } else { (&["2", "4", "8"], &SAME, &MORE) };
    for vcpus in counts {
        for workload in same {
            let append = format!("{workload} paging={paging}");
            let one = SOFT.run(&["--append", &append])?;
            let several = passes(way, &append, vcpus)?;
            ensure!(several == one.result_lines(), "{append}, {vcpus} CPUs: {several:#?}\nbut one:\n{one}");
        }
        for workload in more {
            passes(way, &format!("{workload} paging={paging}"), vcpus)?;
        }
    }
    Ok(())
}

fn passes(way: Way, append: &str, vcpus: &str) -> Result<Vec<String>, libtest_mimic::Failed> {
    let run = way.run(&["--append", append, "--vcpus", vcpus])?;
    ensure!(run.end == End::Status(0), "{append}, {vcpus} CPUs:\n{run}");
    let all = run.lines().iter().any(|line| line.starts_with(&format!("smp: cpus={vcpus}")));
    ensure!(all, "the guest does not say that it runs on {vcpus} CPUs:\n{run}");
    Ok(run.result_lines())
}
