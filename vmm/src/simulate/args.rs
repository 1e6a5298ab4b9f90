//! The command line of `umbra simulate`, and what it asks for.
//!
//! Holds: an [`Order`]'s options are such as `umbra run` takes, and two runs with them do not meet in a file.

use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::time::Duration;

use clap::{Args, Parser};

use crate::cli::{Cli, Command, RunArgs};
use crate::swap::Fault;
use crate::units::parse_duration;
use crate::virtio::disk::DiskSource;

/// Seeds of a sweep, at most.
pub const SEEDS_MAX: u64 = 1_000_000_000;
/// Runs at a time, at most.
pub const JOBS_MAX: u32 = 256;

/// What each run has where no options are given: two vCPUs that lose half of their memory to swap as they use it, by a TLB that
/// forgets nothing by itself.
pub const OPTIONS: [&str; 12] = [
    "--vcpus",
    "2",
    "--mem",
    "16M",
    "--low",
    "1M",
    "--frames",
    "3M@0s,2M@1ms",
    "--tlb",
    "sticky",
    "--append",
    "workload=mm scale=1",
];

/// Options of `simulate`.
#[derive(Args, Clone, Debug)]
pub struct SimulateArgs {
    /// Run each seed from A on, B left out, until one does not pass.
    #[arg(long, value_name = "A..B", value_parser = parse_seeds, required_unless_present = "replay", conflicts_with = "replay")]
    pub seeds: Option<Range<u64>>,
    /// Run this seed, and show what happens on standard output: a line for each event, a column for each thread.
    #[arg(long, value_name = "SEED")]
    pub replay: Option<u64>,
    /// Runs at a time. As many as this process has CPUs if left out.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(JOBS_MAX)), conflicts_with = "replay")]
    pub jobs: Option<u32>,
    /// How long a run may take, in the host's time, before it is said to hang.
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = parse_duration)]
    pub patience: Duration,
    /// Have an operation of each run's swap device fail, the seed says which: one of the first 64 reads or writes. Such a run passes if it
    /// ends by that, and by nothing else, or before it comes to that.
    #[arg(long)]
    pub io_failures: bool,
    /// What each run has: options of `umbra run`. If left out, --vcpus 2 --mem 16M --low 1M --frames 3M@0s,2M@1ms --tlb sticky
    /// --append 'workload=mm scale=1'.
    #[arg(last = true, value_name = "RUN OPTIONS")]
    pub options: Vec<OsString>,
}

/// What is to be run.
#[derive(Clone, Debug)]
pub struct Order {
    /// The seeds.
    pub seeds: Range<u64>,
    /// Only look at the first.
    pub replay: bool,
    /// Runs at a time.
    pub jobs: usize,
    /// How long each may take.
    pub patience: Duration,
    /// An operation of each run's swap device fails.
    pub io_failures: bool,
    options: Vec<OsString>,
}

impl SimulateArgs {
    /// What they ask for.
    ///
    /// # Errors
    ///
    /// A sentence where that makes no sense.
    pub fn order(&self) -> Result<Order, String> {
        let options = match self.options.is_empty() {
            true => OPTIONS.iter().map(OsString::from).collect(),
            false => self.options.clone(),
        };
        let cpus = || std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32);
        let seeds = match (&self.seeds, self.replay) {
            (_, Some(seed)) => seed..seed.saturating_add(1),
            (Some(seeds), None) => seeds.clone(),
            (None, None) => return Err("no seeds; give --seeds A..B or --replay SEED".into()),
        };
        let order = Order {
            jobs: self.jobs.unwrap_or_else(cpus).min(JOBS_MAX) as usize,
            replay: self.replay.is_some(),
            patience: self.patience,
            io_failures: self.io_failures,
            seeds,
            options,
        };
        check(&order)?;
        Ok(order)
    }
}

impl Order {
    /// The arguments of the program that runs `seed`.
    pub fn command(&self, seed: u64) -> impl Iterator<Item = OsString> {
        let own = ["run".into(), "--deterministic".into(), "--seed".into(), seed.to_string().into()];
        own.into_iter().chain(self.options_of(seed))
    }

