//! Soaks: a guest under all that pressure can do, and hostile images.
//!
//! *The guest*: 4 CPUs with sticky TLBs, the oracle on, as always; 4 importers that come and go, one of them at times by a signal;
//! waves of the budget and of the balloon. No violation, no wrong byte, and at the end nothing is left: see `chaos`.
//! `UMBRA_SECONDS=1800 cargo test --test e2e soak_of_a_guest` goes on for so long.
//!
//! *Hostile images*: noise with tables of noise, the built-in guest with bytes changed, bytes without sense. Every run
//! must end in a documented way, without a panic, soon after its time limit, and within its address space.
//! `UMBRA_IMAGES=n` runs n images each way, `UMBRA_SEED=n` begins elsewhere. A failure prints its seed, and leaves the
//! image behind.

use std::fs;
use std::process::Command;
use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use umbra_guest::{PAGER, PAGER_PLAIN};

use super::chaos::{self, Plan};
use super::umbra::{Way, file_of, judge, program, status, ways};
use crate::ensure;
use crate::support::noise::Noise;
use crate::support::process::{self, End, Outcome};
use crate::support::{Verdict, case};

/// Images that nobody asked for.
const IMAGES: u64 = 12;
/// What a run may take beyond its time limit, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// Address space beyond guest memory, in MiB: the program, its threads' stacks, tables, caches.
const SPACE_MIB: u64 = 640;

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let soak = |way: Way| {
        case(format!("{}_hostile_images_end_in_a_known_way", way.name), way.needs, move || soak(way))
    };
    let guest =
        case("soft_sticky_soak_of_a_guest_with_importers_and_pressure_returns_everything", &[], guest);
    ways().map(soak).chain([guest]).collect()
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// `UMBRA_SEED` chooses what happens.
fn guest() -> Verdict {
    let time = Duration::from_secs(number("UMBRA_SECONDS", 4));
    chaos::run(Plan { vcpus: 4, importers: 4, hostile: false, time }, number("UMBRA_SEED", 1))
}

fn soak(way: Way) -> Verdict {
    let first = number("UMBRA_SEED", 1);
    (first..first + number("UMBRA_IMAGES", IMAGES)).try_for_each(|seed| one(way, seed))
}

fn image(noise: &mut Noise) -> Vec<u8> {
    match noise.below(8) {
        0..=3 => noise.kernel(),
        4 => noise.damaged(PAGER),
        5 => noise.damaged(PAGER_PLAIN),
        6 => {
            let kernel = noise.kernel();
            noise.damaged(&kernel)
        }
        _ => {
            let count = noise.below(0x4000) as usize;
            noise.bytes(count)
        }
    }
}

/// One image, with options of its seed's choice.
fn one(way: Way, seed: u64) -> Verdict {
    let mut noise = Noise::new(seed);
    let file = file_of(&image(&mut noise))?;
    let mib = noise.pick(&[2_u64, 3, 8, 64]);
    let append = noise.pick(&["", "workload=hello", "workload=mm paging=legacy", "workload=kmap seed=7"]);
    let pages = noise.pick(&["64", "65", "4096"]);
    let timeout = Duration::from_millis(100 + u64::from(noise.below(300)));

    // The shell alone can limit the address space of what becomes of it.
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v $1; shift; exec \"$@\"", "sh"]);
    command.arg(((mib + SPACE_MIB) << 10).to_string()).arg(program()).arg("run");
    command.args(way.options).args([
        "--mem",
        &format!("{mib}M"),
        "--append",
        append,
        "--shadow-pages",
        pages,
    ]);
    command.args(["--timeout", &format!("{}ms", timeout.as_millis())]).arg(file.path());
    let verdict = process::run(&mut command, timeout + PATIENCE).map_err(Failed::from);
    let verdict = verdict.and_then(judge).and_then(|run| check(&run));
    verdict.map_err(|why| {
        let kept = std::env::temp_dir().join(format!("umbra-{}-{seed}.image", way.name));
        let left = fs::copy(file.path(), &kept)
            .map_or_else(|error| error.to_string(), |_| kept.display().to_string());
        format!("seed {seed} ({left}): {}", why.message().unwrap_or_default()).into()
    })
}

/// A guest's own status is odd, or 0; ours are listed.
fn check(run: &Outcome) -> Verdict {
    let ours =
        [status::OPERATOR, status::FAILURE, status::WITNESS, status::TIMEOUT, status::RESET, End::Status(0)];
    let guests = matches!(run.end, End::Status(code) if code % 2 == 1);
    ensure!(guests || ours.contains(&run.end), "an image cannot end this way:\n{run}");
    for sign in ["audit:", "INV-", "mistake in Umbra", "KVM cannot go on"] {
        ensure!(!run.stderr.contains(sign), "'{sign}' is no fault of the image:\n{run}");
    }
    Ok(())
}
