//! More guest memory than frames: every byte stays right, whoever runs the guest, and what cannot be had is said.
//!
//! The guest's own checks, Umbra's hashes of its memory and the audit at the end judge. `UMBRA_SEEDS=20 UMBRA_SECONDS=15`
//! soaks for so many seeds, each for so long.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use serde_json::Value;

use super::umbra::{SOFT, SOFT_STICKY, Way, expect_sentence, file_of, judge, program, status, ways};
use crate::ensure;
use crate::support::host::Need;
use crate::support::noise::Noise;
use crate::support::process::{self, End, Outcome};
use crate::support::{Verdict, case};

/// A guest under pressure: what it does, and what it has.
struct Press {
    append: &'static str,
    options: &'static [&'static str],
}

/// For a way that runs hundreds of millions of instructions a second.
const FAST: [Press; 4] = [
    // Frames run out when every page has just been used for the first time: more of them than batches in which none is free.
    Press { append: "workload=reclaim ram=64 scale=1", options: &["--frames", "40M", "--low", "1M"] },
    Press { append: "workload=kmap scale=2000", options: &["--frames", "8M", "--low", "1M"] },
    Press { append: "workload=mm scale=2000 paging=legacy", options: &["--frames", "6M", "--low", "1M"] },
    Press {
        append: "workload=mm scale=3000",
        options: &["--frames", "24M@0s,4M@20ms,16M@50ms,4M@80ms,8M@120ms", "--low", "1M"],
    },
];
/// For one that runs a million, and in the nested rig barely keeps up with a timer of 100 Hz.
const SLOW: [Press; 2] = [
    Press {
        append: "workload=mm scale=400 hz=20",
        options: &["--frames", "3M@0s,2M@500ms", "--low", "512K"],
    },
    Press { append: "workload=kmap scale=400 hz=20", options: &["--frames", "2M", "--low", "512K"] },
];
/// The same with mappings that come and go: five times slower in the nested rig.
const SLOW_MAPPED: Press =
    Press { append: "workload=mm scale=150 hz=20", options: &["--frames", "1536K", "--low", "512K"] };

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let press = |way: Way| {
        let presses: &[Press] = if way.needs.contains(&Need::Kvm) { &SLOW } else { &FAST };
        case(format!("{}_pressed_guests_keep_every_byte", way.name), way.needs, move || all(way, presses))
    };
    let mapped = |way: Way| {
        let press = if way.needs.contains(&Need::Kvm) { &SLOW_MAPPED } else { &FAST[3] };
        case(format!("{}_touches_guest_memory_through_windows_alone", way.name), way.needs, move || {
            mapped_windows(way, press)
        })
    };
    let alone = [
        case("soft_sticky_pressed_seeds_keep_every_byte", &[], seeds),
        case("soft_guest_that_is_mostly_low_memory_has_room_for_its_pages", &[], mostly_low),
        case("soft_huge_ranges_take_a_fifth_of_the_tlb_misses_at_most", &[], huge),
        case("soft_huge_ranges_under_pressure_keep_every_byte", &[], huge_pressed),
        case("soft_huge_ranges_repeat_in_a_simulation", &[], huge_simulated),
        case("swap_in_a_file_leaves_nothing_behind", &[], swap_file),
        case("every_swap_operation_that_fails_is_a_clear_stop", &[], failing_swap),
        case("swap_that_is_full_is_a_clear_stop", &[], full_swap),
        case("disk_of_the_swap_file_that_is_full_is_a_clear_stop", &[Need::Root], full_disk),
        case("budgets_that_cannot_be_are_refused_before_the_run", &[], refused),
        case("mapped_windows_that_the_host_has_no_room_for_are_refused", &[], too_many_mappings),
    ];
    ways().map(press).chain(ways().map(mapped)).chain(alone).collect()
}

/// Runs a guest with a summary in JSON.
pub fn run(way: Way, append: &str, options: &[&str]) -> Result<(Outcome, Value), Failed> {
    let json = file_of(b"")?;
    let path = json.path().to_string_lossy().into_owned();
    let args = [&["--append", append, "--json", &path], options].concat();
    let run = way.run(&args)?;
    let text = std::fs::read_to_string(json.path())?;
    Ok((run, serde_json::from_str(&text).unwrap_or(Value::Null)))
}

/// What tables had while frames were plenty is not theirs when there are few.
fn mostly_low() -> Verdict {
    let options = ["--mem", "64M", "--low", "8M", "--frames", "48M@0s,11M@300ms", "--timeout", "80s"];
    passes(SOFT, "workload=reclaim ram=64 scale=20", &options).map(drop)
}

