//! `umbra scenario`: each discussion with its rules in force, and each rule left out and caught.

use libtest_mimic::{Failed, Trial};
use umbra::scenario::guest_rules::FLUSHES;
use umbra::scenario::table::{Play, SCENARIOS, Scenario};

use super::umbra::{status, umbra};
use crate::ensure;
use crate::support::host::Need;
use crate::support::process::{End, Outcome};
use crate::support::{Verdict, case};

/// Rules of Umbra's that a whole guest misses at once.
const OMISSIONS: [&str; 14] = [
    "flush-at-entry",
    "request-at-shootdown",
    "await-answers",
    "tell-importers",
    "split-at-unmap",
    "open-before-wait",
    "flush-at-invlpg",
    // By guests on modelled hardware.
    "firmware-flush",
    "notifier-flush",
    "notify-at-shootdown",
    "flush-beside-hardware",
    "hardware-owes-flush",
    "hardware-flush-at-invlpg",
    "hardware-flush-at-cr3",
];

/// The tests of this file.
pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    for scenario in discussions() {
        // In the rig the one with NMIs: the others take it minutes.
        let here = Need::Rig.met().is_err() || scenario.name == "kmap-stack";
        if here && scenario.cases().iter().any(|case| matches!(case.play, Play::Guest(..))) {
            let name = format!("kvm_scenario_{}_is_played", scenario.name);
            cases.push(case(name, &[Need::Kvm], || on_kvm(scenario)));
        }
    }
    if Need::Rig.met().is_ok() {
        return cases;
    }
    for scenario in discussions() {
        let name = scenario.name;
        cases.push(case(format!("scenario_{name}_passes_with_its_rules_in_force"), &[], || passes(scenario)));
        cases.push(case(format!("scenario_{name}_is_caught_without_them"), &[], || is_caught(scenario)));
    }
    cases.push(case("scenario_rules_are_missed_by_whole_guests", &[], rules));
    cases.push(case("scenario_guest_rules_pass_where_each_flush_is_made", &[], flushes_made));
    cases.push(case("scenario_guest_rules_are_missed_in_simulations", &[], flushes_left_out));
    cases.push(case("scenario_of_importers_passes_by_many_seeds", &[], many));
    cases.push(case("scenario_is_the_same_for_a_seed", &[], same));
    cases.push(case("scenario_explains_itself", &[], explains));
    cases.push(case("scenario_lists_what_there_is", &[], lists));
    cases.push(case("scenario_refuses_what_there_is_not", &[], refused));
    cases
}

/// Those that are discussions: the rules of Umbra's own and the guest's flushes have no cases by hand.
fn discussions() -> impl Iterator<Item = &'static Scenario> {
    SCENARIOS.iter().filter(|scenario| !["rules", "guest-rules"].contains(&scenario.name))
}

fn scenario(options: &[&str]) -> Result<Outcome, Failed> {
    umbra(["scenario", "run"].iter().chain(options))
}

/// What it says on standard output.
fn told(run: &Outcome) -> String {
    String::from_utf8_lossy(&run.stdout).into_owned()
}

/// Cases of a scenario, and those that have a rule.
fn count(scenario: &Scenario, guests: bool) -> (usize, usize) {
    let cases = scenario.cases();
    let fit = || cases.iter().filter(|case| !guests || matches!(case.play, Play::Guest(..)));
    (fit().count(), fit().filter(|case| !case.fails.is_empty()).count())
}

fn all(run: &Outcome, good: usize, word: &str) -> Verdict {
    let said = format!("{good} of {good} {word}");
    ensure!(run.end == End::Status(0) && run.stderr.contains(&said), "expected {said}:\n{run}");
    Ok(())
}

fn passes(of: &Scenario) -> Verdict {
    all(&scenario(&[of.name, "--seeds", "3..5"])?, 2 * count(of, false).0, "passed")
}

fn is_caught(of: &Scenario) -> Verdict {
    let run = scenario(&[of.name, "--bug", "--seeds", "3..5"])?;
    all(&run, 2 * count(of, false).1, "caught")?;
    for case in of.cases().iter().filter(|case| !case.fails.is_empty()) {
        let diagnosed = case.fails.iter().any(|kind| told(&run).contains(&format!("  {}: ", kind.name())));
        ensure!(diagnosed, "{} has no diagnosis:\n{run}", case.name);
    }
    Ok(())
}

