//! The guest kernel's scenes: with a rule in force each case passes, and with it switched off it fails in the way that was feared.
//!
//! Story: guest/src/kernel/scene.h has the cases and the form of what they print. On the soft backend each is run on one vCPU and on
//! two, deterministically, with several seeds: whatever the host's scheduling, the outcome is the same. A deadlock is not believed
//! on its word: the cycle is to be found in the lines of those who hold and wait.

use std::collections::{BTreeMap, BTreeSet};

use libtest_mimic::{Failed, Trial};

use super::umbra::{KVM, SOFT, Way};
use crate::ensure;
use crate::support::process::{End, Outcome};
use crate::support::{Verdict, case};

/// A case, and as what it fails with its bug.
#[derive(Clone, Copy)]
struct Scene {
    workload: &'static str,
    name: &'static str,
    fails: Option<&'static str>,
    /// Among what it prints with the bug.
    with_bug: &'static [&'static str],
}

const fn scene(
    workload: &'static str,
    name: &'static str,
    fails: &'static str,
    with_bug: &'static [&'static str],
) -> Scene {
    Scene { workload, name, fails: Some(fails), with_bug }
}

const fn measured(workload: &'static str, name: &'static str) -> Scene {
    Scene { workload, name, fails: None, with_bug: &[] }
}

/// In the order of scene.h.
const SCENES: [Scene; 18] = [
    scene(
        "series",
        "order",
        "deadlock",
        &["reader holds a DEFAULT slot", "walker 1 waits for a DEFAULT slot"],
    ),
    scene("series", "spinlock", "sleep", &[]),
    scene("series", "border", "exhausted", &["measured PAGETABLE2-slots-held = 1 slots"]),
    scene("series", "clear", "type", &["measured PAGETABLE-slots-held = 0 slots"]),
    scene(
        "series",
        "walker",
        "deadlock",
        &["kswapd waits for a PAGETABLE slot", "walker 4 waits for a free frame"],
    ),
    scene("series", "spare", "deadlock", &["measured slots = 8 slots", "holder 8 holds a pool slot"]),
    scene("stack", "type", "type", &[]),
    scene("stack", "overflow", "nesting", &[]),
    scene("stack", "order", "order", &[]),
    scene("stack", "switch", "content", &[]),
    measured("stack", "slots"),
    scene("superblock", "direct", "deadlock", &["writer holds superblock", "writer waits for superblock"]),
    scene(
        "superblock",
        "kswapd",
        "deadlock",
        &["writer waits for a free frame", "kswapd waits for superblock"],
    ),
    scene("superblock", "inode", "deadlock", &["writer holds inode", "writer waits for inode"]),
    measured("superblock", "cures"),
    scene("superblock", "truncate", "content", &[]),
    scene("superblock", "recursive", "content", &[]),
    measured("superblock", "clustering"),
];

/// Runs of a case with and without its bug, for each number of vCPUs.
const SEEDS: u32 = 3;
/// What the guest's status 1 and 2 become.
const FAIL: End = End::Status(3);
const COMMAND_LINE: End = End::Status(5);

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let mut trials = vec![
        case("guest_scene_that_there_is_not_is_refused_with_a_list", &[], refused),
        case("guest_scenes_of_the_kernel_are_those_of_the_test", &[], same_cases),
        case("guest_scene_cycle_is_found_where_there_is_one_alone", &[], cycles),
        case("guest_scene_cures_measure_what_they_were_rejected_for", &[], cures),
        case("guest_scene_clustering_saves_writes", &[], clustering),
        case("guest_scene_slots_are_fewer_as_a_stack", &[], slots),
    ];
    for scene in SCENES {
        let name = format!("guest_scene_{}_{}", scene.workload, scene.name);
        trials.push(case(format!("soft_{name}"), &[], move || on_soft(&scene)));
        trials.push(case(format!("kvm_{name}"), KVM.needs, move || both(KVM, &scene, &["--vcpus", "1"], 1)));
    }
    trials
}

fn append(scene: &Scene, seed: u32, bug: bool) -> String {
    let bug = if bug { " bug" } else { "" };
    format!("workload={} case={} seed={seed}{bug}", scene.workload, scene.name)
}

/// The console: ASCII, or nothing.
fn console(run: &Outcome) -> &str {
    std::str::from_utf8(&run.stdout).unwrap_or_default()
}

/// What the case says of itself.
fn told<'a>(scene: &Scene, run: &'a Outcome) -> Vec<&'a str> {
    let prefix = format!("scenario {}: ", scene.name);
    console(run).lines().filter_map(|line| line.strip_prefix(prefix.as_str())).collect()
}

