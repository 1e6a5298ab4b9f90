//! `xpmem-race`: a vCPU, importers, and somebody who takes pages away from all of them.
//!
//! Each has a word of its own in every page, adds to it, and finds what it stored last. Pages go to swap, come back in whichever frame
//! is free, go home when they are imported. With a rule left out the race need not be met in the first life: there are as many as it
//! takes, up to [`LIVES_MAX`], some brisk and some lazy.

use std::io;
use std::sync::Arc;

use umbra_mmu::discard::Discard;
use umbra_mmu::external::{ImporterId, SegmentId};
use umbra_mmu::invalidation::May;
use umbra_mmu::records::Cause;
use umbra_mmu::swap::MemorySwap;
use umbra_mmu::sync::{AtomicBool, AtomicU64, Ordering, sim, thread};
use umbra_mmu::twins::{Importer, Importers, Kick, Manner, SoftCpu, Yields};
use umbra_mmu::{Config, Gfn, Machine, Mmu, TlbKind};

use super::super::story::Fact;
use super::{Stage, draw};
use crate::vm::simulation::Thread;

const PAGES: u32 = 3;
const IMPORTERS: u32 = 2;
/// Enough for a page at home and another, and the tables of a guest without paging.
const FRAMES: u32 = 64;
/// What each importer does, accesses of the vCPU, and how often others run at most before a pause is over.
const STEPS: u64 = 48;
const ACCESSES: u64 = 96;
const PAUSE: u32 = 24;
const PACE: Yields<fn(u32) -> u32> = Yields(PAUSE, draw);
/// Lives of a guest that keeps all rules, and of one that goes without.
const LIVES: u32 = 12;
const LIVES_MAX: u32 = 2000;
/// What is not asked before it is done would wait then.
const ATTEMPTS: u32 = 40;

/// A guest and its importers.
struct House {
    mmu: Arc<Mmu>,
    importers: Importers,
    kicked: Arc<AtomicBool>,
}

fn house(stage: &Stage) -> House {
    let machine = Machine::anonymous(FRAMES + PAGES);
    let importers = Importers::new(IMPORTERS, machine.clone());
    let kicked = Arc::new(AtomicBool::new(false));
    let config = Config { shadow_pages_max: 64, roots_max: 4, homes: true, ..Config::of_pages(PAGES) };
    let mmu = Mmu::new(machine, config, Box::new(Kick(kicked.clone())))
        .with_rules(stage.rules)
        .with_swap(Box::new(MemorySwap::new(2 * PAGES)))
        .with_external(Box::new(importers.clone()))
        .with_host(Box::new(importers.clone()));
    House { mmu: Arc::new(mmu), importers, kicked }
}

impl House {
    /// Its importer of that number.
    fn importer(&self, id: u32, segment: SegmentId) -> Arc<Importer<Arc<Mmu>>> {
        let (mmu, all) = (self.mmu.clone(), self.importers.clone());
        Arc::new(Importer { mmu, all, id, segment, stores: true, manner: Manner::Honest })
    }

    /// All of its memory.
    fn segment(&self) -> SegmentId {
        self.mmu.make_segment(Gfn(0), PAGES, true).expect("all of a guest without segments")
    }
}

/// The vCPU's program.
fn use_pages(mut cpu: SoftCpu<Arc<Mmu>>) {
    let mut kept = [0; PAGES as usize];
    for step in 1..=ACCESSES {
        let page = draw(PAGES);
        let word = &mut kept[page as usize];
        let found = cpu.load(page, 1);
        assert_eq!(found, Ok(*word), "the vCPU's word in page {page}");
        *word = step;
        let stored = cpu.store(page, 1, step);
        assert_eq!(stored, Ok(()), "the vCPU's store to page {page}");
    }
    cpu.rest();
}

/// Starts the vCPU and the importers of a house; the count is of importers that have gone.
fn move_in(stage: &Stage, house: &House) -> io::Result<(Vec<Thread>, Arc<AtomicU64>)> {
    let segment = house.segment();
    let gone = Arc::new(AtomicU64::new(0));
    let cpu = SoftCpu::new(house.mmu.clone(), TlbKind::Sticky, house.kicked.clone());
    let mut threads = vec![stage.start("vCPU 0", move || use_pages(cpu))?];
    for id in 0..IMPORTERS {
        let importer = house.importer(id, segment);
        let (listener, gone) = (importer.clone(), gone.clone());
        threads.push(stage.start(&format!("importer {id}, its ear"), move || listener.listen(&PACE))?);
        threads.push(stage.start(&format!("importer {id}"), move || {
            importer.live(0..PAGES, STEPS, &PACE);
            gone.fetch_add(1, Ordering::SeqCst);
        })?);
    }
    Ok((threads, gone))
}

