//! A range that is gathered while its pages are used, discarded, and sent to swap.
//!
//! ```text
//! collapse        all pages of the range to its block, batch by batch; Huge, if all are there
//! a CPU           stores to pages of it, and finds what it stored last
//! discard         a page that is discarded reads as zeros from then on, wherever it is on its way
//! page_out        takes pages of it away, and splits it
//! ```
//!
//! Twins: two rules of collapse left out, which are missed by who discards, and by the audit.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::RandomScheduler;
use umbra_mmu::discard::Discard;
use umbra_mmu::invalidation::May;
use umbra_mmu::p2m::{PageState, TABLE_ENTRIES};
use umbra_mmu::swap::MemorySwap;
use umbra_mmu::sync::{AtomicBool, Ordering, thread};
use umbra_mmu::twins::{Kick, SoftCpu};
use umbra_mmu::{Config, Context, Gfn, LocalStack, Machine, Mmu, Rule, Rules, TlbKind};

use super::{explore_so_often, run};
use crate::model::run::audit;

/// Pages of the guest: one range.
const RANGE: u32 = TABLE_ENTRIES as u32;
/// The range's last pages, which are gathered last: those that the CPU uses, and one that is discarded.
const USED: std::ops::Range<u32> = RANGE - 4..RANGE - 1;
const DISCARDED: Gfn = Gfn(RANGE - 1);
/// How often others run at most before a page is discarded or taken: for about as long as it takes to gather the range. More than one of
/// them, and it would never be huge.
const PAUSE: u32 = 20_000;
/// Lives under each scheduler.
const LIVES: usize = 100;

/// Uses pages until all is over.
fn use_pages(mut cpu: SoftCpu<Arc<Mmu>>, over: &AtomicBool) {
    let mut kept = [0; RANGE as usize];
    let mut step = 0;
    while !over.load(Ordering::SeqCst) {
        let page = thread_rng().gen_range(USED);
        let word = &mut kept[page as usize];
        assert_eq!(cpu.load(page, 1), Ok(*word), "gathers: the CPU's word of page {page}");
        step += 1;
        *word = step;
        cpu.store(page, 1, step).expect("there are frames");
        thread::yield_now();
    }
    cpu.rest();
}

/// Fills the page, and discards it: some time after, or when it is on its way.
fn discard(mmu: &Mmu, over: &AtomicBool) {
    let window = LocalStack::new(Context::Host);
    let at = DISCARDED.at(8);
    mmu.write_bytes_sleeping(None, &window, at, &1u64.to_le_bytes()).expect("a frame");
    let on_its_way = || mmu.p2m().lookup(DISCARDED) == PageState::Moving;
    if thread_rng().r#gen() {
        pause();
    } else {
        while !on_its_way() && !over.load(Ordering::SeqCst) {
            thread::yield_now();
        }
    }
    let may = if thread_rng().r#gen() { May::Sleep } else { May::NotSleep };
    let gone = mmu.discard(None, [DISCARDED.0], Discard::Zero, may).is_ok();
    let mut found = [0; 8];
    mmu.read_bytes_sleeping(None, &window, at, &mut found).expect("a frame");
    assert_eq!(u64::from_le_bytes(found), u64::from(!gone), "gathers: a discard was lost, or a store");
}

/// Sends some of the pages to swap, in half of all lives.
fn take(mmu: &Mmu) {
    if thread_rng().r#gen() {
        pause();
        let pages: Vec<Gfn> = USED.filter(|_| thread_rng().r#gen()).map(Gfn).collect();
        mmu.page_out(None, &pages).expect("swap has room");
    }
}

fn pause() {
    (0..thread_rng().gen_range(0..PAUSE)).for_each(|_| thread::yield_now());
}

/// `gathered` counts the lives in which the range became huge.
fn live(rules: Rules, gathered: &AtomicU32) {
    let kicked = Arc::new(AtomicBool::new(false));
    let config = Config { blocks: true, shadow_pages_max: 64, roots_max: 4, ..Config::of_pages(RANGE) };
    let machine = Machine::anonymous(RANGE + 256 + config.block_frames());
    let mmu = Mmu::new(machine, config, Box::new(Kick(kicked.clone())))
        .with_rules(rules)
        .with_swap(Box::new(MemorySwap::new(RANGE)));
    let (mmu, over) = (Arc::new(mmu), Arc::new(AtomicBool::new(false)));
    let cpu = SoftCpu::new(mmu.clone(), TlbKind::Sticky, kicked);
    let (discarded, taken) = (mmu.clone(), mmu.clone());
    let (until, end) = (over.clone(), over.clone());
    let threads = [
        thread::spawn(move || use_pages(cpu, &until)),
        thread::spawn(move || discard(&discarded, &end)),
        thread::spawn(move || take(&taken)),
    ];
    // Somebody may have come in between.
    gathered.fetch_add(u32::from(mmu.collapse(Gfn(0)).is_ok()), Relaxed);
    over.store(true, Ordering::SeqCst);
    for thread in threads {
        thread.join().expect("no panic");
    }
    audit(&mmu);
}

#[test]
fn lives_of_a_range_that_is_gathered_lose_nothing() {
    let gathered = Arc::new(AtomicU32::new(0));
    let count = gathered.clone();
    explore_so_often(LIVES, move || live(Rules::default(), &count));
    let gathered = gathered.load(Relaxed);
    println!("gathers: huge in {gathered} lives");
    assert_ne!(gathered, 0, "no range was ever huge");
}

fn live_without(rule: Rule) {
    let rules = Rules::all_but(rule);
    run(RandomScheduler::new(4000), move || live(rules, &AtomicU32::new(0)));
}

#[test]
#[should_panic(expected = "gathers: a discard was lost")]
fn twin_a_discard_takes_a_page_on_its_way_for_none() {
    live_without(Rule::MovingAtDiscard);
}

#[test]
#[should_panic(expected = "INV-")]
fn twin_a_page_leaves_a_range_that_stays_huge() {
    live_without(Rule::SplitAtUnmap);
}
