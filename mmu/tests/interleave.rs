//! Whole operations of an [`umbra_mmu::Mmu`], in orders that shuttle chooses.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" CARGO_TARGET_DIR=target/shuttle cargo test -p umbra-mmu --test model interleave
//! ```
//!
//! *Lives.* A short life of the guest of `model::cpus`, each CPU on a thread of its own and a third that invalidates: page
//! faults, edits of tables and INVLPG, CR3 loads, changes of CR0, unsync tables and their resynchronisation, eviction of
//! shadow pages, explain. They switch at every lock and atomic of the MMU, before every spte that is stored, within
//! hardware's walks and between translation and access. At the end of each life the audit must find nothing. What the
//! CPUs do is drawn from the schedule's own random numbers, so that a schedule is all there is to a failure.
//!
//! Half of the lives are run by chance alone, half by PCT, which orders the threads by priority and changes it at a few
//! points: orders in which one thread stands still for long. A twin, whose CPU does not flush when the ledger asks,
//! must fail.
//!
//! *Moves* (`moves`): two or three operations on one page that comes and goes. *Importers* (`imports`): the same with processes that
//! have pages too, and must give them up. *Gathers* (`gathers`): a range whose pages move to one block meanwhile. *Devices*: three sessions (`umbra_mmu::dma`) want
//! three of four slots each, overlapping and in opposite order, while their pages are taken away. Its twin takes them one by one,
//! and ends in a deadlock.
//!
//! `UMBRA_LIVES=100000` runs so many of each. A failure prints its schedule; with `UMBRA_SCHEDULE` that string, or the name
//! of a file that has it, and the name of the test, that life is lived again.
//!
//! Limits: every store is seen by all at once here; what store buffers do is loom's (`src/interleave`). Words of machine
//! memory are `std`'s atomics, which shuttle does not see: see `umbra_mmu::sync::point`.

mod gathers;
mod imports;
mod moves;

use std::sync::Arc;

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::{Config, Runner};
use umbra_mmu::dma::Session;
use umbra_mmu::swap::MemorySwap;
use umbra_mmu::sync::{AtomicU64, Ordering, thread};
use umbra_mmu::window::Intent;
use umbra_mmu::{Gfn, Machine, Mmu, NoVcpus};
use vm_memory::{Bytes, GuestAddress, Permissions};

use crate::model::cpus::{Cpu, Guest};
use crate::model::run::{audit, number, rng};
use umbra_mmu::twins::SoftCpu;

/// Steps of each CPU, and invalidations.
const STEPS: u32 = 16;
const INVALIDATIONS: u32 = 8;
/// Requests of each device.
const REQUESTS: u64 = 4;
/// Pages that each CPU uses of each kind: few, so that all meet at them.
const SLOTS: u32 = 2;
/// Frames for shadow pages in half of all lives: so few that dead ones must serve again.
const FEW: u32 = 8;
/// Changes of priority in a life under PCT.
const CHANGES: usize = 4;

/// Loads and stores its word of `pages` pages, so often.
fn use_pages(mut cpu: SoftCpu<Arc<Mmu>>, pages: u32, steps: u64) {
    let mut kept = vec![0; pages as usize];
    for step in 1..=steps {
        let page = thread_rng().gen_range(0..pages);
        if thread_rng().r#gen() {
            kept[page as usize] = step;
            cpu.store(page, 1, step).expect("there are frames");
        } else {
            assert_eq!(cpu.load(page, 1), Ok(kept[page as usize]), "page {page} at step {step}");
        }
    }
    cpu.rest();
}

/// `done` counts the CPUs that have done all their steps.
fn run_cpu(mut cpu: Cpu, id: u32, done: &AtomicU64) {
    cpu.load_cr3(id);
    for _ in 0..STEPS {
        cpu.step();
    }
    // The other may still wait for an answer.
    cpu.leave();
    done.fetch_add(1, Ordering::SeqCst);
    while done.load(Ordering::SeqCst) < 2 {
        cpu.answer_mail();
        thread::yield_now();
    }
}

