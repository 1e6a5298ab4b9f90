//! `umbra run --deterministic`: a seed is a run, to the last event.

use std::fs;
use std::ops::Range;

use libtest_mimic::{Failed, Trial};

use super::umbra::{file_of, status, umbra};
use crate::ensure;
use crate::support::process::End;
use crate::support::{Verdict, case, image, shared, traps};

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let mut cases = vec![
        case("simulation_of_one_cpu_is_the_same_for_a_seed", &[], || {
            same(&HELLO, &[1, 2, 3], &[&["vcpu 0: ran"], &["vcpu 0: Filled"]])
        }),
        case("simulation_of_two_cpus_and_swap_is_the_same_for_a_seed", &[], || same(&SWAP, &[4], &SWAPPED)),
        case("simulation_of_two_cpus_and_disks_is_the_same_for_a_seed", &[], || {
            // Who notifies a disk in memory serves it.
            same(&DISKS, &[5], &[&["vcpu 1: ran"], &["vcpu", "waits for a transfer"]])
        }),
        case("simulation_of_a_disk_in_a_file_is_the_same_for_a_seed", &[], disk_in_a_file),
        case("simulation_of_a_disk_that_fails_is_the_same_for_a_seed_and_loses_nothing", &[], || {
            same(&FAILING, &[1, 2], &[&["has a disk fail to write"]])
        }),
        case("simulation_under_stress_is_the_same_for_a_seed", &[], || same(&STRESS, &[2], &STRESSED)),
        case("simulation_under_stress_with_one_lock_is_the_same_for_a_seed", &[], || {
            same(&[&STRESS[..], &["--locks", "one"]].concat(), &[2], &STRESSED)
        }),
        case("simulation_of_modelled_hardware_is_the_same_for_a_seed", &[], modelled),
        case("simulation_of_modelled_hardware_traps_where_a_cpu_does", &[], traps_alike),
        case("simulation_in_which_a_guest_and_importers_store_to_the_same_pages", &[], shared_pages),
        case("simulations_of_two_seeds_are_two", &[], differ),
        case("simulation_refuses_what_has_an_order_of_its_own", &[], refused),
        case("simulation_that_finds_no_guest_leaves_an_earlier_event_log", &[], earlier),
    ];
    // Only a build for tests can leave a rule out.
    if std::env::var_os("UMBRA_BIN").is_none() {
        cases.push(case(
            "simulation_in_which_a_thread_waits_for_ever_says_who_waits_for_what",
            &[],
            deadlock,
        ));
        cases.push(case("simulation_in_which_a_thread_waits_for_itself_names_it_at_once", &[], own_gate));
        cases.push(case("simulation_in_which_a_wake_is_lost_ends_though_others_go_on", &[], lost_wake));
        cases.push(case("simulation_in_which_a_vcpu_gets_nowhere_names_the_instruction", &[], same_fault));
    }
    cases
}

const HELLO: [&str; 2] = ["--append", "workload=hello"];
const DISKS: [&str; 6] = ["--vcpus", "2", "--mem", "16M", "--append", "workload=disk scale=1"];
/// Of the guest's own writes to swap one in eight fails; the pages stay, and it finds in all what it stored.
const FAILING: [&str; 10] = [
    "--vcpus",
    "2",
    "--mem",
    "24M",
    "--disk",
    "64M,id=swap,write-errors=8",
    "--disk",
    "16M,id=file",
    "--append",
    "workload=reclaim pace=slow ram=9",
];
/// Pages go to swap and come back; the budget is cut at a virtual time.
const SWAP: [&str; 10] = [
    "--vcpus",
    "2",
    "--mem",
    "16M",
    "--frames",
    "3M@0s,2M@1ms",
    "--low",
    "1M",
    "--append",
    "workload=mm scale=1",
];

/// Importers come and go meanwhile, and whoever takes pages and tables away.
const STRESS: [&str; 11] = [
    "--vcpus",
    "2",
    "--mem",
    "16M",
    "--frames",
    "3M",
    "--low",
    "1M",
    "--stress",
    "--append",
    "workload=mm scale=1",
];

