//! `umbra simulate`: seeds until one fails, and one as a timeline.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use libtest_mimic::Trial;

use super::umbra::{file_of, program, status, umbra};
use crate::ensure;
use crate::support::process::{End, Outcome};
use crate::support::{Verdict, case, image};

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let mut cases = vec![
        case("simulate_runs_each_seed_and_counts_those_that_pass", &[], passes),
        case("simulate_stops_at_the_lowest_seed_that_fails_whatever_jobs_there_are", &[], lowest),
        case("simulate_says_that_a_run_hangs_when_its_patience_is_over", &[], hangs),
        case("simulate_leaves_no_run_behind_when_it_is_killed", &[], killed),
        case("simulate_replays_a_seed_as_a_timeline", &[], replay),
        case("simulate_with_failures_of_swap_takes_them_for_what_they_are", &[], io_failures),
        case("simulate_refuses_what_makes_no_sense_before_the_first_run", &[], refused),
    ];
    // Only a build for tests can leave a rule out.
    if std::env::var_os("UMBRA_BIN").is_none() {
        cases.push(case("simulate_finds_a_flush_that_is_left_out", &[], omission));
    }
    cases
}

/// From one look at a process to the next, and how many there are: half a minute's.
const LOOK: Duration = Duration::from_millis(10);
const LOOKS: u32 = 3000;
const HELLO: [&str; 3] = ["--", "--append", "workload=hello"];
/// Of the seeds from 9 on, 10 and 11 have a pace at which the guest takes longer: it is virtual time.
const SHORT: [&str; 2] = ["--timeout", "1200us"];

fn passes() -> Verdict {
    let run = umbra(["simulate", "--seeds", "10..13", "--jobs", "2"].iter().chain(&HELLO))?;
    ensure!(run.end == End::Status(0) && run.stderr.contains("3 seeds passed in"), "not all:\n{run}");
    ensure!(run.stdout.is_empty(), "it has nothing to say there:\n{run}");
    Ok(())
}

fn lowest() -> Verdict {
    for jobs in ["1", "8"] {
        let sweep = ["simulate", "--seeds", "9..12", "--jobs", jobs];
        let run = umbra(sweep.iter().chain(&HELLO).chain(&SHORT))?;
        ensure!(run.end == status::TIMEOUT, "expected {:?}:\n{run}", status::TIMEOUT);
        for words in [
            "seed 10: the run ended with status 10",
            "the guest did not end within --timeout",
            // It takes that long in any order.
            "and so it does if the seed chooses 0 times who runs next",
            "  umbra run --deterministic --seed 10 --append workload=hello --timeout 1200us --choices 0\n",
            "  umbra simulate --replay 10 -- --append workload=hello --timeout 1200us --choices 0\n",
        ] {
            ensure!(run.stderr.contains(words), "{jobs} jobs, it should say {words:?}:\n{run}");
        }
    }
    let again = ["run", "--deterministic", "--seed", "10"].iter().chain(&HELLO[1..]).chain(&SHORT);
    let again = umbra(again)?;
    ensure!(again.end == status::TIMEOUT, "the same again is another:\n{again}");
    Ok(())
}

/// Under stress, so that who meets the failure is any of them. Without the option they are failures of the run.
fn io_failures() -> Verdict {
    let failing =
        ["--mem", "16M", "--low", "1M", "--frames", "2M", "--stress", "--append", "workload=mm scale=1"];
    let run = umbra(["simulate", "--seeds", "0..10", "--io-failures", "--"].iter().chain(&failing))?;
    ensure!(run.end == End::Status(0) && run.stderr.contains("10 seeds passed in"), "not all:\n{run}");
    ensure!(run.stderr.contains(" ended by their swap\n"), "no swap has failed:\n{run}");
    let fault = ["--swap-fault", "write@3"];
    let run = umbra(["simulate", "--seeds", "0..2", "--"].iter().chain(&failing).chain(&fault))?;
    let said =
        run.stderr.contains("swap: writing") && run.stderr.contains("seed 0: the run ended with status 6");
    ensure!(run.end == status::FAILURE && said, "expected {:?}:\n{run}", status::FAILURE);
    Ok(())
}

/// By a signal that it cannot see. A run has come to its guest once it has other threads than its first, and its guest never ends.
fn killed() -> Verdict {
    let image = file_of(&image::multiboot(&image::spin()))?;
    let mut sweep = Command::new(program());
    sweep.args(["simulate", "--seeds", "0..2", "--jobs", "1", "--"]).arg(image.path());
    let mut sweep = sweep.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let children = format!("/proc/{0}/task/{0}/children", sweep.id());
    let runs = || {
        let run = fs::read_to_string(&children).ok()?.split_whitespace().next()?.to_owned();
        (fs::read_dir(format!("/proc/{run}/task")).ok()?.count() > 1).then_some(run)
    };
    let run = (0..LOOKS).find_map(|_| runs().or_else(pause));
    sweep.kill()?;
    sweep.wait()?;
    let run = run.ok_or("the sweep has started no run")?;
    let is_gone = || (!Path::new("/proc").join(&run).join("task").exists()).then_some(());
    ensure!(
        (0..LOOKS).find_map(|_| is_gone().or_else(pause)).is_some(),
        "run {run} goes on without its sweep"
    );
    Ok(())
}

