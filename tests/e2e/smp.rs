//! Guests of several CPUs: the memory model, and the workloads. `UMBRA_ROUNDS` says how much more of the first is tried.

use std::time::Instant;

use libtest_mimic::Trial;

use super::pressure::{env, number, run as run_of};
use super::umbra::{SOFT, SOFT_STICKY, Way, ways};
use crate::ensure;
use crate::support::host::Need;
use crate::support::litmus::{self, Form, Litmus, Place};
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
    let bites = case("soft_memory_without_fence_lock_or_order_is_seen_to_break", &[], bites);
    let short = case("soft_sticky_reclaim_on_4_cpus_with_few_frames", &[], || short_of_frames(SOFT_STICKY));
    let mut alone = vec![bites, short];
    // Only a build for tests can leave a rule out.
    if std::env::var_os("UMBRA_BIN").is_none() {
        alone.push(case("soft_memory_without_a_rule_of_umbras_is_seen_to_break", &[], rules_bite));
    }
    orders.chain(guests).chain(alone).collect()
}

const PAGINGS: [&str; 2] = ["pae", "legacy"];

/// Epochs and rounds of each, of a right guest; a wrong one breaks within the first few epochs (see [`bites`]).
const RIGHT: (u32, u32) = (10, 5_000);
/// Where an access locks the bus: it waits for the other CPU to leave the guest.
const RIGHT_SPLIT: (u32, u32) = (2, 500);
/// Where each round has the other CPU decode anew, and wait for the stores of all.
const RIGHT_CODE: (u32, u32) = (10, 2_000);
/// Where each instruction may cost a microsecond.
const RIGHT_KVM: (u32, u32) = (2, 300);
/// A wrong guest ends with the first epoch that breaks.
const WRONG: (u32, u32) = (1000, 10_000);
/// And so many of them are tried.
const GUESTS_MAX: u32 = 20;

/// What the guest prints is the same however many CPUs it has.
const SAME: [&str; 2] = ["workload=all", "workload=reclaim"];
/// Here it counts more checks with more CPUs.
const MORE: [&str; 2] = ["workload=fpu", "workload=shoot"];

/// `UMBRA_ROUNDS` has each tried in so many times as many epochs.
fn order(way: Way) -> Verdict {
    let times = env("UMBRA_ROUNDS", 1) as u32;
    litmus::PROPERTIES.into_iter().chain([Litmus::Code]).try_for_each(|litmus| {
        let (epochs, rounds) = match way.needs.contains(&Need::Kvm) {
            true => RIGHT_KVM,
            false if litmus.locks_the_bus() => RIGHT_SPLIT,
            false if litmus == Litmus::Code => RIGHT_CODE,
            false => RIGHT,
        };
        let guest = litmus.guest(Form::Right, epochs * times, rounds);
        let begun = Instant::now();
        let run = way.boot(&guest, &["--vcpus", "2"])?;
        println!("{} {litmus:?}: {epochs} x {rounds} rounds, {:.1?}", way.name, begun.elapsed());
        ensure!(run.end == End::Status(0), "{litmus:?} does not hold, or did not end:\n{run}");
        Ok(())
    })
}

/// What the right guests look for can be seen.
fn bites() -> Verdict {
    litmus::PROPERTIES.into_iter().try_for_each(|litmus| breaks(litmus, Form::Wrong, &[]))
}

/// Without a rule of its own Umbra does what a wrong guest does.
fn rules_bite() -> Verdict {
    breaks(Litmus::Code, Form::Right, &["--omit", "code-at-store"])?;
    breaks(Litmus::Counter(Place::AcrossPages), Form::Right, &["--omit", "bus-at-split"])
}

/// On a busy machine the two may never run at once for as long as a guest lasts: then there is another.
fn breaks(litmus: Litmus, form: Form, options: &[&str]) -> Verdict {
    let (epochs, rounds) = WRONG;
    let guest = litmus.guest(form, epochs, rounds);
    let begun = Instant::now();
    for _ in 0..GUESTS_MAX {
        let run = SOFT.boot(&guest, &[&["--vcpus", "2"], options].concat())?;
        match run.end {
            End::Status(0) => {}
            End::Status(3) => {
                println!("{litmus:?} {options:?} breaks after {:.1?}", begun.elapsed());
                return Ok(());
            }
            _ => return Err(format!("{litmus:?} {options:?}:\n{run}").into()),
        }
    }
    Err(format!("{litmus:?} {options:?} holds without what makes it, in {GUESTS_MAX} guests").into())
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

/// Two reclaimers: the guest's own, and Umbra's, which takes pages from four vCPUs that run.
fn short_of_frames(way: Way) -> Verdict {
    let append = "workload=reclaim ram=16 scale=20 seed=1";
    let (run, summary) = run_of(way, append, &["--vcpus", "4", "--frames", "8M", "--low", "2M"])?;
    ensure!(run.end == End::Status(0), "{append}:\n{run}");
    ensure!(number(&summary, "swap_outs") > 0, "Umbra took no page away: {summary:#}");
    Ok(())
}

fn passes(way: Way, append: &str, vcpus: &str) -> Result<Vec<String>, libtest_mimic::Failed> {
    let run = way.run(&["--append", append, "--vcpus", vcpus])?;
    ensure!(run.end == End::Status(0), "{append}, {vcpus} CPUs:\n{run}");
    let all = run.lines().iter().any(|line| line.starts_with(&format!("smp: cpus={vcpus}")));
    ensure!(all, "the guest does not say that it runs on {vcpus} CPUs:\n{run}");
    Ok(run.result_lines())
}