/// What there is in a run's log.
const SWAPPED: [&[&str]; 5] = [
    &["vcpu 1: ran"],
    &["clock: the budget changes"],
    &["reclaim", "frames free"],
    &["waits for a transfer"],
    &["interrupt"],
];
const STRESSED: [&[&str]; 8] = [
    &["stress: takes", "without sleep"],
    &["stress: takes", "of the shadow"],
    &["stress: takes", "of the importers'"],
    &["importer 2: stores"],
    &["importer 0: is given page"],
    &["tells importer"],
    &["its ear: has given"],
    &["importer 1, its ear: ends"],
];

/// The event log of a run that passes, and what the summary says of it.
fn log_of(seed: u64, options: &[&str]) -> Result<(Vec<String>, String), Failed> {
    let file = tempfile::NamedTempFile::new()?;
    let path = file.path().to_str().ok_or("a name that is not UTF-8")?;
    let seed = seed.to_string();
    let simulated = ["run", "--deterministic", "--seed", &seed, "--event-log", path];
    let run = umbra(simulated.iter().chain(options))?;
    ensure!(run.end == End::Status(0), "seed {seed} came to harm:\n{run}");
    let said = run.stderr.lines().find(|line| line.contains("virtual us, hash"));
    let said = said.ok_or_else(|| format!("no word of the log:\n{run}"))?.to_owned();
    let lines: Vec<_> = fs::read_to_string(path)?.lines().map(str::to_owned).collect();
    ensure!(said.contains(&format!("{} events", lines.len())), "{} lines in the log: {said}", lines.len());
    Ok((lines, said))
}

/// Twice the same; for all words of each of `wanted` there is a line.
fn same(options: &[&str], seeds: &[u64], wanted: &[&[&str]]) -> Verdict {
    for seed in seeds {
        let (first, second) = (log_of(*seed, options)?, log_of(*seed, options)?);
        let differs = first.0.iter().zip(&second.0).enumerate().find(|(_, (a, b))| a != b);
        ensure!(differs.is_none(), "seed {seed}, the first line that differs: {differs:?}");
        ensure!(first == second, "seed {seed}: {} and {}", first.1, second.1);
        let has = |words: &[&str]| first.0.iter().any(|line| words.iter().all(|word| line.contains(word)));
        for words in wanted {
            ensure!(has(words), "seed {seed}: nothing like {words:?} in {} lines", first.0.len());
        }
    }
    Ok(())
}

/// Each of the four hosts, below native kernels and interpreted ones.
fn modelled() -> Verdict {
    for supervisor in ["native", "interpret"] {
        let model = ["--backend", "model", "--supervisor", supervisor];
        let wanted: [&[&str]; 3] = [&["vcpu 1: trap 0xe"], &["stress: takes"], &["is given page"]];
        same(&[&model[..], &STRESS].concat(), &[0, 1, 2, 3], &wanted)?;
    }
    Ok(())
}

/// Like the interpreter, whoever runs the kernel.
fn traps_alike() -> Verdict {
    const DONE: i32 = 3 << 1 | 1;
    let backends: [&[&str]; 3] = [
        &["--backend", "soft"],
        &["--backend", "model", "--supervisor", "native"],
        &["--backend", "model", "--supervisor", "interpret"],
    ];
    for table in traps::TABLES {
        let image = file_of(&image::multiboot(&traps::guest(table)))?;
        let path = image.path().to_str().ok_or("a name that is not UTF-8")?;
        for (backend, seed) in backends.iter().flat_map(|backend| (0..4).map(move |seed| (backend, seed))) {
            let seed = seed.to_string();
            let run = umbra(["run", path, "--deterministic", "--seed", &seed].iter().chain(*backend))?;
            ensure!(run.end == End::Status(DONE), "table at {table:#x}, {backend:?}, seed {seed}:\n{run}");
        }
    }
    Ok(())
}