/// Ranges that the guest maps large are gathered while it uses them, and are one entry of a TLB each: by both formats and each kind of TLB.
fn huge() -> Verdict {
    let guest = |paging: &str, tlb: &str, huge: &str| {
        let append = format!("workload=huge paging={paging}");
        passes(SOFT, &append, &["--mem", "96M", "--tlb", tlb, "--huge", huge, "--timeout", "100s"])
    };
    for (paging, tlb) in [("pae", "sized"), ("legacy", "sized"), ("pae", "sticky"), ("pae", "lossy")] {
        let on = guest(paging, tlb, "on")?;
        let (collapsed, now) = (number(&on, "huge/collapsed"), number(&on, "huge/now"));
        ensure!(collapsed >= 32 && now >= 30, "{paging}, {tlb}: not all of 64 MiB is huge: {on:#}");
        if tlb == "sized" {
            let off = guest(paging, tlb, "off")?;
            let [with, without] = [&on, &off].map(|run| run["tlb"]["fills"].as_u64().unwrap_or(0));
            println!("huge: {paging}, {with} fills with, {without} without, {collapsed} ranges collapsed");
            ensure!(with > 0 && with * 5 <= without, "{paging}: {with} fills, {without} without huge ranges");
        }
    }
    Ok(())
}

/// Ranges are gathered, and frames become fewer: in virtual time, so that the one comes before the other on any machine. The seed is one
/// whose pace gives the guest time for both.
fn huge_pressed() -> Verdict {
    let frames = ["--mem", "96M", "--low", "8M", "--frames", "104M@0s,70M@200ms", "--timeout", "100s"];
    let options = [&["--huge", "on", "--deterministic", "--seed", "9"], &frames[..]].concat();
    let summary = passes(SOFT, "workload=huge scale=60", &options)?;
    let [collapsed, split, out] =
        ["huge/collapsed", "huge/split", "swap_outs"].map(|field| number(&summary, field));
    ensure!(collapsed > 0 && split > 0 && out > 0, "{collapsed} collapsed, {split} split: {summary:#}");
    Ok(())
}

fn huge_simulated() -> Verdict {
    let run = || {
        let options = ["--mem", "96M", "--huge", "on", "--deterministic", "--seed", "9", "--timeout", "100s"];
        let summary = passes(SOFT, "workload=huge scale=20", &options)?;
        let fields = ["huge/collapsed", "huge/moved", "huge/hit"].map(|field| number(&summary, field));
        Ok::<_, Failed>((fields, summary["event_log"].clone()))
    };
    let (first, again) = (run()?, run()?);
    ensure!(first == again && first.0[0] > 0, "{first:?}, {again:?}");
    Ok(())
}

/// A figure of the memory, 0 where there is none.
pub fn number(summary: &Value, field: &str) -> u64 {
    summary.pointer(&format!("/memory/{field}")).and_then(Value::as_u64).unwrap_or(0)
}

fn all(way: Way, presses: &[Press]) -> Verdict {
    presses.iter().try_for_each(|press| {
        let summary = passes(way, press.append, press.options)?;
        for field in ["swap_outs", "refaults", "clean_drops"] {
            ensure!(number(&summary, field) > 0, "{}: {field} is 0: no pressure: {summary:#}", press.append);
        }
        Ok(())
    })
}

/// A guest and its pages on their way, where Umbra's own code has no other way to memory: a touch beside a window is a crash.
fn mapped_windows(way: Way, press: &Press) -> Verdict {
    let options = [&["--window", "mapped"], press.options].concat();
    let summary = passes(way, press.append, &options)?;
    let contexts = summary.pointer("/memory/window/contexts").and_then(Value::as_array);
    let deepest = |name: &str| {
        let context = contexts.into_iter().flatten().find(|context| context["context"] == name)?;
        Some((context["deepest"].as_u64()?, context["depth_max"].as_u64()?))
    };
    for name in ["vcpu", "host"] {
        let depth = deepest(name);
        ensure!(depth.is_some_and(|(deepest, most)| (1..=most).contains(&deepest)), "{name}: {depth:?}");
    }
    ensure!(number(&summary, "refaults") > 0, "no pressure: {summary:#}");
    Ok(())
}

fn too_many_mappings() -> Verdict {
    let run = SOFT.run(&["--window", "mapped", "--shadow-pages", "1000000"])?;
    expect_sentence(&run, &["--window mapped", "--shadow-pages", "max_map_count"])?;
    Ok(())
}

/// The run must pass, and nobody may have waited for a page for long.
fn passes(way: Way, append: &str, options: &[&str]) -> Result<Value, Failed> {
    let (run, summary) = run(way, append, options)?;
    ensure!(run.end == End::Status(0), "{append} {options:?} did not pass:\n{run}");
    Ok(summary)
}

pub fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn seeds() -> Verdict {
    let (count, time) = (env("UMBRA_SEEDS", 3), Duration::from_secs(env("UMBRA_SECONDS", 1)));
    let (mut runs, mut stall) = (0, 0);
    for seed in 1..=count {
        let (mut noise, end) = (Noise::new(seed), Instant::now() + time);
        while Instant::now() < end {
            let (append, frames) = draw(&mut noise);
            let summary = passes(SOFT_STICKY, &append, &["--frames", &frames, "--low", "1M"])
                .map_err(|why| format!("seed {seed}: {}", why.message().unwrap_or_default()))?;
            runs += 1;
            stall = stall.max(number(&summary, "stall_nanos_max"));
        }
    }
    println!(
        "pressure: {count} seeds, {runs} runs, longest wait for a page {:?}",
        Duration::from_nanos(stall)
    );
    Ok(())
}

