//! Scenes of the guest's kernel, by themselves: what `umbra scenario` (`scenario.rs`) does not ask of them.
//!
//! Story: guest/src/kernel/scene.h has the cases and the form of what they print. With a rule in force each passes, and with it switched
//! off it fails in the way that was feared: on one vCPU too, where `umbra scenario` gives them two.

use std::collections::BTreeMap;

use libtest_mimic::{Failed, Trial};
use umbra::scenario::story::{Kind, Story};
use umbra::scenario::table::{Case, Play, SCENARIOS};

use super::umbra::SOFT;
use crate::ensure;
use crate::support::process::{End, Outcome};
use crate::support::{Verdict, case};

/// What the guest's status 1 and 2 become.
const FAIL: End = End::Status(3);
const COMMAND_LINE: End = End::Status(5);

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    vec![
        case("guest_scene_that_there_is_not_is_refused_with_a_list", &[], refused),
        case("guest_scenes_of_the_kernel_are_those_of_the_table", &[], same_cases),
        case("guest_scenes_pass_and_fail_on_one_cpu", &[], on_one_cpu),
        case("guest_scene_cures_measure_what_they_were_rejected_for", &[], cures),
        case("guest_scene_clustering_saves_writes", &[], clustering),
        case("guest_scene_slots_are_fewer_as_a_stack", &[], slots),
    ]
}

/// The guest's, with their workloads.
fn scenes() -> impl Iterator<Item = (&'static str, Case)> {
    let cases = SCENARIOS.iter().flat_map(|scenario| scenario.cases());
    cases.filter_map(|case| match case.play {
        Play::Guest(workload, _) => Some((workload, case)),
        _ => None,
    })
}

/// The console: ASCII, or nothing.
fn console(run: &Outcome) -> &str {
    std::str::from_utf8(&run.stdout).unwrap_or_default()
}

/// All lines of the case are facts, and short.
fn story(name: &str, run: &Outcome) -> Result<Story, Failed> {
    let story = Story::of(console(run), name);
    let lines: Vec<&str> = console(run).lines().filter(|line| line.starts_with("scenario ")).collect();
    ensure!(lines.len() == story.0.len(), "{} of {} lines are facts:\n{run}", story.0.len(), lines.len());
    let long = lines.iter().find(|line| !line.is_ascii() || line.len() > 120);
    ensure!(long.is_none(), "not ASCII, or long: {long:?}");
    Ok(story)
}

fn on_one_cpu() -> Verdict {
    let simulated = ["--deterministic", "--seed", "7", "--append"];
    for (workload, case) in scenes() {
        let append = format!("workload={workload} case={}", case.name);
        let run = SOFT.run(&[&simulated[..], &[&append]].concat())?;
        ensure!(
            run.end == End::Status(0) && story(case.name, &run)?.passed(),
            "{append} did not pass:\n{run}"
        );
        if case.fails.is_empty() {
            continue;
        }
        let run = SOFT.run(&[&simulated[..], &[&format!("{append} bug")]].concat())?;
        let story = story(case.name, &run)?;
        let kind = story.failure().map(|(kind, _)| kind);
        let feared = kind.is_some_and(|kind| case.fails.contains(&kind));
        ensure!(run.end == FAIL && feared, "{append} bug did not fail by {:?}:\n{run}", case.fails);
        let cycle = kind != Some(Kind::Deadlock) || !story.cycle().is_empty();
        ensure!(cycle, "{append} bug: no cycle in what it prints:\n{run}");
    }
    Ok(())
}

fn refused() -> Verdict {
    for (words, said) in [
        ("workload=series case=nothing", "case=spare [bug]"),
        ("workload=series", "case=order [bug]"),
        ("workload=stack case=slots bug", "case slots has no bug"),
        ("workload=stack case=direct", "case=type [bug]"),
        ("workload=hello bug", "are for workload=series, stack and superblock"),
        ("workload=hello case=order", "are for workload=series, stack and superblock"),
        ("workload=series case=a-name-that-is-too-long", "cannot use"),
    ] {
        let run = SOFT.run(&["--append", words])?;
        ensure!(
            run.end == COMMAND_LINE && console(&run).contains(said),
            "{words}: expected `{said}`:\n{run}"
        );
        ensure!(!console(&run).contains("scenario "), "{words}: it ran:\n{run}");
    }
    Ok(())
}

