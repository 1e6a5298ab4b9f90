//! Bars of time that only a release build can be held to; `cargo test --release --test e2e bar_` prints the figures.

use std::time::Duration;

use libtest_mimic::Trial;

use super::umbra::umbra;
use crate::ensure;
use crate::support::host::Need;
use crate::support::process::End;
use crate::support::{Verdict, case};

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let needs: &[Need] = &[Need::Kvm, Need::Release];
    vec![
        case("bar_default_run_passes_under_15_s", needs, default_run),
        case("bar_first_serial_byte_comes_under_100_ms", needs, first_byte),
    ]
}

fn default_run() -> Verdict {
    let run = umbra(["run"])?;
    println!("bar: default run {:.2} s, limit 15 s", run.took.as_secs_f64());
    ensure!(run.end == End::Status(0), "the default run failed:\n{run}");
    ensure!(run.took < Duration::from_secs(15), "the default run took {:.2?}", run.took);
    Ok(())
}

/// The median of eleven starts.
fn first_byte() -> Verdict {
    let mut times = Vec::new();
    for _ in 0..11 {
        let run = umbra(["run", "--append", "workload=hello"])?;
        let Some(time) = run.first_byte else { return Err(format!("the guest said nothing:\n{run}").into()) };
        times.push(time);
    }
    times.sort();
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!("bar: first serial byte {median:.1?} (median of 11, worst {worst:.1?}), limit 100 ms");
    ensure!(median < Duration::from_millis(100), "the first serial byte came after {median:.1?}");
    Ok(())
}