/// A workload, and waves of the budget that it runs under.
fn draw(noise: &mut Noise) -> (String, String) {
    let workload = noise.pick(&["mm", "kmap"]);
    let paging = noise.pick(&["pae", "legacy"]);
    let (scale, seed) = (1000 + noise.below(3000), 1 + noise.below(1000));
    let mut frames = "8M@0s".to_owned();
    let mut at = 0;
    for _ in 0..noise.below(8) {
        at += 5 + noise.below(60);
        frames += &format!(",{}K@{at}ms", 4 * (900 + noise.below(3000)));
    }
    (format!("workload={workload} paging={paging} scale={scale} seed={seed}"), frames)
}

fn swap_file() -> Verdict {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("swap");
    let path = path.to_string_lossy().into_owned();
    let options = ["--frames", "6M", "--low", "1M", "--swap", &path];
    let summary = passes(SOFT, "workload=kmap scale=2000", &options)?;
    ensure!(number(&summary, "swap_outs") > 0, "nothing was swapped: {summary:#}");
    ensure!(!Path::new(&path).exists(), "the swap file is still there");
    std::fs::write(&path, "mine")?;
    let again = SOFT.run(&options)?;
    expect_sentence(&again, &["--swap", &path, "does not exist"])?;
    ensure!(std::fs::read(&path)? == b"mine", "a file that was there was touched");
    Ok(())
}

/// Each of the first operations, and some later ones.
fn failing_swap() -> Verdict {
    for operation in ["read", "write"] {
        for n in (1..=12).chain([20, 50]) {
            let fault = format!("{operation}@{n}");
            let options = ["--frames", "6M", "--low", "1M", "--swap-fault", &fault];
            let (run, _) = run(SOFT, "workload=kmap scale=1500", &options)?;
            ensure!(run.end == status::FAILURE, "{fault}: expected {:?}:\n{run}", status::FAILURE);
            let what = if operation == "read" { "reading" } else { "writing" };
            let said = run.stderr.contains(&format!("swap: {what}")) && run.stderr.contains("os error 5");
            ensure!(said, "{fault} is not said:\n{run}");
            ensure!(!run.lines().join("\n").contains("verdict="), "the guest ran on:\n{run}");
        }
    }
    Ok(())
}

fn full_swap() -> Verdict {
    let (run, _) = run(SOFT, "workload=kmap scale=2000", &["--frames", "6M", "--low", "1M", "--swap", "1M"])?;
    ensure!(run.end == status::FAILURE, "expected {:?}:\n{run}", status::FAILURE);
    ensure!(run.stderr.contains("swap has 0 of 256 slots free"), "the reason is not said:\n{run}");
    Ok(())
}

/// The file is sparse: that the disk has no room for it shows when a page is written, in part or not at all.
fn full_disk() -> Verdict {
    let mut command = Command::new("unshare");
    let script = r#"mount -t tmpfs -o size=1m none /mnt && exec "$0" run --backend soft --frames 6M --low 1M \
        --swap /mnt/swap --append 'workload=kmap scale=2000'"#;
    command.args(["--mount", "sh", "-c", script]).arg(program()).stdin(Stdio::null());
    let run = judge(process::run(&mut command, Duration::from_secs(80))?)?;
    ensure!(run.end == status::FAILURE, "expected {:?}:\n{run}", status::FAILURE);
    let said = run.stderr.contains("swap: writing") && run.stderr.contains("os error 28");
    ensure!(said, "the reason is not said:\n{run}");
    ensure!(!run.lines().join("\n").contains("verdict="), "the guest ran on:\n{run}");
    Ok(())
}

fn refused() -> Verdict {
    expect_sentence(&SOFT.run(&["--frames", "1M"])?, &["--frames", "at 0s", "at least"])?;
    expect_sentence(&SOFT.run(&["--frames", "8M@0s,1M@5s"])?, &["--frames", "at 5s", "at least"])?;
    expect_sentence(&SOFT.run(&["--frames", "8M", "--low", "8M"])?, &["--frames", "low memory"])?;
    // Not what was asked for, and no less than that without a word.
    expect_sentence(
        &SOFT.run(&["--mem", "32M", "--frames", "64M"])?,
        &["--frames", "at 0s", "more than there are"],
    )?;
    expect_sentence(
        &SOFT.run(&["--mem", "32M", "--frames", "16M@0s,1G@5s"])?,
        &["--frames", "at 5s", "at most"],
    )?;
    for options in [&["--swap", "8M"][..], &["--frames", "8M,4M"], &["--frames", "8M", "--swap-fault", "x@1"]]
    {
        let run = SOFT.run(options)?;
        ensure!(run.end == status::USAGE, "{options:?}: expected {:?}:\n{run}", status::USAGE);
    }
    Ok(())
}
