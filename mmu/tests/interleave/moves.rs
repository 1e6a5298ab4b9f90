//! A page that comes and goes, while somebody uses it.
//!
//! ```text
//! a store through a window              whoever takes frames
//! map, store, unmap                     the page is Moving
//! tell the frame's code                 pinned, or swap is full: it is put back
//! ```
//!
//! A frame that goes takes what was decoded from it along. One that stays must be told of every store, also of those that
//! come to an end while it is on its way.
//!
//! And a life under pressure: a vCPU with a software TLB, a device with the window's only slot, and somebody who sends pages
//! to swap all the time. Each of the first two has words of its own in every page, and finds what it stored last. The twin's
//! vCPU says that it has flushed and has not.

use std::sync::Arc;

use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::RandomScheduler;
use umbra_mmu::p2m::PageState;
use umbra_mmu::swap::MemorySwap;
use umbra_mmu::sync::{AtomicBool, thread};
use umbra_mmu::window::Intent;
use umbra_mmu::{
    Access, Config, Context, Gfn, Gva, LocalStack, Machine, Mfn, Mmu, NoVcpus, Outcome, Shootdown, TlbKind,
    Vcpu, Width,
};

use super::{explore, run, use_pages};
use crate::model::run::audit;
use umbra_mmu::twins::{Kick, SoftCpu};

/// The page in question.
const PAGE: Gfn = Gfn(1);

/// Pages of a life under pressure, accesses of its vCPU, and rounds of the others.
const PAGES: u32 = 3;
const STEPS: u64 = 24;
const ROUNDS: u64 = 8;

/// A guest of a few pages with paging off. Swap has no room.
fn mmu(shootdown: Box<dyn Shootdown>) -> Mmu {
    let config = Config { shadow_pages_max: 64, roots_max: 4, ..Config::of_pages(PAGES) };
    Mmu::new(Machine::anonymous(32), config, shootdown)
}

fn frame(mmu: &Mmu) -> Mfn {
    match mmu.p2m().lookup(PAGE) {
        PageState::Resident(mfn) => mfn,
        state => panic!("the page is {state:?}"),
    }
}

/// Has the page's frame marked as one that code was decoded from.
fn decode(mmu: &Mmu, vcpu: &Vcpu) {
    let at = Gva(PAGE.at(0).0 as u32);
    assert_eq!(mmu.fault(vcpu, at, Access::execute(false)), Outcome::Fixed);
    mmu.tlb_enter(vcpu);
    let code = mmu.code_frame(vcpu, at, false).expect("it is mapped");
    mmu.coherence().leave_guest(0);
    assert_ne!(mmu.code_generation(code.mfn), 0);
}

#[test]
fn a_store_to_a_page_that_is_put_back_ends_the_code_decoded_from_it() {
    explore(|| {
        let mmu = Arc::new(mmu(Box::new(NoVcpus)));
        mmu.write_bytes(&LocalStack::new(Context::Host), PAGE.at(0), &[1]).expect("a frame");
        decode(&mmu, &mmu.soft_vcpu(0, TlbKind::Sized));
        let other = mmu.clone();
        let taker = thread::spawn(move || assert_eq!(other.page_out(None, &[PAGE]), Ok(0)));
        mmu.write_bytes_sleeping(None, &LocalStack::new(Context::Host), PAGE.at(8), &[1]).expect("memory");
        taker.join().expect("no panic");
        assert_eq!(mmu.code_generation(frame(&mmu)), 0, "code that was stored to would run on");
    });
}

/// Adds one to its word of a page, through the pool.
fn device(mmu: &Mmu) {
    let mut kept = [0; PAGES as usize];
    for _ in 0..ROUNDS {
        let page = thread_rng().gen_range(0..PAGES);
        let map = mmu.take_page(Gfn(page), Intent::Write, None).expect("there are frames");
        let word = &mut kept[page as usize];
        assert_eq!(map.load(16, Width::B8), *word, "the device's word of page {page}");
        *word += 1;
        map.store(16, Width::B8, *word);
    }
}

fn live_under_pressure(obeys: bool) {
    let kicked = Arc::new(AtomicBool::new(false));
    let mmu = mmu(Box::new(Kick(kicked.clone()))).with_swap(Box::new(MemorySwap::new(8)));
    let mmu = Arc::new(mmu.with_window_slots(1));
    let mut cpu = SoftCpu::new(mmu.clone(), TlbKind::Sized, kicked);
    cpu.obeys = obeys;
    let cpu = thread::spawn(move || use_pages(cpu, PAGES, STEPS));
    let own = mmu.clone();
    let device = thread::spawn(move || device(&own));
    for _ in 0..ROUNDS {
        let pages: Vec<Gfn> = (0..PAGES).filter(|_| thread_rng().r#gen()).map(Gfn).collect();
        mmu.page_out(None, &pages).expect("swap has room");
    }
    cpu.join().expect("no panic");
    device.join().expect("no panic");
    audit(&mmu);
}

#[test]
fn lives_under_pressure_lose_no_word() {
    explore(|| live_under_pressure(true));
}

#[test]
#[should_panic(expected = "INV-TLB-2")]
fn twin_a_soft_cpu_that_does_not_flush() {
    run(RandomScheduler::new(1000), || live_under_pressure(false));
}
