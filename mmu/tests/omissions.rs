//! Every rule of coherence left out, one at a time: something must notice.
//!
//! Most are found by random guest programs against the naive twin (`property`): by the oracle in the software TLB, by the ledger,
//! by an assertion that names its invariant, by the audit, or because the CPU reaches what it may not. What a program of one
//! thread cannot show has a scene of its own (`scenes`), which must pass with all rules in force.
//!
//! The rules of the VMM's own code are not in this program: see vmm/src/vm/omissions_tests.rs, and tests/e2e/smp.rs.

mod scenes;

use proptest::strategy::{Strategy, ValueTree};
use umbra_mmu::rules::NEEDS_NONE;
use umbra_mmu::{Rule, Rules, TlbKind};

use crate::model::hardware::Memory;
use crate::model::world::Caches;
use crate::program::Program;
use crate::property::{failure_by, program, runner};

/// Operations of random programs within which a rule must be missed.
const OPS_MAX: u64 = 500_000;
const SEED: u64 = 1;
/// TLBs that keep everything they may.
const HARDWARE: Caches = Caches::Hardware(Memory::Sticky);
const SOFT: Caches = Caches::Soft(TlbKind::Sticky);

/// What notices that a rule is left out.
enum Killer {
    /// Random programs, on CPUs with such a TLB.
    Programs(Caches),
    /// A scene, which says what went wrong.
    Scene(fn(Rules) -> Option<String>),
    /// Tests of the VMM (vmm/src/vm/omissions_tests.rs), or a guest in the program `umbra` (tests/e2e/smp.rs; where a rule keeps threads
    /// from waiting for ever, tests/e2e/simulation.rs; where it is of two vCPUs that do not wait for each other, tests/e2e/seeds.rs).
    Vmm,
}

fn killer(rule: Rule) -> Killer {
    match rule {
        Rule::RequestAtShootdown => Killer::Scene(scenes::outside),
        Rule::KickAtShootdown => Killer::Scene(scenes::spinning),
        Rule::AwaitAnswers => Killer::Scene(scenes::slow_to_answer),
        Rule::AnswerAtLeave => Killer::Scene(scenes::outside_for_a_moment),
        Rule::RequestWithoutSleep => Killer::Scene(scenes::no_sleep),
        Rule::RequestAfterAging => Killer::Scene(scenes::in_use),
        Rule::KickOfStarving => Killer::Scene(scenes::fed),
        Rule::EntryAtFill => Killer::Scene(scenes::edited_after_the_walk),
        Rule::SyncAtTracking => Killer::Scene(scenes::stored_while_tracked_again),
        Rule::DebtOfNarrowing => Killer::Scene(scenes::narrowed),
        Rule::DebtOfFill => Killer::Scene(scenes::narrowed_by_a_fill),
        Rule::FlushOfLargePage => Killer::Scene(scenes::large),
        Rule::PinsAtUnmap => Killer::Scene(scenes::pinned),
        Rule::PageAfterPin => Killer::Scene(scenes::taken_before_the_pin),
        Rule::NotifyAtShootdown => Killer::Scene(scenes::notified),
        Rule::DebtOfPutBack => Killer::Scene(scenes::put_back),
        Rule::RemovalUnderWay => Killer::Scene(scenes::half_removed),
        Rule::BarrierAtMark => Killer::Scene(scenes::store_on_its_way),
        Rule::CodeAtStore => Killer::Scene(scenes::stored_code),
        Rule::CodeAtFlush => Killer::Scene(scenes::moved_code),
        Rule::GateAtImport => Killer::Scene(scenes::taken_before_the_import),
        Rule::TellImporters | Rule::AwaitImporters | Rule::FenceHomes => Killer::Scene(scenes::imported),
        Rule::AskFirst => Killer::Scene(scenes::asked_too_late),
        Rule::NoIoInScope => Killer::Scene(scenes::written_in_scope),
        Rule::WriteTogether => Killer::Scene(scenes::scattered),
        Rule::SplitAtUnmap => Killer::Scene(scenes::taken_from_a_huge_range),
        Rule::SplitAtProtection => Killer::Scene(scenes::watched_in_a_huge_range),
        Rule::DebtOfSplit => Killer::Scene(scenes::mapped_large_and_split),
        Rule::MovingAtDiscard => Killer::Scene(scenes::discarded_while_it_is_gathered),
        Rule::FirmwareFlush
        | Rule::NotifierFlush
        | Rule::FlushBesideHardware
        | Rule::HardwareOwesFlush
        | Rule::BusAtSplit
        | Rule::AwaitStores
        | Rule::WakeAtOpen
        | Rule::OpenBeforeWait
        | Rule::ShootdownAtDescriptors => Killer::Vmm,
        Rule::HardwareFlushAtInvlpg | Rule::HardwareFlushAtCr3 | Rule::DebtOfUnlink => {
            Killer::Programs(HARDWARE)
        }
        Rule::ShootdownBeforeReuse | Rule::DebtOfEviction => Killer::Scene(scenes::reused),
        Rule::ShootdownBeforeGivingBack => Killer::Scene(scenes::given_back),
        Rule::ShootdownBeforeRoot => Killer::Scene(scenes::root_reused),
        Rule::DebtOfRoot => Killer::Scene(scenes::root_taken_by_another),
        _ => Killer::Programs(SOFT),
    }
}

