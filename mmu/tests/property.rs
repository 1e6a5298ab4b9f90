//! Random guest programs through the mmu and its naive twin.
//!
//! `UMBRA_OPS=n` runs n operations (by default as many as take some seconds), `UMBRA_SEED=n` takes another seed. A
//! failure prints the shrunk program; it goes into `regressions`, where it stays.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use umbra_mmu::{Rules, TlbKind};

use crate::model::hardware::Memory;
use crate::model::layout::{A, D, G, NX, P, PS, RSVD, U, W};
use crate::model::walker::Kind;
use crate::model::world::Caches;
use crate::program::{Bit, Op, Program, Then};

/// The most operations in one program.
const PROGRAM_MAX: usize = 240;
/// Attempts to make a failing program simpler.
const SHRINKS_MAX: u32 = 20_000;
/// Operations of a run that nobody asked to be longer.
const OPS_DEFAULT: u64 = 400_000;

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![3 => Just(Kind::Read), 4 => Just(Kind::Write), 1 => Just(Kind::Fetch)]
}

fn then() -> impl Strategy<Value = Then> {
    prop_oneof![3 => Just(Then::Nothing), 3 => Just(Then::Invlpg), 1 => Just(Then::LoadCr3)]
}

/// Mostly pages of the two first regions, so that programs meet themselves.
fn page() -> impl Strategy<Value = u8> {
    prop_oneof![3 => 0u8..36, 3 => prop::sample::select(vec![0u8, 1, 6, 7, 12, 19, 2, 8])]
}

fn offset() -> impl Strategy<Value = u8> {
    prop_oneof![4 => 0u8..4, 1 => 4u8..7]
}

fn frame() -> impl Strategy<Value = u8> {
    prop_oneof![5 => 16u8..48, 4 => 0u8..16, 1 => 48u8..56]
}

fn bits() -> impl Strategy<Value = u16> {
    prop_oneof![
        6 => Just(P | W | U | A | D),
        2 => Just(P | W | U),
        2 => Just(P | U | A),
        1 => Just(P | W | A),
        2 => Just(P | W | U | A | D | PS),
        1 => Just(0),
        3 => (0u16..0x800).prop_map(|bits| bits | P),
        1 => 0u16..0x800,
    ]
}

fn toggled() -> impl Strategy<Value = u16> {
    prop::sample::select(vec![P, W, U, A, D, A | D, NX, PS, G, RSVD])
}

fn bit() -> impl Strategy<Value = Bit> {
    use Bit::*;
    prop_oneof![
        4 => Just(WriteProtect), 2 => Just(Smep), 2 => Just(NoExecute), 1 => Just(Global), 1 => Just(Pse),
        1 => Just(Paging), 1 => Just(Pae)
    ]
}

fn level() -> impl Strategy<Value = u8> {
    prop_oneof![3 => Just(1u8), 1 => Just(2u8)]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => (kind(), any::<bool>(), page(), offset(), any::<u32>())
            .prop_map(|(kind, user, page, offset, value)| Op::Touch { kind, user, page, offset, value }),
        2 => (kind(), any::<bool>(), page(), offset(), any::<u32>())
            .prop_map(|(kind, user, page, offset, value)| Op::Emulate { kind, user, page, offset, value }),
        6 => (page(), level(), frame(), bits(), then())
            .prop_map(|(page, level, frame, bits, then)| Op::Edit { page, level, frame, bits, then }),
        3 => (page(), level(), toggled(), then())
            .prop_map(|(page, level, bits, then)| Op::Toggle { page, level, bits, then }),
        2 => (0u8..48, page(), level(), frame(), bits())
            .prop_map(|(table, page, level, frame, bits)| Op::EditIn { table, page, level, frame, bits }),
        1 => frame().prop_map(|frame| Op::Wipe { frame }),
        4 => page().prop_map(|page| Op::Invlpg { page }),
        2 => prop_oneof![6 => 0u8..5, 1 => 5u8..8].prop_map(|which| Op::LoadCr3 { which }),
        2 => bit().prop_map(|bit| Op::Flip { bit }),
        1 => (any::<bool>(), 0u8..3).prop_map(|(pae, which)| Op::Switch { pae, which }),
        2 => (any::<bool>(), page()).prop_map(|(user, page)| Op::Speculate { user, page }),
        1 => (frame(), offset(), 1u8..24, any::<u32>())
            .prop_map(|(frame, offset, length, value)| Op::Dma { frame, offset, length, value }),
        1 => frame().prop_map(|frame| Op::Watch { frame }),
        1 => frame().prop_map(|frame| Op::Unwatch { frame }),
        1 => (1u8..24).prop_map(|count| Op::Evict { count }),
        1 => frame().prop_map(|frame| Op::CloseGate { frame }),
        1 => Just(Op::Exit),
        1 => (1u8..80).prop_map(|count| Op::Churn { count }),
        3 => (frame(), 1u8..20).prop_map(|(frame, count)| Op::PageOut { frame, count }),
        1 => (1u8..40).prop_map(|count| Op::Reclaim { count }),
        1 => (0u8..48).prop_map(|over| Op::Budget { over }),
        1 => (frame(), 1u8..4, any::<bool>())
            .prop_map(|(frame, count, balloon)| Op::Discard { frame, count, balloon }),
    ]
}

