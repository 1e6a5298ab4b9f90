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
use umbra_mmu::sync::{AtomicBool, Ordering, thread};
use umbra_mmu::window::Intent;
use umbra_mmu::{
    Access, AccessKind, Config, Context, Gfn, Gva, LocalStack, Machine, Mfn, Miss, Mmu, NoVcpus, Outcome,
    Shootdown, TlbKind, Vcpu, Width,
};

use super::{explore, run};

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

struct Kick(Arc<AtomicBool>);

impl Shootdown for Kick {
    fn kick(&self, _vcpu: u32) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A vCPU as the soft backend runs it.
struct Cpu {
    mmu: Arc<Mmu>,
    vcpu: Vcpu,
    kicked: Arc<AtomicBool>,
    /// It flushes when it is asked to.
    obeys: bool,
}

impl Cpu {
    fn enter(&self) {
        if self.kicked.swap(false, Ordering::SeqCst) {
            self.mmu.coherence().leave_guest(0);
        }
        if self.obeys {
            self.mmu.tlb_enter(&self.vcpu);
        } else if self.mmu.coherence().enter_guest(0) {
            let epoch = self.mmu.coherence().begin_flush();
            self.mmu.coherence().end_flush(0, epoch);
        }
    }

    /// The word at `at`, loaded or stored.
    fn word(&self, at: Gva, store: Option<u64>) -> u64 {
        let kind = if store.is_some() { AccessKind::Write } else { AccessKind::Read };
        loop {
            self.enter();
            let done = match store {
                Some(value) => self.mmu.tlb_store(&self.vcpu, at, Width::B8, value, false).map(|()| value),
                None => self.mmu.tlb_load(&self.vcpu, at, Width::B8, false),
            };
            match done {
                Ok(word) => return word,
                Err(Miss::Incoherent(violation)) => panic!("{violation}"),
                Err(Miss::Fault) => self.mmu.coherence().leave_guest(0),
            }
            match self.mmu.fault(&self.vcpu, at, Access { kind, user: false }) {
                Outcome::Need(gfn) => self.mmu.bring_in(Some(0), gfn).expect("there are frames"),
                Outcome::Gate(gfn) => self.mmu.wait_at_gate(&self.vcpu, gfn),
                Outcome::Again => thread::yield_now(),
                Outcome::Fixed | Outcome::Spurious => {}
                outcome => panic!("{at:?}: {outcome:?}"),
            }
        }
    }

    fn run(self) {
        let mut kept = [0; PAGES as usize];
        for step in 1..=STEPS {
            let page = thread_rng().gen_range(0..PAGES);
            let at = Gva((page << 12) + 8);
            if thread_rng().r#gen() {
                kept[page as usize] = self.word(at, Some(step));
            } else {
                assert_eq!(self.word(at, None), kept[page as usize], "page {page} at step {step}");
            }
        }
        self.mmu.coherence().leave_guest(0);
    }
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
    let cpu = Cpu { vcpu: mmu.soft_vcpu(0, TlbKind::Sized), mmu: mmu.clone(), kicked, obeys };
    let cpu = thread::spawn(move || cpu.run());
    let own = mmu.clone();
    let device = thread::spawn(move || device(&own));
    for _ in 0..ROUNDS {
        let pages: Vec<Gfn> = (0..PAGES).filter(|_| thread_rng().r#gen()).map(Gfn).collect();
        mmu.page_out(None, &pages).expect("swap has room");
    }
    cpu.join().expect("no panic");
    device.join().expect("no panic");
    let findings = mmu.audit();
    assert!(findings.is_empty(), "{findings:#?}");
}

#[test]
fn lives_under_pressure_lose_no_word() {
    explore(|| live_under_pressure(true));
}

#[test]
#[should_panic]
fn twin_a_soft_cpu_that_does_not_flush() {
    run(RandomScheduler::new(1000), || live_under_pressure(false));
}