    fn options_of(&self, seed: u64) -> impl Iterator<Item = OsString> {
        let fault = ["--swap-fault".into(), fault_of(seed).to_string().into()];
        self.options.iter().cloned().chain(fault.into_iter().filter(|_| self.io_failures))
    }

    /// The same, as part of a sweep, which it dies with.
    pub fn played(&self, seed: u64) -> impl Iterator<Item = OsString> {
        std::iter::once("play".into()).chain(self.command(seed).skip(1))
    }

    /// How an operator has `seed` run again, and how he looks at it; where so few of its choices are enough, with those.
    pub fn again(&self, seed: u64, choices: Option<u64>) -> [String; 2] {
        let fewer = choices.into_iter().flat_map(|n| ["--choices".into(), n.to_string().into()]);
        let words = |words: &mut dyn Iterator<Item = OsString>| {
            words.fold("umbra".to_owned(), |line, word| format!("{line} {}", quoted(&word)))
        };
        let look = ["simulate".into(), "--replay".into(), seed.to_string().into(), "--".into()];
        let look = look.into_iter().chain(self.options_of(seed));
        [words(&mut self.command(seed).chain(fewer.clone())), words(&mut look.chain(fewer))]
    }
}

/// Operations of the swap device of which one fails: as many reads, and as many writes.
const FAULTS: u64 = 64;

/// Which fails.
fn fault_of(seed: u64) -> Fault {
    // Seeds that follow each other have nothing to do with each other.
    let drawn = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let number = 1 + drawn / 2 % FAULTS;
    if drawn.is_multiple_of(2) { Fault::Read(number) } else { Fault::Write(number) }
}

/// That `umbra run` takes the options, and that no run finds what another has left.
fn check(order: &Order) -> Result<(), String> {
    let words = std::iter::once("umbra".into()).chain(order.command(order.seeds.start));
    let run = match Cli::try_parse_from(words).map(|cli| cli.command) {
        Ok(Command::Run(run)) => *run,
        Ok(_) => return Err("the options after -- are not those of umbra run".into()),
        Err(error) => {
            let words = error.to_string();
            let words = words.strip_prefix("error: ").unwrap_or(&words).trim_end();
            return Err(format!("the options after --: {words}"));
        }
    };
    if run.event_log.is_some() {
        return Err("--event-log is for one run; leave it out, and give it to the umbra run of a seed".into());
    }
    if !order.replay && run.json.is_some() {
        return Err(
            "--json: each run would write over it; leave it out, and give it to the umbra run of a seed"
                .into(),
        );
    }
    if writes_to_a_disk(&run) {
        return Err(
            "--disk: a run would find what the one before has written to that file, and be another; add ,ro, or give it as a SIZE"
                .into(),
        );
    }
    Ok(())
}

fn writes_to_a_disk(run: &RunArgs) -> bool {
    run.disk.iter().any(|disk| matches!(disk.source, DiskSource::File(_)) && !disk.read_only)
}

/// `A..B`, where B comes after A.
pub(crate) fn parse_seeds(text: &str) -> Result<Range<u64>, String> {
    let number = |text: &str| {
        let text = text.trim();
        text.parse::<u64>().map_err(|_| format!("'{text}' is no number from 0 to {}", u64::MAX))
    };
    let (first, end) = text.split_once("..").ok_or_else(|| format!("'{text}' is no range; write 0..200"))?;
    let (first, end) = (number(first)?, number(end)?);
    match end.checked_sub(first) {
        None | Some(0) => Err(format!("{first}..{end} has no seed in it; {end} itself is left out")),
        Some(count) if count > SEEDS_MAX => {
            Err(format!("{first}..{end} has {count} seeds; {SEEDS_MAX} is the most"))
        }
        Some(_) => Ok(first..end),
    }
}