fn on_kvm(of: &Scenario) -> Verdict {
    let (all_cases, with_rules) = count(of, true);
    all(&scenario(&[of.name, "--backend", "kvm"])?, all_cases, "passed")?;
    if with_rules == 0 {
        return Ok(());
    }
    all(&scenario(&[of.name, "--backend", "kvm", "--bug"])?, with_rules, "caught")
}

fn rules() -> Verdict {
    for rule in OMISSIONS {
        let name = format!("rules/{rule}");
        all(&scenario(&[&name])?, 1, "passed")?;
        all(&scenario(&[&name, "--bug"])?, 1, "caught")?;
    }
    Ok(())
}

/// Whose guests are all guests that a flush is left out of.
const GUESTS: [&str; 5] = ["window", "serve-all", "drop-local", "age-remote", "zap-few"];

fn flushes_made() -> Verdict {
    GUESTS.iter().try_for_each(|name| all(&scenario(&[&format!("guest-rules/{name}")])?, 1, "passed"))
}

/// By the 238th a page is asked for of an importer whose ear has not begun, and whose other thread wants that page: once taken for two
/// who wait for each other.
fn many() -> Verdict {
    all(&scenario(&["xpmem-race/fault-between", "--seeds", "221..261"])?, 40, "passed")
}

/// Certainly, or as a suspect that the same seed has not where the flush is made.
fn flushes_left_out() -> Verdict {
    let run = scenario(&["guest-rules", "--bug"])?;
    all(&run, FLUSHES.len(), "caught")?;
    let told = told(&run);
    let count = |words: &str| told.lines().filter(|line| line.starts_with(words)).count();
    let (certain, suspect) = (count("  certain: "), count("  suspect: "));
    let compared = count("    where it makes that flush, the same seed has no suspect");
    println!("{certain} certain, {suspect} suspect");
    ensure!(certain > 0 && certain + suspect == FLUSHES.len() && compared == suspect, "diagnoses:\n{run}");
    Ok(())
}

/// But for how long it took.
fn same() -> Verdict {
    for name in ["kmap-series/order", "superblock/umbra-swap", "xpmem-race/fault-between"] {
        let play = || -> Result<String, Failed> {
            let run = scenario(&[name, "--bug", "--explain", "--seed", "9"])?;
            ensure!(run.end == End::Status(0), "it should be caught:\n{run}");
            let lines = told(&run);
            let lines = lines.lines().filter(|line| !line.ends_with(" s"));
            Ok(lines.map(|line| format!("{line}\n")).collect())
        };
        let (first, second) = (play()?, play()?);
        ensure!(first == second, "one seed, two stories:\n{first}\n{second}");
    }
    Ok(())
}

fn explains() -> Verdict {
    let run = scenario(&["superblock/umbra-swap", "--bug", "--explain"])?;
    for words in [
        "Stephen C. Tweedie",
        "left out: the scope is not looked at",
        "  the writer holds the superblock\n",
        "ns everybody waits, and for no time that could come",
        "the writer waits for the superblock, which the writer holds",
    ] {
        ensure!(told(&run).contains(words), "it should say {words:?}:\n{run}");
    }
    Ok(())
}

fn lists() -> Verdict {
    let run = umbra(["scenario", "list"])?;
    ensure!(run.end == End::Status(0), "a list:\n{run}");
    for scenario in SCENARIOS {
        let found =
            told(&run).lines().any(|line| line.starts_with(scenario.name) && line.contains(scenario.about));
        ensure!(found, "no word of {}:\n{run}", scenario.name);
    }
    Ok(())
}

fn refused() -> Verdict {
    for (options, why) in [
        (&["nonsense"][..], "there are kmap-series, kmap-stack"),
        (&["kmap-series/nonsense"], "it has order, spinlock"),
        (&["kmap-stack/slots", "--bug"], "has no rule that --bug could leave out"),
        (&["xpmem-race", "--backend", "kvm"], "leave --backend out"),
        (&["kmap-series", "--backend", "kvm", "--seed", "3"], "the order that comes"),
        (&["kmap-series", "--seeds", "5..5"], "has no seed in it"),
        (&["kmap-series", "--seed", "1", "--seeds", "5..6"], "--seeds"),
    ] {
        let run = scenario(options)?;
        ensure!(run.end == status::USAGE && run.stderr.contains(why), "it should say {why:?}:\n{run}");
    }
    Ok(())
}