fn lives(stage: &Stage) -> u32 {
    if stage.rules.left_out().is_some() { LIVES_MAX } else { LIVES }
}

/// Somebody who may sleep takes pages away.
pub fn play(stage: &Stage) -> io::Result<()> {
    let mut taken = 0;
    for _ in 0..lives(stage) {
        sim::change_pace();
        let house = house(stage);
        let (threads, gone) = move_in(stage, &house)?;
        while gone.load(Ordering::SeqCst) < u64::from(IMPORTERS) {
            (0..draw(PAUSE)).for_each(|_| thread::yield_now());
            let pages: Vec<Gfn> = (0..PAGES).filter(|_| draw(2) == 0).map(Gfn).collect();
            taken += house.mmu.page_out(None, &pages).expect("swap in memory does not fail");
        }
        threads.into_iter().for_each(Thread::join);
        let wrong = house.mmu.audit();
        assert!(wrong.is_empty(), "the audit: {}", wrong.join("; "));
    }
    let lives = lives(stage);
    stage.tell(&Fact::Measured(format!("pages taken away = {taken} in {lives} lives")));
    Ok(())
}

/// Somebody who may not sleep does.
pub fn play_atomic(stage: &Stage) -> io::Result<()> {
    let (mut done, mut refused) = (0u32, 0u32);
    for _ in 0..LIVES {
        let house = house(stage);
        let segment = house.segment();
        let importer = house.importer(0, segment);
        let listener = importer.clone();
        let ear = stage.start("importer 0, its ear", move || listener.listen(&PACE))?;
        let has = importer.clone();
        for _ in 0..ATTEMPTS {
            let page = draw(PAGES);
            let held = draw(2) == 0;
            if held {
                let given = house.mmu.import_page(ImporterId(0), segment, Gfn(page), true);
                assert!(given.is_ok(), "page {page} could not be imported: {given:?}");
            }
            let told = house.mmu.records().totals(Cause::Discard).told;
            match house.mmu.discard(None, page..page + 1, Discard::Zero, May::NotSleep) {
                Ok(()) => done += 1,
                Err(_) => refused += 1,
            }
            let told = house.mmu.records().totals(Cause::Discard).told - told;
            assert_eq!(told, 0, "who may not sleep has told an importer");
            house.mmu.give_up_page(ImporterId(0), Gfn(page));
        }
        has.live(0..PAGES, 0, &PACE);
        ear.join();
    }
    assert!(done > 0 && refused > 0, "{done} done and {refused} refused: there was nothing to see");
    stage.tell(&Fact::Measured(format!("discards done = {done} at once")));
    stage
        .tell(&Fact::Measured(format!("discards refused = {refused}, with nothing changed and nobody told")));
    Ok(())
}

/// How many messages there are, where one page of each life is imported and where all are.
pub fn play_mark(stage: &Stage) -> io::Result<()> {
    for imported in [0, 1, PAGES] {
        let house = house(stage);
        let segment = house.segment();
        let importer = house.importer(0, segment);
        let listener = importer.clone();
        let ear = stage.start("importer 0, its ear", move || listener.listen(&PACE))?;
        let mut cpu = SoftCpu::new(house.mmu.clone(), TlbKind::Sticky, house.kicked.clone());
        let (mut taken, mut told) = (0, 0);
        for round in 0..u64::from(ATTEMPTS) {
            for page in 0..PAGES {
                assert_eq!(cpu.store(page, 1, round), Ok(()), "the vCPU's store to page {page}");
            }
            cpu.leave();
            for page in 0..imported {
                let given = house.mmu.import_page(ImporterId(0), segment, Gfn(page), true);
                assert!(given.is_ok(), "page {page} could not be imported: {given:?}");
            }
            for page in 0..PAGES {
                taken += house.mmu.page_out(None, &[Gfn(page)]).expect("swap in memory does not fail");
            }
            told = house.mmu.records().totals(Cause::PageOut).told;
        }
        cpu.rest();
        importer.live(0..PAGES, 0, &PACE);
        ear.join();
        assert_eq!(told, u64::from(imported * ATTEMPTS), "messages to importers");
        stage.tell(&Fact::Measured(format!(
            "messages = {told} for {taken} pages taken away, {imported} of {PAGES} imported"
        )));
    }
    Ok(())
}
