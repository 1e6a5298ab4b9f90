//! Memory over time: `--status`, `--plot`, and the series of `--json`.

use std::path::Path;

use libtest_mimic::{Failed, Trial};
use serde_json::Value;

use super::umbra::{SOFT, expect_sentence, status};
use crate::ensure;
use crate::support::process::{End, Outcome};
use crate::support::{Verdict, case};

/// More guest than frames.
const PRESSED: [&str; 4] = ["--frames", "8M", "--low", "1M"];
/// The columns that count from the start on.
const COUNTS: [&str; 9] = [
    "refaults",
    "swap_outs",
    "swap_writes",
    "zero_drops",
    "clean_drops",
    "invalidations",
    "direct_reclaims",
    "gate_waits",
    "page_waits",
];
/// Those of a moment.
const LEVELS: [&str; 8] = [
    "budget",
    "frames_used",
    "frames_free",
    "resident",
    "swapped",
    "ballooned",
    "shadow_pages",
    "balloon_actual",
];

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    vec![
        case("soft_pressed_guest_leaves_a_series_and_a_plot", &[], pressed),
        case("status_is_a_plain_line_a_second_without_a_terminal", &[], status_lines),
        case("run_that_nobody_asks_about_says_its_verdict_alone", &[], silent),
        case("plot_that_cannot_be_written_is_refused", &[], plot_nowhere),
    ]
}

/// Starts a guest under pressure with these options.
type Start<'a> = &'a dyn Fn(&[&str]) -> Result<Outcome, Failed>;

/// Runs with everything on, and gives what was written: the summary and the picture.
fn run(start: Start) -> Result<(Outcome, Value, String), Failed> {
    let folder = tempfile::tempdir()?;
    let file = |name| folder.path().join(name).to_string_lossy().into_owned();
    let (json, plot) = (file("summary.json"), file("memory.svg"));
    let asked = ["--status", "--json", &json, "--plot", &plot];
    let run = start(&[&PRESSED[..], &asked].concat())?;
    let summary = serde_json::from_str(&std::fs::read_to_string(json)?)?;
    Ok((run, summary, std::fs::read_to_string(plot)?))
}

fn column(summary: &Value, name: &str) -> Result<Vec<u64>, Failed> {
    let values = summary["series"][name].as_array().ok_or_else(|| format!("no column {name}"))?;
    let numbers: Option<_> = values.iter().map(Value::as_u64).collect();
    numbers.ok_or_else(|| format!("{name} has something else than numbers: {values:?}").into())
}

fn pressed() -> Verdict {
    let (run, summary, plot) =
        run(&|options| SOFT.run(&[&["--append", "workload=kmap scale=2000"], options].concat()))?;
    ensure!(run.end == End::Status(0), "the guest failed:\n{run}");
    let last = run.stderr.lines().last().unwrap_or_default();
    ensure!(last.starts_with("umbra: verdict=PASS"), "the verdict is not the last line:\n{run}");
    check_series(&summary)?;
    check_plot(&plot, &["workload=kmap", "soft, PASS", "memory (MiB)"])
}

fn check_series(summary: &Value) -> Verdict {
    let at = column(summary, "at_micros")?;
    ensure!(at.len() >= 2 && at.is_sorted_by(|a, b| a < b), "not in order of time: {at:?}");
    for name in LEVELS.iter().chain(&COUNTS) {
        let values = column(summary, name)?;
        ensure!(values.len() == at.len(), "{name} has {} values of {}", values.len(), at.len());
        ensure!(!COUNTS.contains(name) || values.is_sorted(), "{name} counts backwards: {values:?}");
    }
    for name in ["guest_free", "guest_swap_ins", "guest_swapped"] {
        // The guest says it in its own time.
        let values = summary["series"][name].as_array();
        let said = |value: &Value| value.is_null() || value.is_u64();
        let good = values.is_some_and(|all| all.len() == at.len() && all.iter().all(said));
        ensure!(good, "{name} is something else than numbers, or not known yet: {values:?}");
    }
    let budget = column(summary, "budget")?;
    ensure!(budget.iter().all(|frames| *frames == 2048), "8M are 2048 frames, not {budget:?}");
    for name in ["resident", "swapped", "refaults", "swap_outs", "invalidations"] {
        let last = column(summary, name)?.last().copied();
        ensure!(last > Some(0), "{name} is {last:?} at the end: no pressure");
    }
    let host = column(summary, "host_backs")?;
    ensure!(host.iter().all(|pages| (1..=2048).contains(pages)), "the host backs {host:?}, of 2048");
    let refaults = column(summary, "refaults")?.last().copied();
    let total = summary["memory"]["refaults"].as_u64();
    ensure!(refaults <= total, "the series has {refaults:?} refaults, the whole run {total:?}");
    Ok(())
}

fn check_plot(plot: &str, words: &[&str]) -> Verdict {
    let document = roxmltree::Document::parse(plot)?;
    ensure!(document.root_element().tag_name().name() == "svg", "no SVG:\n{plot}");
    for word in words {
        ensure!(plot.contains(word), "the plot does not have {word}:\n{plot}");
    }
    for class in [
        "resident",
        "swapped",
        "free",
        "budget",
        "refaults",
        "swap-outs",
        "invalidations",
        "backed",
        "stalls",
    ] {
        let class = format!("curve {class}");
        let curves = document.descendants().filter(|node| node.attribute("class") == Some(&class)).count();
        ensure!(curves == 2, "{class}: {curves} lines, not the legend's and its own:\n{plot}");
    }
    Ok(())
}

/// The guest jumps to itself.
fn status_lines() -> Verdict {
    let (run, summary, plot) =
        run(&|options| SOFT.boot(&[0xeb, 0xfe], &[&["--timeout", "2500ms"], options].concat()))?;
    ensure!(run.end == status::TIMEOUT, "expected {:?}:\n{run}", status::TIMEOUT);
    ensure!(!run.stderr.contains('\r'), "a line is rewritten where there is no terminal:\n{run}");
    let lines: Vec<_> = run.stderr.lines().filter(|line| line.contains("  resident ")).collect();
    ensure!((1..=2).contains(&lines.len()), "{} lines in 2.5 s:\n{run}", lines.len());
    for word in ["umbra: ", "s  resident ", "M  swapped ", "M of 8.0M  refaults ", "/s  invalidations "] {
        ensure!(lines.iter().all(|line| line.contains(word)), "a line without '{word}':\n{run}");
    }
    let at = column(&summary, "at_micros")?;
    ensure!(at.last() > Some(&2_000_000), "the series ends early: {at:?}");
    check_plot(&plot, &["soft, TIMEOUT"])
}

fn silent() -> Verdict {
    let run = SOFT.run(&["--append", "workload=hello"])?;
    ensure!(run.end == End::Status(0), "hello failed:\n{run}");
    ensure!(run.stderr.lines().count() == 1, "there is more than the verdict:\n{run}");
    Ok(())
}

fn plot_nowhere() -> Verdict {
    let path = "/no/such/folder/memory.svg";
    ensure!(!Path::new("/no/such/folder").exists(), "there is a /no/such/folder");
    expect_sentence(&SOFT.run(&["--plot", path])?, &["--plot", path, "folder that exists"])
}