/// As a shell reads it.
fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => word.into_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(words: &[&str]) -> Result<Order, String> {
        let cli =
            Cli::try_parse_from(["umbra", "simulate"].iter().chain(words)).map_err(|e| e.to_string())?;
        match cli.command {
            Command::Simulate(args) => args.order(),
            _ => Err("another command".into()),
        }
    }

    #[test]
    fn seeds_are_a_range_without_its_end() {
        assert_eq!(parse_seeds("3..7"), Ok(3..7));
        assert_eq!(parse_seeds(&format!("0..{SEEDS_MAX}")), Ok(0..SEEDS_MAX));
        assert_eq!(parse_seeds("18446744073709551614..18446744073709551615").map(|s| s.count()), Ok(1));
        for wrong in
            ["", "3", "3..", "..3", "3..3", "7..3", "-1..3", "3...7", "0x1..3", "0..18446744073709551616"]
        {
            assert!(parse_seeds(wrong).is_err(), "{wrong}");
        }
        assert!(parse_seeds(&format!("0..{}", SEEDS_MAX + 1)).is_err());
    }

    #[test]
    fn the_options_that_a_run_has_by_itself_are_such_as_it_takes() {
        let order = order(&["--seeds", "0..1"]).expect("an order");
        let said = order.again(0, None)[1].split_once(" -- ").map(|(_, options)| options.to_owned());
        let help =
            "--vcpus 2 --mem 16M --low 1M --frames 3M@0s,2M@1ms --tlb sticky --append 'workload=mm scale=1'";
        assert_eq!(said.as_deref(), Some(help), "the help says others");
    }

    #[test]
    fn a_failure_of_swap_is_the_seeds_and_of_either_sort() {
        let order = order(&["--seeds", "0..1", "--io-failures"]).expect("an order");
        let fault =
            |seed| order.again(seed, None)[0].rsplit_once("--swap-fault ").map(|(_, fault)| fault.to_owned());
        let faults: Vec<_> = (0..200).filter_map(fault).collect();
        assert_eq!(faults.len(), 200);
        for sort in ["read@", "write@"] {
            let numbers: std::collections::BTreeSet<_> =
                faults.iter().filter_map(|f| f.strip_prefix(sort)).collect();
            assert!(numbers.len() > 40, "{sort}: {numbers:?}");
        }
        assert!(
            self::order(&["--seeds", "0..1", "--io-failures", "--", "--mem", "16M"]).is_err(),
            "no swap at all"
        );
    }

    #[test]
    fn how_a_seed_is_run_again_is_what_a_shell_takes() {
        let order = order(&["--replay", "9", "--", "--append", "it's x", "--name", ""]).expect("an order");
        let options = r"--append 'it'\''s x' --name ''";
        let again = [
            format!("umbra run --deterministic --seed 9 {options}"),
            format!("umbra simulate --replay 9 -- {options}"),
        ];
        assert_eq!(order.again(9, None), again);
    }

    #[test]
    fn what_two_runs_would_share_and_what_no_run_takes_is_refused() {
        for (words, why) in [
            (&["--seeds", "0..9", "--", "--json", "x"][..], "--json"),
            (&["--seeds", "0..9", "--", "--event-log", "x"], "--event-log"),
            (&["--seeds", "0..9", "--", "--disk", "x.img"], ",ro"),
            (&["--replay", "0", "--", "--disk", "x.img"], ",ro"),
            (&["--seeds", "0..9", "--", "--seed", "3"], "--seed"),
            (&["--seeds", "0..9", "--", "--qmp", "x"], "--qmp"),
            (&["--seeds", "0..9", "--", "--nonsense"], "--nonsense"),
            (&["--seeds", "0..9", "--", "--help"], "after --"),
            (&["--seeds", "0..9", "--jobs", "0"], "--jobs"),
            (&["--seeds", "0..9", "--jobs", "257"], "--jobs"),
            (&["--seeds", "0..9", "--replay", "1"], "--replay"),
            (&["--replay", "1", "--jobs", "2"], "--jobs"),
            (&[], "--seeds"),
        ] {
            let error = order(words).expect_err("it makes no sense");
            assert!(error.contains(why), "{words:?}: {error}");
        }
        assert!(order(&["--seeds", "0..9", "--", "--disk", "x.img,ro"]).is_ok());
    }
}