fn pause<T>() -> Option<T> {
    thread::sleep(LOOK);
    None
}

fn hangs() -> Verdict {
    let long = ["--", "--append", "workload=spin scale=4000"];
    let run = umbra(["simulate", "--seeds", "0..2", "--patience", "300ms"].iter().chain(&long))?;
    ensure!(run.end == status::FAILURE, "expected {:?}:\n{run}", status::FAILURE);
    ensure!(run.stderr.contains("seed 0: the run hung: it has not ended in 300ms"), "no word of it:\n{run}");
    Ok(())
}

fn replay() -> Verdict {
    let show = || umbra(["simulate", "--replay", "10"].iter().chain(&HELLO).chain(&SHORT));
    let (first, second) = (show()?, show()?);
    ensure!(first.end == status::TIMEOUT, "the status is the run's:\n{first}");
    ensure!(first.stdout == second.stdout, "a seed, two timelines:\n{first}\n{second}");
    let shown = String::from_utf8_lossy(&first.stdout);
    let lines: Vec<_> = shown.lines().collect();
    let head = lines.first().ok_or("nothing is shown")?;
    for actor in ["vcpu 0", "reclaim", "clock", "balloon"] {
        let column = head.find(actor).ok_or_else(|| format!("no column for {actor}: {head}"))?;
        let begins = |line: &&str| line.get(column..).is_some_and(|from| from == "begins");
        ensure!(lines.iter().any(begins), "{actor} does not begin in its column:\n{first}");
    }
    let slices = |line: &&str| line.contains("ran ") && line.contains(" slices");
    ensure!(lines.iter().any(slices), "slices are not put together:\n{first}");
    Ok(())
}

fn refused() -> Verdict {
    for (options, words) in [
        (&["--seeds", "5..5"][..], "no seed in it"),
        (&["--seeds", "1..x"], "'x' is no number"),
        (&["--seeds", "7"], "no range"),
        (&["--seeds", "0..1", "--jobs", "0"], "--jobs"),
        (&[], "--seeds"),
        (&["--seeds", "0..1", "--", "--nonsense"], "--nonsense"),
        (&["--seeds", "0..1", "--", "--disk", "/nowhere/x"], ",ro"),
    ] {
        let run = umbra(["simulate"].iter().chain(options))?;
        ensure!(run.end == status::USAGE, "{options:?}: expected {:?}:\n{run}", status::USAGE);
        ensure!(run.stderr.contains(words), "{options:?}: it should say {words:?}:\n{run}");
    }
    let kvm = umbra(["simulate", "--seeds", "0..1", "--", "--backend", "kvm"])?;
    ensure!(kvm.end == status::OPERATOR && kvm.stderr.contains("leave out --backend kvm"), "{kvm}");
    Ok(())
}

/// With the options that it has by itself, but one.
fn omission() -> Verdict {
    let under_pressure =
        ["--low", "1M", "--frames", "3M@0s,2M@1ms", "--tlb", "sticky", "--append", "workload=mm scale=1"];
    let sweep =
        ["simulate", "--seeds", "0..20", "--", "--vcpus", "2", "--mem", "16M", "--omit", "flush-at-entry"];
    let run = umbra(sweep.iter().chain(&under_pressure))?;
    ensure!(run.end == status::INCOHERENT, "expected {:?}:\n{run}", status::INCOHERENT);
    for words in ["INV-TLB-2", "the run ended with status 16", "--omit flush-at-entry"] {
        ensure!(run.stderr.contains(words), "it should say {words:?}:\n{run}");
    }
    shrunk(&run, &sweep[4..], &under_pressure)
}

/// So few of the seed's choices are enough, and one fewer is not.
fn shrunk(found: &Outcome, options: &[&str], more: &[&str]) -> Verdict {
    let after = |words: &str| found.stderr.split_once(words)?.1.split([' ', ':']).next()?.parse::<u64>().ok();
    let seed = after("seed ").ok_or_else(|| format!("no seed:\n{found}"))?.to_string();
    let enough = after("if the seed chooses ").ok_or_else(|| format!("it is not shrunk:\n{found}"))?;
    let with = |choices: u64| {
        let choices = choices.to_string();
        let words = ["run", "--deterministic", "--seed", &seed, "--choices", &choices];
        umbra(words.iter().chain(options).chain(more))
    };
    let again = with(enough)?;
    ensure!(again.end == status::INCOHERENT, "{enough} choices are not enough:\n{again}");
    if let Some(fewer) = enough.checked_sub(1) {
        let other = with(fewer)?;
        ensure!(other.end != status::INCOHERENT, "{fewer} choices are enough too:\n{other}");
    }
    Ok(())
}
