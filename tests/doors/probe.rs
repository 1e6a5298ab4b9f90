//! The host probe, on the host that there is.

use std::time::{Duration, Instant};

use umbra::kvm::Host;
use umbra::probe::{Probe, Translation};

use crate::Body;

/// Every test.
pub const TESTS: &[(&str, Body)] =
    &[("kvm_quick_probe_takes_milliseconds", quick), ("kvm_doctor_finds_everything_within_seconds", doctor)];

fn quick(_: &Host) -> Result<(), String> {
    let mut least = Duration::MAX;
    for _ in 0..5 {
        let begun = Instant::now();
        let quick = Probe::quick().map_err(|error| error.to_string())?;
        least = least.min(begun.elapsed());
        if quick.speed.instructions_per_second <= 0.0 {
            return Err(format!("{quick:?}"));
        }
    }
    println!("quick probe: {least:?}");
    // The bar is 5 ms on an idle machine; the rig is emulated, and tests run side by side.
    if least < Duration::from_millis(500) { Ok(()) } else { Err(format!("{least:?}")) }
}

fn doctor(_: &Host) -> Result<(), String> {
    let report = Probe::complete();
    println!("{report}");
    let complete = report.usable() && report.shootdowns.len() == 4 && !report.costs.is_empty();
    let quick = Probe::quick().map_err(|error| error.to_string())?;
    let row = |name| report.shootdowns.iter().find(|row| row.name == name).is_some_and(|row| row.works());
    // Both probes looked at the same thing in different ways.
    let agree = (quick.translation == Translation::FlushSuffices) == row("kick")
        && report.translation == Some(quick.translation)
        && report.speed.map(|speed| speed.emulated) == Some(quick.speed.emulated);
    if complete && agree && row("notifier") && row("memory slot") {
        Ok(())
    } else {
        Err(format!("{quick:?}\n{report:?}"))
    }
}