/// Whoever finds that a store of his is gone says so.
fn shared_pages() -> Verdict {
    const SEEDS: Range<u64> = 0..10;
    let image = file_of(&image::multiboot(&shared::guest(2000)))?;
    let image = image.path().to_str().ok_or("a name that is not UTF-8")?;
    let options = [image, "--mem", "3M", "--low", "1M", "--vcpus", "2", "--tlb", "sized", "--stress"];
    let mut stored = 0;
    for seed in SEEDS {
        let lines = log_of(seed, &options)?.0;
        stored += lines.iter().filter(|line| line.contains("importer 2: stores")).count();
    }
    ensure!(stored > SEEDS.count(), "importers have stored {stored} times");
    println!("importers have stored {stored} times");
    if std::env::var_os("UMBRA_BIN").is_none() {
        let words = ["simulate", "--seeds", "0..200", "--"].iter().chain(&options);
        let run = umbra(words.chain(&["--omit", "gate-at-fill"]))?;
        println!("{}", run.stderr);
        let lost =
            run.stderr.contains("the word of importer") || run.stderr.contains("the guest ended with 1");
        ensure!(lost, "nobody has lost a store:\n{run}");
    }
    Ok(())
}

/// Its own thread serves it. Each run begins with an empty one.
fn disk_in_a_file() -> Verdict {
    let run = || -> Result<(Vec<String>, String), Failed> {
        let disk = tempfile::NamedTempFile::new()?;
        disk.as_file().set_len(16 << 20)?;
        let disk = format!("{},id=swap", disk.path().to_str().ok_or("a name that is not UTF-8")?);
        log_of(8, &[&DISKS[..], &["--disk", &disk]].concat())
    };
    let (first, second) = (run()?, run()?);
    let served = first.0.iter().any(|line| line.contains("disk 'swap': waits for a transfer"));
    ensure!(served, "its thread has served nothing in {} lines", first.0.len());
    ensure!(first == second, "{} and {}", first.1, second.1);
    Ok(())
}

/// Not only in the line that names the seed, nor only in how long things take.
fn differ() -> Verdict {
    let order = |seed| -> Result<Vec<String>, Failed> {
        let words = |line: String| line.split_once(' ').map(|(_, rest)| rest.to_owned());
        Ok(log_of(seed, &DISKS)?.0.into_iter().skip(1).filter_map(words).collect())
    };
    ensure!(order(6)? != order(7)?, "two seeds, one order");
    Ok(())
}

/// Nobody is asked to flush, and so nobody answers: whoever wants an answer of all waits for its own vCPU first.
fn deadlock() -> Verdict {
    let simulated =
        ["run", "--deterministic", "--seed", "1", "--tlb", "sticky", "--omit", "request-at-shootdown"];
    let run = umbra(simulated.iter().chain(&SWAP))?;
    ensure!(run.end == status::DEADLOCK, "expected {:?}:\n{run}", status::DEADLOCK);
    for words in [
        "some wait for each other",
        "the cycle:\n    vcpu 0 waits for the answer of vCPU 0, which vcpu 0 owes\n",
        "vcpu 1 waits for a wake",
        "with the seed",
    ] {
        ensure!(run.stderr.contains(words), "the report should say {words:?}:\n{run}");
    }
    Ok(())
}

const SEEDS_TRIED: u32 = 8;

/// By the same guest, which has a thread that looks at the time for ever: what is said without the rule, by the first of a few seeds that
/// misses it.
fn stuck(rule: &str, words: &[&str]) -> Verdict {
    let by_seed = |seed: u32| {
        let seed = seed.to_string();
        let omit = [
            "run",
            "--deterministic",
            "--seed",
            &seed,
            "--tlb",
            "sticky",
            "--timeout",
            "60s",
            "--omit",
            rule,
        ];
        umbra(omit.iter().chain(&STRESS))
    };
    let mut run = by_seed(1)?;
    for seed in 2..=SEEDS_TRIED {
        if run.end == status::DEADLOCK {
            break;
        }
        run = by_seed(seed)?;
    }
    ensure!(run.end == status::DEADLOCK, "{rule}: expected {:?}:\n{run}", status::DEADLOCK);
    for words in words {
        ensure!(run.stderr.contains(words), "{rule}: the report should say {words:?}:\n{run}");
    }
    Ok(())
}

