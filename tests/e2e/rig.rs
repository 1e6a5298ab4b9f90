//! The nested rig, seen from the inside: it is the machine that its script claims.
//!
//! Without these a rig that silently booted twice with the same setting would look like two hosts.

use std::fs;
use std::thread;

use libtest_mimic::Trial;

use crate::ensure;
use crate::support::host::Need;
use crate::support::{Verdict, case};

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    vec![
        case("rig_npt_is_what_was_asked_for", &[Need::Rig], npt),
        case("rig_makes_many_vms_without_wedging", &[Need::Rig, Need::Kvm], many_vms),
        case("rig_has_two_cpus", &[Need::Rig], two_cpus),
    ]
}

fn npt() -> Verdict {
    let asked = std::env::var("RIG_NPT")?;
    let parameter = fs::read_to_string("/sys/module/kvm_amd/parameters/npt")?;
    let real = if parameter.trim() == "Y" { "1" } else { "0" };
    ensure!(asked == real, "the rig was asked for npt={asked}, kvm-amd says {}", parameter.trim());
    Ok(())
}

/// Trap: without the idle VM that the rig's init holds, some dozens of these stop both CPUs.
fn many_vms() -> Verdict {
    let kvm = kvm_ioctls::Kvm::new()?;
    for n in 0..60 {
        let vm = kvm.create_vm().map_err(|error| format!("VM {n}: {error}"))?;
        vm.create_vcpu(0).map_err(|error| format!("vCPU of VM {n}: {error}"))?;
    }
    Ok(())
}

fn two_cpus() -> Verdict {
    let cpus = thread::available_parallelism()?.get();
    ensure!(cpus == 2, "two threads of a vCPU each need two CPUs, the rig has {cpus}");
    Ok(())
}