fn in_form(scene: &Scene, run: &Outcome) -> Verdict {
    let lines = told(scene, run);
    ensure!(lines.first() == Some(&"begin"), "no begin:\n{run}");
    for line in &lines {
        let fact = [" holds ", " waits for ", " lets go of "].iter().any(|verb| line.contains(verb));
        let known = ["saw ", "measured ", "failed "].iter().any(|word| line.starts_with(word));
        ensure!(fact || known || ["begin", "passed"].contains(line), "not a form of line: {line}\n{run}");
        ensure!(line.is_ascii() && line.len() + scene.name.len() + 11 <= 120, "not ASCII, or long: {line}");
    }
    Ok(())
}

/// Everybody who cannot go on whatever others do: who waits for what only such as cannot go on hold.
fn has_cycle(lines: &[&str]) -> bool {
    let (mut holders, mut waits) = (BTreeMap::<&str, BTreeSet<&str>>::new(), BTreeMap::new());
    for line in lines.iter().filter(|line| !line.starts_with("saw ")) {
        if let Some((who, what)) = line.split_once(" holds ") {
            holders.entry(what).or_default().insert(who);
        } else if let Some((who, what)) = line.split_once(" waits for ") {
            waits.insert(who, what);
        }
    }
    let mut stuck: BTreeSet<&str> = waits.keys().copied().collect();
    loop {
        let stays = |who: &&str| {
            let held = waits.get(who).and_then(|what| holders.get(what));
            held.is_some_and(|held| held.iter().all(|holder| stuck.contains(holder)))
        };
        let left: BTreeSet<&str> = stuck.iter().copied().filter(|who| stays(who)).collect();
        if left.len() == stuck.len() {
            return !stuck.is_empty();
        }
        stuck = left;
    }
}

fn cycles() -> Verdict {
    let waits_only = ["a holds x", "b waits for x"];
    let two = ["a holds x", "b waits for x", "b holds y", "a waits for y"];
    let one_may_give = ["a holds a slot", "a waits for a slot", "b holds a slot"];
    let told = ["saw a holds x", "a waits for x"];
    ensure!(has_cycle(&two), "a cycle of two is one");
    ensure!(has_cycle(&["a holds x", "a waits for x"]), "who waits for what it has waits for ever");
    for lines in [&waits_only[..], &one_may_give, &told, &two[..3]] {
        ensure!(!has_cycle(lines), "there is no cycle in {lines:?}");
    }
    Ok(())
}

fn run_one(way: Way, scene: &Scene, options: &[&str], seed: u32, bug: bool) -> Verdict {
    let append = append(scene, seed, bug);
    let run = way.run(&[options, &["--append", &append]].concat())?;
    in_form(scene, &run)?;
    let lines = told(scene, &run);
    let last = lines.last().copied().unwrap_or_default();
    let Some(kind) = scene.fails.filter(|_| bug) else {
        ensure!(run.end == End::Status(0) && last == "passed", "{append} {options:?} did not pass:\n{run}");
        return Ok(());
    };
    let failed = last.starts_with(&format!("failed {kind}: "));
    ensure!(run.end == FAIL && failed, "{append} {options:?} did not fail by {kind}:\n{run}");
    for wanted in scene.with_bug {
        ensure!(lines.contains(wanted), "{append} {options:?} does not say `{wanted}`:\n{run}");
    }
    ensure!(
        kind != "deadlock" || has_cycle(&lines),
        "{append} {options:?}: no cycle in what it prints:\n{run}"
    );
    Ok(())
}

fn both(way: Way, scene: &Scene, options: &[&str], seed: u32) -> Verdict {
    run_one(way, scene, options, seed, false)?;
    if scene.fails.is_some() {
        run_one(way, scene, options, seed, true)?;
    }
    Ok(())
}

fn on_soft(scene: &Scene) -> Verdict {
    for vcpus in ["1", "2"] {
        for seed in 1..=SEEDS {
            let text = seed.to_string();
            both(SOFT, scene, &["--vcpus", vcpus, "--deterministic", "--seed", &text], seed)?;
        }
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
    let theirs: Vec<_> = text.lines().filter_map(row).collect();
    let ours: Vec<_> = SCENES
        .iter()
        .map(|scene| (scene.workload.to_owned(), scene.name.to_owned(), scene.fails.is_some()))
        .collect();
    ensure!(theirs == ours, "scene.h has {theirs:?}, and this test {ours:?}");
    Ok(())
}

fn figures(workload: &'static str, name: &'static str) -> Result<BTreeMap<String, u32>, Failed> {
    let scene = measured(workload, name);
    let run = SOFT.run(&["--append", &append(&scene, 1, false)])?;
    let mut figures = BTreeMap::new();
    for line in told(&scene, &run) {
        let Some((name, rest)) = line.strip_prefix("measured ").and_then(|rest| rest.split_once(" = "))
        else {
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
