//! End-to-end tests: what a user types, and what they see.
//!
//! Story: each test starts `umbra` with a guest image and compares its output, its words on standard error and its
//! status; where QEMU is at hand the same image runs there too and must say the same. `UMBRA_BIN` names another
//! `umbra` than the one that cargo built, `UMBRA_REQUIRE` what must not be missing (see support/host.rs). The nested
//! rig (tests/rig/run) runs this same program, with QEMU's lines recorded on the host by `--record DIR`.

mod support;

#[path = "e2e/bars.rs"]
mod bars;
#[path = "e2e/chaos.rs"]
mod chaos;
#[path = "e2e/cli.rs"]
mod cli;
#[path = "e2e/export.rs"]
mod export;
#[path = "e2e/guest_scenes.rs"]
mod guest_scenes;
#[path = "e2e/guest_tlb.rs"]
mod guest_tlb;
#[path = "e2e/images.rs"]
mod images;
#[path = "e2e/measure.rs"]
mod measure;
#[path = "e2e/memory.rs"]
mod memory;
#[path = "e2e/omissions.rs"]
mod omissions;
#[path = "e2e/operator.rs"]
mod operator;
#[path = "e2e/peer.rs"]
mod peer;
#[path = "e2e/pressure.rs"]
mod pressure;
#[path = "e2e/qmp.rs"]
mod qmp;
#[path = "e2e/reset.rs"]
mod reset;
#[path = "e2e/rig.rs"]
mod rig;
#[path = "e2e/scenario.rs"]
mod scenario;
#[path = "e2e/seeds.rs"]
mod seeds;
#[path = "e2e/segments.rs"]
mod segments;
#[path = "e2e/series.rs"]
mod series;
#[path = "e2e/simulate.rs"]
mod simulate;
#[path = "e2e/simulation.rs"]
mod simulation;
#[path = "e2e/smp.rs"]
mod smp;
#[path = "e2e/soak.rs"]
mod soak;
#[path = "e2e/umbra.rs"]
mod umbra;
#[path = "e2e/workloads.rs"]
mod workloads;

use std::path::Path;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

use support::host::Need;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    match &arguments[..] {
        [_, flag, folder] if flag == "--record" => record(Path::new(folder)),
        _ => test(),
    }
}

fn test() -> ExitCode {
    let files = [
        bars::cases(),
        chaos::cases(),
        cli::cases(),
        export::cases(),
        segments::cases(),
        guest_scenes::cases(),
        guest_tlb::cases(),
        images::cases(),
        measure::cases(),
        memory::cases(),
        omissions::cases(),
        operator::cases(),
        peer::cases(),
        pressure::cases(),
        qmp::cases(),
        reset::cases(),
        rig::cases(),
        scenario::cases(),
        seeds::cases(),
        series::cases(),
        simulate::cases(),
        simulation::cases(),
        smp::cases(),
        soak::cases(),
        workloads::cases(),
    ];
    // The nested rig is there for KVM: what does not need it has run outside.
    let all = Need::Rig.met().is_err();
    let kvm = |trial: &Trial| [Need::Kvm, Need::Rig].iter().any(|need| trial.kind().contains(need.name()));
    let trials = files.into_iter().flatten().filter(|trial| all || kvm(trial)).collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn record(folder: &Path) -> ExitCode {
    match workloads::record(folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("cannot record what QEMU prints: {}", why.message().unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}