/// Names and bugs, as scene.h has them.
fn same_cases() -> Verdict {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../guest/src/kernel/scene.h");
    let text = std::fs::read_to_string(path)?;
    let row = |line: &str| {
        let parts: Vec<_> = line.trim().strip_prefix("X(")?.splitn(4, ", ").map(str::to_owned).collect();
        let [workload, _, name, rules] = parts.as_slice() else { return None };
        let has_bug = !rules.trim_start().starts_with("0)");
        Some((workload.to_lowercase(), name.trim_matches('"').to_owned(), has_bug))
    };
    let mut theirs: Vec<_> = text.lines().filter_map(row).collect();
    let row = |(workload, case): (&str, Case)| (workload.into(), case.name.into(), !case.fails.is_empty());
    let mut ours: Vec<_> = scenes().map(row).collect();
    theirs.sort();
    ours.sort();
    ensure!(theirs == ours, "scene.h has {theirs:?}, and the table {ours:?}");
    Ok(())
}

fn figures(workload: &str, name: &str) -> Result<BTreeMap<String, u32>, Failed> {
    let run = SOFT.run(&["--append", &format!("workload={workload} case={name}")])?;
    ensure!(story(name, &run)?.passed(), "it did not pass:\n{run}");
    let prefix = format!("scenario {name}: measured ");
    let mut figures = BTreeMap::new();
    for line in console(&run).lines() {
        let Some((name, rest)) = line.strip_prefix(&prefix).and_then(|rest| rest.split_once(" = ")) else {
            continue;
        };
        println!("{line}");
        figures.insert(name.to_owned(), rest.split(' ').next().unwrap_or_default().parse()?);
    }
    Ok(figures)
}

fn cures() -> Verdict {
    let figures = figures("superblock", "cures")?;
    let of = |name: &str| figures.get(name).copied().ok_or_else(|| format!("no figure {name}"));
    ensure!(of("noio-dirty-left")? == of("memalloc-dirty-left")?, "both scopes leave all dirty pages");
    ensure!(of("noio-clean-left")? < of("memalloc-clean-left")?, "NoIo takes clean ones, MemAlloc none");
    ensure!(of("recursive-dirty-left")? < of("noio-dirty-left")?, "a recursive lock lets reclaim write");
    ensure!(of("retry-dirty-left")? < of("noio-dirty-left")?, "a lock that is dropped lets reclaim write");
    ensure!(
        of("memalloc-looked-at")? == 0 && of("noio-looked-at")? > 0,
        "NoIo looks at pages, MemAlloc does not"
    );
    ensure!(
        of("recursive-taken-again")? > 0 && of("retry-dropped")? > 0,
        "what they were rejected for is counted"
    );
    Ok(())
}

fn clustering() -> Verdict {
    let figures = figures("superblock", "clustering")?;
    let of = |name: &str| figures.get(name).copied().ok_or_else(|| format!("no figure {name}"));
    let (slots, pages) = (of("by-slots-writes")?, of("by-slots-pages-written")?);
    ensure!(pages >= 16 * slots, "a write has many pages: {figures:?}");
    ensure!(of("at-scan-writes")? == of("at-scan-pages-written")?, "a write for each page: {figures:?}");
    ensure!(of("by-frames-writes")? >= 4 * slots, "an order of frames has few neighbours: {figures:?}");
    Ok(())
}

fn slots() -> Verdict {
    let figures = figures("stack", "slots")?;
    let of = |name: &str| figures.get(name).copied().ok_or_else(|| format!("no figure {name}"));
    ensure!(of("slots-by-stack")? < of("slots-by-types")?, "a stack needs fewer: {figures:?}");
    Ok(())
}