/// Who has closed a gate sleeps at it: at once.
fn own_gate() -> Verdict {
    stuck("open-before-wait", &["some wait for each other", "the cycle:\n    vcpu ", " waits for gate "])?;
    let omit = ["run", "--deterministic", "--seed", "2", "--omit", "open-before-wait"];
    let run = umbra(omit.iter().chain(&STRESS))?;
    let line = run
        .stderr
        .lines()
        .find(|line| line.starts_with("    "))
        .ok_or_else(|| format!("no cycle:\n{run}"))?;
    let (who, holds) =
        line.trim().split_once(" waits for gate ").ok_or_else(|| format!("no gate: {line}"))?;
    ensure!(holds.ends_with(&format!(", which {who} holds")), "another has it: {line}");
    Ok(())
}

/// Nobody has closed the gate any more, and nobody has woken who sleeps at it.
fn lost_wake() -> Verdict {
    stuck("wake-at-open", &[" has waited for longer than 10 s", " waits for gate ", " can go on"])
}

/// Nobody waits, and nobody gets on.
fn same_fault() -> Verdict {
    for rule in ["flush-at-invlpg", "drop-at-invlpg"] {
        stuck(rule, &["vcpu ", " gets nowhere: the instruction at 0x", " has faulted for 0x"])?;
    }
    Ok(())
}

fn refused() -> Verdict {
    let kvm = umbra(["run", "--deterministic", "--backend", "kvm"])?;
    ensure!(
        kvm.end == status::OPERATOR && kvm.stderr.contains("leave out --backend kvm"),
        "KVM has an order of its own:\n{kvm}"
    );
    let model = umbra(["run", "--backend", "model"])?;
    ensure!(
        model.end == status::OPERATOR && model.stderr.contains("add --deterministic"),
        "a model is of simulations:\n{model}"
    );
    let judged = umbra(["run", "--deterministic", "--backend", "model", "--check-guest-tlb"])?;
    ensure!(
        judged.end == status::OPERATOR && judged.stderr.contains("--check-guest-tlb"),
        "nobody judges native code:\n{judged}"
    );
    for option in [["--qmp", "/nowhere/q"], ["--export", "/nowhere/e"]] {
        let run = umbra(["run", "--deterministic"].iter().chain(&option))?;
        ensure!(run.end == status::USAGE && run.stderr.contains(option[0]), "{option:?}:\n{run}");
    }
    let alone = umbra(["run", "--seed", "1"])?;
    ensure!(alone.end == status::USAGE && alone.stderr.contains("--deterministic"), "a seed alone:\n{alone}");
    let nowhere = umbra(["run", "--deterministic", "--event-log", "/nowhere/at/all"])?;
    ensure!(
        nowhere.end == status::OPERATOR && nowhere.stderr.contains("/nowhere/at/all"),
        "no such folder:\n{nowhere}"
    );
    Ok(())
}

/// An event log is in the place of an earlier one as soon as there is a guest, and no other option's file.
fn earlier() -> Verdict {
    let log = tempfile::NamedTempFile::new()?;
    fs::write(log.path(), "an earlier run's")?;
    let path = log.path().to_str().ok_or("a name that is not UTF-8")?;
    let run = ["run", "--deterministic", "--event-log", path];
    let failed = umbra(run.iter().chain(&["/no/such/image"]))?;
    ensure!(failed.end == status::OPERATOR, "there is no image:\n{failed}");
    ensure!(fs::read(path)? == b"an earlier run's", "the log has gone, and for nothing:\n{failed}");
    let both = umbra(run.iter().chain(&["--json", path]))?;
    ensure!(both.end == status::OPERATOR && both.stderr.contains("another option"), "two in one:\n{both}");
    let hello = umbra(run.iter().chain(&HELLO))?;
    ensure!(
        hello.end == End::Status(0) && fs::read(path)?.starts_with(b"0 umbra: seed "),
        "no log:\n{hello}"
    );
    Ok(())
}