pub fn program() -> impl Strategy<Value = Program> {
    let hardware = |memory| Just(Caches::Hardware(memory));
    let tlb = prop_oneof![
        4 => hardware(Memory::Sticky),
        1 => hardware(Memory::Lossy),
        1 => hardware(Memory::None),
        4 => Just(Caches::Soft(TlbKind::Sticky)),
        1 => Just(Caches::Soft(TlbKind::Sized)),
        1 => any::<u64>().prop_map(|seed| Caches::Soft(TlbKind::Lossy(seed))),
    ];
    // One CPU does most of the work, the other now and then something.
    let cpu = prop_oneof![4 => Just(0u8), 1 => Just(1u8)];
    (tlb, any::<bool>(), any::<bool>(), prop::collection::vec((cpu, op()), 1..PROGRAM_MAX))
        .prop_map(|(tlb, pae, worn, ops)| Program { tlb, pae, worn, ops })
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What is wrong with a program, a panic included.
fn failure(program: &Program) -> Option<String> {
    failure_by(program, Rules::default())
}

/// The same on an MMU that goes by these rules.
pub fn failure_by(program: &Program, rules: Rules) -> Option<String> {
    match catch_unwind(AssertUnwindSafe(|| program.run_by(rules))) {
        Ok(result) => result.err().map(|wrong| wrong.0),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            Some(text.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or_default())
        }
    }
}

/// Leaves out every operation that the failure does not need: proptest makes operations simpler, but does not try
/// again to do without them.
fn minimise(mut program: Program) -> Program {
    let mut length = usize::MAX;
    while program.ops.len() < length {
        length = program.ops.len();
        for size in [8, 4, 2, 1] {
            let mut at = program.ops.len();
            while at >= size {
                at -= size;
                let mut less = program.clone();
                less.ops.drain(at..at + size);
                if failure(&less).is_some() {
                    program = less;
                    at = at.min(program.ops.len());
                }
            }
        }
    }
    program
}

/// Where programs come from, by a seed.
pub fn runner(seed: u64) -> TestRunner {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    TestRunner::new_with_rng(Config::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

#[test]
fn random_guest_programs_behave_as_on_the_naive_cpu() {
    let (wanted, seed) = (number("UMBRA_OPS", OPS_DEFAULT), number("UMBRA_SEED", 1));
    let mut runner = runner(seed);
    let strategy = program();
    let (start, mut done, mut programs) = (Instant::now(), 0, 0);
    while done < wanted {
        let mut tree = strategy.new_tree(&mut runner).expect("a program");
        let program = tree.current();
        done += program.ops.len() as u64;
        programs += 1;
        if failure(&program).is_none() {
            continue;
        }
        let program = minimise(shrink(&mut tree));
        let why = failure(&program).unwrap_or_default();
        panic!("seed {seed}, after {done} operations in {programs} programs: {why}\n{program:?}");
    }
    println!(
        "property: {done} operations in {programs} programs, seed {seed}, {:.1} s",
        start.elapsed().as_secs_f64()
    );
}

/// The simplest program that proptest finds to fail too.
fn shrink(tree: &mut impl ValueTree<Value = Program>) -> Program {
    let mut simplest = tree.current();
    let mut more = tree.simplify();
    for _ in 0..SHRINKS_MAX {
        if !more {
            break;
        }
        let program = tree.current();
        more = if failure(&program).is_some() {
            simplest = program;
            tree.simplify()
        } else {
            tree.complicate()
        };
    }
    simplest
}
