//! The kvm backend on a real /dev/kvm: its doors with the attack on each, and entering and leaving the guest.
//!
//! Tier: needs /dev/kvm. Where there is none, every test is ignored and counted, with the reason as its kind; with
//! `kvm` in `UMBRA_REQUIRE` it fails instead.
//!
//! - `door_*_closed`: the attack traps. `door_*_opened`: with that one door open, the same bytes succeed, so that the
//!   first can fail. Where a host makes the second impossible, it is ignored with the reason.
//! - `kvm_*`: traps, state, kicks, flushes, shootdown, two vCPUs, the host probe.

#[path = "doors/attacks.rs"]
mod attacks;
#[path = "doors/common.rs"]
mod common;
#[path = "doors/kicks.rs"]
mod kicks;
#[path = "doors/probe.rs"]
mod probe;
#[path = "doors/vcpu.rs"]
mod vcpu;

use libtest_mimic::{Arguments, Failed, Trial};
use umbra::kvm::Host;

/// A test's body.
type Body = fn(&Host) -> Result<(), String>;

fn main() {
    let arguments = Arguments::from_args();
    let trials = match Host::open() {
        Ok(host) => with_kvm(Box::leak(Box::new(host))),
        Err(error) => without_kvm(&error.to_string()),
    };
    libtest_mimic::run(&arguments, trials).exit();
}

fn with_kvm(host: &'static Host) -> Vec<Trial> {
    // Some KVMs suffer when the last VM goes and another comes, again and again: one stays.
    std::mem::forget(host.kvm().create_vm());
    let bodies = tests().map(|(name, body)| trial(name.into(), move || body(host)));
    bodies.chain(attacks::ATTACKS.iter().flat_map(|attack| attacks::trials(host, attack))).collect()
}

fn without_kvm(reason: &str) -> Vec<Trial> {
    let required = std::env::var("UMBRA_REQUIRE").is_ok_and(|list| list.split(',').any(|it| it == "kvm"));
    tests()
        .map(|(name, _)| name.to_owned())
        .chain(attacks::ATTACKS.iter().flat_map(attacks::names))
        .map(|name| {
            let error = format!("UMBRA_REQUIRE asks for kvm, but {reason}");
            match required {
                true => Trial::test(name, move || Err(Failed::from(error))),
                false => ignored(name, reason),
            }
        })
        .collect()
}

/// The tests that are no attacks.
fn tests() -> impl Iterator<Item = (&'static str, Body)> {
    vcpu::TESTS.iter().chain(kicks::TESTS).chain(probe::TESTS).copied()
}

/// A test that is run.
fn trial(name: String, body: impl FnOnce() -> Result<(), String> + Send + 'static) -> Trial {
    Trial::test(name, move || body().map_err(Failed::from)).with_kind("kvm")
}

/// A test that cannot be run here.
fn ignored(name: String, reason: &str) -> Trial {
    Trial::test(name, || Ok(())).with_kind(format!("skipped: {reason}")).with_ignored_flag(true)
}