fn live(pae: bool, obeys: bool) {
    let guest = Guest::new(pae, if thread_rng().r#gen() { 64 } else { FEW });
    let done = Arc::new(AtomicU64::new(0));
    let cpus: Vec<_> = [0, 1]
        .map(|id| {
            let mut cpu = guest.cpu(id, rng(thread_rng().r#gen()));
            (cpu.slots, cpu.obeys) = (SLOTS, obeys);
            let done = done.clone();
            thread::spawn(move || run_cpu(cpu, id, &done))
        })
        .into();
    let mut rng = rng(thread_rng().r#gen());
    for _ in 0..INVALIDATIONS {
        guest.invalidate(&mut rng, 4);
    }
    for cpu in cpus {
        cpu.join().expect("a CPU that panics ends the run");
    }
    audit(&guest.mmu);
}

fn run(scheduler: impl Scheduler + 'static, life: impl Fn() + Send + Sync + 'static) {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    config.silence_warnings = true;
    let lives = Runner::new(scheduler, config).run(life);
    println!("interleave: {lives} lives");
}

/// Requests of one device; each adds one to its own word of these pages.
fn run_device(mmu: &Mmu, word: u64, pages: [u64; 3]) {
    let at = |page: u64| GuestAddress((page << 12) + 8 * word);
    let touch = |plan: &Session<'_>| {
        pages.iter().all(|page| plan.touch(at(*page), 8, Permissions::Write).is_ok());
    };
    for round in 0..REQUESTS {
        let (session, ()) = mmu.session(None, touch).expect("swap has room");
        for page in pages {
            assert_eq!(session.read_obj::<u64>(at(page)).expect("planned"), round);
            session.write_obj(round + 1, at(page)).expect("planned");
        }
    }
}

/// The same, by pages that are taken one by one while the others are held; a mapping that is passed on is nobody's, and the
/// check that nothing is held (INV-POOL-2) does not see it.
fn run_greedy_device(mmu: &Mmu, _: u64, pages: [u64; 3]) {
    for _ in 0..REQUESTS {
        let take =
            |page| mmu.take_page(Gfn(page as u32), Intent::Write, None).expect("swap has room").pass_on();
        drop(pages.map(take));
    }
}

fn live_devices(run_device: fn(&Mmu, u64, [u64; 3])) {
    let config = umbra_mmu::Config::of_pages(16);
    let mmu = Mmu::new(Machine::anonymous(320), config, Box::new(NoVcpus));
    let mmu = Arc::new(mmu.with_swap(Box::new(MemorySwap::new(32))).with_window_slots(4));
    let devices = [[1, 2, 3], [5, 4, 3], [6, 5, 1]].into_iter().zip(0..).map(|(pages, word)| {
        let mmu = mmu.clone();
        thread::spawn(move || run_device(&mmu, word, pages))
    });
    let devices: Vec<_> = devices.collect();
    for _ in 0..INVALIDATIONS {
        mmu.page_out(None, &[1, 2, 3, 4, 5, 6].map(Gfn)).expect("swap has room");
    }
    for device in devices {
        device.join().expect("a device that panics ends the run");
    }
    audit(&mmu);
}

/// The schedule that is to be lived again.
fn replay() -> Option<ReplayScheduler> {
    let schedule = std::env::var("UMBRA_SCHEDULE").ok()?;
    let text = std::fs::read_to_string(&schedule).unwrap_or(schedule);
    Some(ReplayScheduler::new_from_encoded(&text))
}

fn explore(life: impl Fn() + Clone + Send + Sync + 'static) {
    explore_so_often(1000, life);
}

/// So many lives of each sort, if nobody asked for others.
fn explore_so_often(usual: usize, life: impl Fn() + Clone + Send + Sync + 'static) {
    if let Some(replay) = replay() {
        return run(replay, life);
    }
    let lives = number("UMBRA_LIVES").unwrap_or(usual);
    run(RandomScheduler::new(lives), life.clone());
    run(PctScheduler::new(CHANGES, lives), life);
}

#[test]
fn lives_with_two_level_tables_keep_every_promise() {
    explore(|| live(false, true));
}

#[test]
fn lives_with_pae_tables_keep_every_promise() {
    explore(|| live(true, true));
}

#[test]
fn lives_of_devices_end_and_lose_no_word() {
    explore(|| live_devices(run_device));
}

#[test]
#[should_panic(expected = "deadlock")]
fn twin_devices_that_take_their_pages_one_by_one() {
    run(RandomScheduler::new(1000), || live_devices(run_greedy_device));
}

#[test]
#[should_panic]
fn twin_a_cpu_that_does_not_flush() {
    run(RandomScheduler::new(1000), || live(false, false));
}
