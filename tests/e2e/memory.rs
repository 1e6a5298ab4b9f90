//! Guests with less memory than they use: what the host gets back, and both ways to take pages from a vCPU that runs.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};

use super::umbra::{program, umbra};
use crate::ensure;
use crate::support::host::Need;
use crate::support::process::End;
use crate::support::{Verdict, case};

const MIB: u64 = 1 << 20;

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let shootdown = |way: &'static str| {
        case(format!("kvm_shootdown_{way}_under_pressure"), &[Need::Kvm], move || under_pressure(way))
    };
    vec![
        case("cut_of_the_budget_gives_memory_back", &[], cut),
        shootdown("kick"),
        shootdown("notifier"),
        shootdown("auto"),
    ]
}

/// The guest loses pages while it runs, and finds every one of them as it was.
fn under_pressure(way: &str) -> Verdict {
    let json = tempfile::NamedTempFile::new()?;
    let path = json.path().to_str().ok_or("a name that is not UTF-8")?;
    let tight =
        ["--frames", "1536K", "--low", "512K", "--append", "workload=mm scale=100 hz=20", "--json", path];
    let run = umbra(["run", "--backend", "kvm", "--shootdown", way].iter().chain(&tight))?;
    ensure!(run.end == End::Status(0), "the guest came to harm:\n{run}");
    let summary = fs::read_to_string(path)?;
    ensure!(!summary.contains("\"swap_outs\": 0,"), "nothing went to swap:\n{summary}");
    let named = way == "auto" || summary.contains(&format!("\"shootdown\": \"{way}\""));
    ensure!(named, "another shootdown than asked for:\n{summary}");
    Ok(())
}

/// Memory of the pool that was resident over a run, sampled, in bytes.
fn resident(frames: &str, swap: &str) -> Result<Vec<(Duration, u64)>, Failed> {
    let arguments = ["--low", "1M", "--append", "workload=kmap scale=4000", "--timeout", "60s"];
    let mut child = Command::new(program())
        .args(["run", "--backend", "soft", "--frames", frames, "--swap", swap])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let (begun, mut samples) = (Instant::now(), Vec::new());
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        // A process that is ending has no memory any more.
        samples.extend(
            shared_memory(&child).filter(|bytes| *bytes >= MIB).map(|bytes| (begun.elapsed(), bytes)),
        );
        thread::sleep(Duration::from_micros(500));
    };
    ensure!(status.success(), "--frames {frames} ended with {status}");
    Ok(samples)
}

fn shared_memory(child: &Child) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// A cut from 24 MiB to 8 takes as much off the process's own memory, while the guest runs on. When the guest has filled
/// 24 MiB, a run without a cut says; on a busy machine the next may be slower, and is tried again.
fn cut() -> Verdict {
    const TRIES: u32 = 8;
    // The background keeps some of the frames free, and low memory what it may want.
    const FULL: u64 = 21 * MIB;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("swap");
    let file = file.to_str().ok_or("a name that is not UTF-8")?;
    let mut seen = Vec::new();
    for _ in 0..TRIES {
        let whole = resident("24M", file)?;
        let full = whole.iter().find(|(_, bytes)| *bytes >= FULL).map(|(at, _)| *at);
        let (Some(full), Some((end, _))) = (full, whole.last()) else { continue };
        let at = full + end.saturating_sub(full) / 4;
        let cut = resident(&format!("24M@0s,8M@{}ms", at.as_millis().max(1)), file)?;
        let before = cut.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
        let after = cut.last().map_or(u64::MAX, |(_, bytes)| *bytes);
        if before >= FULL && after <= 8 * MIB {
            return Ok(());
        }
        seen.push((at, before / 1024, after / 1024));
    }
    Err(format!("no cut took 14 MiB; times, KiB before and after: {seen:?}").into())
}