/// Who noticed, by what it said.
fn finder(why: &str) -> &'static str {
    let finders = [
        ("INV-TLB-", "oracle"),
        ("INV-COH-1", "ledger"),
        ("INV-", "assertion"),
        ("audit:", "audit"),
        ("no translation of this CPU allows", "naive twin: an access"),
        ("fixed, and faults again", "naive twin: no progress"),
    ];
    finders.iter().find(|(words, _)| why.contains(words)).map_or("naive twin", |(_, finder)| finder)
}

/// Runs programs until one goes wrong: by whom it was found, and after how many operations.
fn by_programs(caches: Caches, rules: Rules) -> Option<String> {
    let (mut runner, strategy, mut done) = (runner(SEED), program(), 0);
    while done < OPS_MAX {
        let program = strategy.new_tree(&mut runner).expect("a program").current();
        let program = Program { tlb: caches, ..program };
        done += program.ops.len() as u64;
        if let Some(why) = failure_by(&program, rules) {
            return Some(format!("{}, {done} operations, seed {SEED}: {}", finder(&why), first_line(&why)));
        }
    }
    None
}

fn first_line(why: &str) -> String {
    why.lines().next().unwrap_or_default().chars().take(160).collect()
}

/// The table: one line a rule.
#[test]
fn every_rule_that_is_left_out_is_missed() {
    let mut unmissed = Vec::new();
    let only = std::env::var("UMBRA_RULE").ok();
    let wanted =
        |rule: &&Rule| only.as_deref().is_none_or(|name| name.split(',').any(|one| one == rule.name()));
    for rule in Rule::ALL.iter().filter(wanted) {
        let rules = Rules::all_but(*rule);
        let caught = match killer(*rule) {
            Killer::Programs(caches) => by_programs(caches, rules),
            Killer::Scene(play) => {
                let kept = play(Rules::default());
                assert_eq!(kept, None, "{}: its scene goes wrong with every rule in force", rule.name());
                play(rules).map(|why| format!("scene: {}", first_line(&why)))
            }
            // The VMM's own code is not in this program.
            Killer::Vmm => continue,
        };
        println!("OMIT {:30} {}", rule.name(), caught.as_deref().unwrap_or("NOT MISSED"));
        unmissed.extend(caught.is_none().then(|| rule.name()));
    }
    assert!(unmissed.is_empty(), "nothing misses {unmissed:?}");
}

/// The other side of the table.
#[test]
fn what_takes_nothing_away_needs_no_flush() {
    assert!(!NEEDS_NONE.is_empty());
    assert_eq!(scenes::relaxed(), 0, "flushes");
}
