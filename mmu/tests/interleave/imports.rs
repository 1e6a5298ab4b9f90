//! Importers of pages that come and go.
//!
//! Two importers, a vCPU with a software TLB, and somebody who sends pages to swap all the time; at the end of a life the segment is
//! closed. Each of the first three has a word of its own in every page, and finds what it stored last. An importer has two threads: one
//! that asks for pages and uses them, and one that hears that they must be given up, so that a telling overtakes a grant.
//!
//! ```text
//! attach          import_page: the page comes home, whatever is done to it meanwhile
//! invalidate      page_out: the importers are told, and awaited; the contents go to swap
//! fence           the home is empty before it is anybody's again, and when the segment is closed
//! ```
//!
//! Twins: each rule of importers left out (`umbra_mmu::rules`): the gate, the telling, the wait, the fence. And importers that do not
//! keep to theirs: one that answers and keeps the page; one that takes a grant for good though it is older than a telling.

use std::sync::Arc;

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::RandomScheduler;
use umbra_mmu::swap::MemorySwap;
use umbra_mmu::sync::{AtomicBool, AtomicU64, Ordering, thread};
use umbra_mmu::twins::{Importer, Importers, Kick, Manner, SoftCpu, Yields};
use umbra_mmu::{Config, Gfn, Machine, Mmu, Rule, Rules, TlbKind};

use super::{explore_so_often, run, use_pages};
use crate::model::run::audit;

const PAGES: u32 = 3;
const IMPORTERS: u32 = 2;
/// Lives under each scheduler: they are long.
const LIVES: usize = 200;
/// What each importer does, accesses of the vCPU, and how long whoever takes pages, and what is said to an importer, pauses at most;
/// pages are taken until the importers have gone.
const STEPS: u64 = 24;
const ACCESSES: u64 = 12;
const PAUSE: u32 = 200;
const FRAMES: u32 = 64;

fn draw(end: u32) -> u32 {
    thread_rng().gen_range(0..end)
}

fn pause() {
    (0..draw(PAUSE)).for_each(|_| thread::yield_now());
}

fn live_with_importers(manner: Manner, rules: Rules) {
    let machine = Machine::anonymous(FRAMES + PAGES);
    let outside = Importers::new(IMPORTERS, machine.clone());
    let kicked = Arc::new(AtomicBool::new(false));
    let config = Config { shadow_pages_max: 64, roots_max: 4, homes: true, ..Config::of_pages(PAGES) };
    let mmu = Mmu::new(machine.clone(), config, Box::new(Kick(kicked.clone())))
        .with_rules(rules)
        .with_swap(Box::new(MemorySwap::new(8)))
        .with_external(Box::new(outside.clone()))
        .with_host(Box::new(outside.clone()));
    let mmu = Arc::new(mmu);
    let segment = mmu.make_segment(Gfn(0), PAGES, true).expect("memory");
    let (cpu, gone) = (SoftCpu::new(mmu.clone(), TlbKind::Sized, kicked), Arc::new(AtomicU64::new(0)));
    let mut threads = vec![thread::spawn(move || use_pages(cpu, PAGES, ACCESSES))];
    for id in 0..IMPORTERS {
        let importer = Importer { mmu: mmu.clone(), all: outside.clone(), id, segment, stores: true, manner };
        let importer = Arc::new(importer);
        let listener = importer.clone();
        threads.push(thread::spawn(move || listener.listen(&Yields(PAUSE, draw))));
        let gone = gone.clone();
        threads.push(thread::spawn(move || {
            importer.live(0..PAGES, STEPS, &Yields(PAUSE, draw));
            gone.fetch_add(1, Ordering::SeqCst);
        }));
    }
    while gone.load(Ordering::SeqCst) < u64::from(IMPORTERS) {
        // As reclaim does it: an importer comes to have a page now and then.
        pause();
        let pages: Vec<Gfn> = (0..PAGES).filter(|_| thread_rng().r#gen()).map(Gfn).collect();
        mmu.page_out(None, &pages).expect("swap has room");
    }
    mmu.close_segment(segment).expect("there are frames");
    for thread in threads {
        thread.join().expect("no panic");
    }
    audit(&mmu);
    assert_eq!(mmu.imported_pages(), 0, "importers: a closed segment has some");
    for page in 0..PAGES {
        let bare = mmu.homes_of(Gfn(page)).is_none_or(|home| machine.is_zero(home));
        assert!(bare, "importers: a closed segment has what was in page {page}");
    }
}

#[test]
fn lives_with_importers_lose_no_word() {
    explore_so_often(LIVES, || live_with_importers(Manner::Honest, Rules::default()));
}

#[test]
#[should_panic(expected = "importers: ")]
fn twin_an_importer_that_answers_and_keeps_the_page() {
    run(RandomScheduler::new(1000), || live_with_importers(Manner::Lies, Rules::default()));
}

#[test]
#[should_panic(expected = "importers: ")]
fn twin_an_importer_that_takes_an_older_grant() {
    run(RandomScheduler::new(1000), || live_with_importers(Manner::Forgets, Rules::default()));
}

fn live_without(rule: Rule) {
    let rules = Rules::all_but(rule);
    run(RandomScheduler::new(1000), move || live_with_importers(Manner::Honest, rules));
}

#[test]
#[should_panic(expected = "importers: ")]
fn twin_an_importer_is_entered_without_a_look_at_the_gate() {
    live_without(Rule::GateAtImport);
}

#[test]
#[should_panic(expected = "importers: ")]
fn twin_importers_are_not_told() {
    live_without(Rule::TellImporters);
}

#[test]
#[should_panic(expected = "importers: ")]
fn twin_importers_are_not_awaited() {
    live_without(Rule::AwaitImporters);
}

#[test]
#[should_panic(expected = " what was in page ")]
fn twin_homes_are_not_fenced() {
    live_without(Rule::FenceHomes);
}
