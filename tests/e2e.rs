//! End-to-end tests: what a user types, and what they see.
//!
//! Story: each test starts a program with a guest image and compares what it prints and its status. `UMBRA_REQUIRE`
//! names what must not be missing (see support/host.rs). The nested rig (tests/rig/run) runs this same program.

mod support;

#[path = "e2e/peer.rs"]
mod peer;
#[path = "e2e/rig.rs"]
mod rig;

use std::process::ExitCode;

use libtest_mimic::Arguments;

fn main() -> ExitCode {
    let trials = [peer::cases(), rig::cases()].into_iter().flatten().collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
