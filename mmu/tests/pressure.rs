//! Guest memory over fewer frames: what one program cannot show alone, by threads, by faults of the swap device, and rule
//! by rule.
//!
//! The guest has paging off, so that a page's address is its frame's; its vCPUs have software TLBs that forget nothing.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::RngExt;
use proptest::test_runner::TestRng;
use umbra_mmu::bucket::Asker;
use umbra_mmu::discard::{Discard, NotDiscarded};
use umbra_mmu::fault::GATE_PATIENCE;
use umbra_mmu::invalidation::May;
use umbra_mmu::p2m::PageState;
use umbra_mmu::records::Cause;
use umbra_mmu::scope::NoIo;
use umbra_mmu::swap::{MemorySwap, SwapDevice, SwapSlot};
use umbra_mmu::sync::AtomicBool;
use umbra_mmu::{
    Access, Config, Context, Gfn, Gva, LocalStack, Machine, Mmu, NoVcpus, NotReached, Outcome, Refill,
    Shootdown, Shortage, TlbKind, Vcpu,
};

use crate::model::run::{audit, rng, seconds};
use umbra_mmu::twins::{Kick, SoftCpu};

/// Pages of the guest; its budget is a fraction of it.
const PAGES: u32 = 1000;
const LOW_PAGES: u32 = 16;

/// A swap device that fails once, at the operation with that number.
#[derive(Debug)]
struct Failing {
    inner: MemorySwap,
    fail_at: u64,
    done: Arc<AtomicU64>,
}

impl Failing {
    fn count(&self) -> io::Result<()> {
        match self.done.fetch_add(1, Ordering::SeqCst) {
            n if n == self.fail_at => Err(io::Error::from_raw_os_error(5)),
            _ => Ok(()),
        }
    }
}

impl SwapDevice for Failing {
    fn slots(&self) -> u32 {
        self.inner.slots()
    }

    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        self.count()?;
        self.inner.write(first, pages)
    }

    fn read(&self, first: SwapSlot, pages: &mut [u8]) -> io::Result<()> {
        self.count()?;
        self.inner.read(first, pages)
    }

    fn discard(&self, slots: Range<u32>) {
        self.inner.discard(slots);
    }
}

fn mmu(swap: Box<dyn SwapDevice>, shootdown: Box<dyn Shootdown>) -> Mmu {
    let config =
        Config { low_pages: LOW_PAGES, shadow_pages_max: 64, roots_max: 4, ..Config::of_pages(PAGES) };
    Mmu::new(Machine::anonymous(2000), config, shootdown).with_swap(swap)
}

/// One with frames for `high` pages or so beyond the least.
fn pressed(over: u32) -> Mmu {
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(NoVcpus));
    mmu.set_budget(mmu.budget_min() + over).expect("enough");
    mmu
}

type Guest<'m> = SoftCpu<&'m Mmu>;

fn guest<'m>(mmu: &'m Mmu, kicked: &Arc<AtomicBool>) -> Guest<'m> {
    SoftCpu::new(mmu, TlbKind::Sticky, kicked.clone())
}

/// One that nobody kicks.
fn alone(mmu: &Mmu) -> Guest<'_> {
    guest(mmu, &Arc::default())
}

/// Lets the others end when a thread does, by a panic too.
struct Leave<'m>(&'m Mmu, &'m AtomicBool);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.coherence().leave_guest(0);
        self.0.stop_background();
        self.1.store(true, Ordering::SeqCst);
    }
}

/// Stores to pages and loads them back, each many times; what is read must be what was written last.
fn workload(guest: &mut Guest<'_>, steps: u32, rng: &mut TestRng) -> Result<(), Shortage> {
    let mut kept = vec![0u64; PAGES as usize];
    for step in 0..steps {
        let page = rng.random_range(0..PAGES);
        if rng.random_range(0..3) == 0 {
            kept[page as usize] = u64::from(step) << 32 | u64::from(page);
            guest.store(page, 7, kept[page as usize])?;
        } else {
            assert_eq!(guest.load(page, 7)?, kept[page as usize], "page {page:#x} at step {step}");
        }
    }
    for page in 0..PAGES {
        assert_eq!(guest.load(page, 7)?, kept[page as usize], "page {page:#x} at the end");
    }
    guest.leave();
    Ok(())
}

#[test]
fn a_guest_larger_than_its_frames_keeps_every_word() {
    let mmu = pressed(100);
    workload(&mut alone(&mmu), 20_000, &mut rng(1)).expect("swap has room");
    audit(&mmu);
    let usage = mmu.usage();
    assert!(usage.refaults > 1000 && usage.swap_outs > 500 && usage.clean_drops > 100, "{usage:?}");
    assert!(usage.frames_used <= usage.budget, "{usage:?}");
}

#[test]
fn pages_that_are_all_in_use_go_when_the_budget_is_cut() {
    let mmu = pressed(600);
    let mut guest = alone(&mmu);
    for round in 1..3 {
        (LOW_PAGES..500).for_each(|page| guest.store(page, 7, round).expect("frames are plenty"));
    }
    guest.leave();
    mmu.set_budget(mmu.budget_min() + 10).expect("enough");
    assert!(mmu.is_over_budget());
    while mmu.background_round().expect("swap has room") {}
    assert!(!mmu.is_over_budget(), "{:?}", mmu.usage());
}

#[test]
fn every_swap_operation_fails_once_and_none_gives_wrong_data() {
    let run = |fail_at| {
        let done = Arc::new(AtomicU64::new(0));
        let swap = Failing { inner: MemorySwap::new(PAGES), fail_at, done: Arc::clone(&done) };
        let mmu = mmu(Box::new(swap), Box::new(NoVcpus));
        mmu.set_budget(mmu.budget_min() + 100).expect("enough");
        let mut guest = alone(&mmu);
        let result = workload(&mut guest, 1500, &mut rng(2));
        guest.leave();
        audit(&mmu);
        (result, mmu.background_round(), done.load(Ordering::SeqCst))
    };
    let (result, background, operations) = run(u64::MAX);
    assert!(result.is_ok() && background.is_ok() && operations > 50, "{result:?}, {operations} operations");
    for fail_at in 0..operations {
        let (result, background, _) = run(fail_at);
        let Err(Shortage::Swap(failed)) = result else { panic!("operation {fail_at}: {result:?}") };
        assert!(failed.to_string().contains("stopped before"), "{failed}");
        assert_eq!(background, Err(failed), "the background knows of it too");
    }
}

#[test]
fn a_full_swap_is_a_shortage_with_its_numbers_and_loses_nothing() {
    let mmu = mmu(Box::new(MemorySwap::new(100)), Box::new(NoVcpus));
    mmu.set_budget(mmu.budget_min() + 100).expect("enough");
    let mut guest = alone(&mmu);
    let stored =
        (0..PAGES).find_map(|page| guest.store(page, 0, u64::from(page) + 1).err().map(|e| (page, e)));
    let Some((last, shortage)) = stored else { panic!("1000 pages in 100 slots and 300 frames") };
    assert!(shortage.to_string().contains("swap has 0 of 100 slots free"), "{shortage}");
    guest.leave();
    audit(&mmu);
    // What is there is right: resident pages at once, swapped ones while clean pages can make room.
    let resident = (0..last).filter(|page| matches!(mmu.p2m().lookup(Gfn(*page)), PageState::Resident(_)));
    for page in resident {
        let mut word = [0; 8];
        mmu.read_bytes(&LocalStack::new(Context::Host), Gfn(page).at(0), &mut word).expect("resident");
        assert_eq!(u64::from_le_bytes(word), u64::from(page) + 1);
    }
}

#[test]
fn low_memory_stays() {
    let mmu = pressed(50);
    let mut guest = alone(&mmu);
    for page in 0..PAGES {
        guest.store(page, 0, 1).expect("swap has room");
    }
    let low: Vec<Gfn> = (0..LOW_PAGES).map(Gfn).collect();
    assert_eq!(mmu.page_out(None, &low), Ok(0));
    assert!(low.iter().all(|gfn| matches!(mmu.p2m().lookup(*gfn), PageState::Resident(_))));
    guest.leave();
    audit(&mmu);
}

#[test]
fn a_scope_without_io_drops_what_is_clean_and_writes_nothing() {
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(NoVcpus));
    let mut guest = alone(&mmu);
    for page in 100..140 {
        guest.store(page, 0, 1).expect("enough frames");
    }
    let pages: Vec<Gfn> = (100..140).map(Gfn).collect();
    guest.leave();
    assert_eq!(mmu.page_out(None, &pages[..20]), Ok(20));
    let writes = mmu.usage().swap_writes;
    for page in 100..110 {
        assert_eq!(guest.load(page, 0), Ok(1));
    }
    guest.leave();
    let scope = NoIo::enter();
    assert_eq!(mmu.page_out(None, &pages), Ok(16), "clean pages, those read ahead among them; no dirty one");
    drop(scope);
    assert_eq!(mmu.usage().swap_writes, writes);
    assert_eq!(mmu.page_out(None, &pages), Ok(20), "and the dirty ones now");
    audit(&mmu);
}

#[test]
fn a_page_that_is_only_read_goes_again_without_a_write() {
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(NoVcpus));
    let mut guest = alone(&mmu);
    guest.store(200, 0, 5).expect("a frame");
    guest.leave();
    for round in 0..3 {
        mmu.page_out(None, &[Gfn(200)]).expect("swap has room");
        assert_eq!(guest.load(200, 0), Ok(5));
        guest.leave();
        assert_eq!(mmu.usage().swap_outs, 1, "round {round}");
    }
    guest.store(200, 0, 6).expect("a frame");
    guest.leave();
    mmu.page_out(None, &[Gfn(200)]).expect("swap has room");
    assert_eq!((mmu.usage().swap_outs, guest.load(200, 0)), (2, Ok(6)));
    guest.leave();
    // By the VMM's own hand as well.
    mmu.write_bytes(&LocalStack::new(Context::Host), Gfn(200).at(0), &[7]).expect("resident");
    let before = mmu.p2m().generations(Gfn(200));
    mmu.page_out(None, &[Gfn(200)]).expect("swap has room");
    assert_eq!(mmu.p2m().generations(Gfn(200)).mapping, before.mapping + 1);
    assert_eq!((mmu.usage().swap_outs, guest.load(200, 0)), (3, Ok(7)));
    guest.leave();
    audit(&mmu);
}

/// What a vCPU waited for is counted, and what a device or an operator did is not.
#[test]
fn waits_for_a_page_are_those_of_vcpus_whatever_they_wait_for() {
    let mmu = pressed(100);
    let waits = || (mmu.reclaim_stats().direct, mmu.reclaim_stats().page_waits);
    let stack = LocalStack::new(Context::Host);
    let write =
        |own, page: u32| mmu.write_bytes_sleeping(own, &stack, Gfn(page).at(0), &[1]).expect("a frame");
    (300..700).for_each(|page| write(None, page));
    assert_eq!(waits(), (0, 0), "nobody who would run guest code");
    let before = mmu.reclaim_stats().refaults;
    mmu.bring_in(Some(0), Gfn(300)).expect("it is in swap");
    assert_eq!((mmu.reclaim_stats().refaults, waits().1), (before + 1, 1), "a read from swap is a wait");
    mmu.bring_in(Some(0), Gfn(300)).expect("it is here");
    assert_eq!(waits().1, 1, "nothing was waited for");
    (700..900).for_each(|page| write(Some(0), page));
    let (direct, all) = waits();
    assert!(0 < direct && direct < all, "{direct} of {all}");
}

#[test]
fn pages_of_zeros_cost_no_slot() {
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(NoVcpus));
    let mut guest = alone(&mmu);
    guest.store(300, 0, 1).expect("a frame");
    guest.store(300, 0, 0).expect("a frame");
    assert_eq!(guest.load(301, 0), Ok(0));
    guest.leave();
    assert_eq!(mmu.page_out(None, &[Gfn(300), Gfn(301)]), Ok(2));
    assert_eq!((mmu.usage().swap_outs, mmu.usage().zero_drops), (0, 2));
    assert_eq!(mmu.p2m().lookup(Gfn(300)), PageState::Zero);
    audit(&mmu);
}

#[test]
fn a_caller_that_may_not_sleep_is_told_so_and_nothing_has_changed() {
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(NoVcpus));
    let mut guest = alone(&mmu);
    guest.store(400, 0, 9).expect("a frame");
    let refused = mmu.discard(None, 400..401, Discard::Zero, May::NotSleep);
    assert!(matches!(refused, Err(NotDiscarded::WouldBlock(_))), "{refused:?}: the vCPU is in the guest");
    assert_eq!(guest.load(400, 0), Ok(9));
    guest.leave();
    assert_eq!(
        mmu.discard(None, 400..401, Discard::Zero, May::NotSleep),
        Ok(()),
        "nobody is there to wait for"
    );
    assert_eq!(guest.load(400, 0), Ok(0));
    guest.leave();
    audit(&mmu);
}

/// The host and the swap device take their time: who may not sleep leaves what is for them to the background.
#[test]
fn a_discard_that_may_not_sleep_leaves_frames_and_slots_to_the_background() {
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(NoVcpus));
    let mut guest = alone(&mmu);
    (400..700).for_each(|page| guest.store(page, 3, 1).expect("a frame"));
    guest.leave();
    mmu.page_out(None, &[Gfn(405), Gfn(406)]).expect("swap has room");
    let before = mmu.reclaim_stats().given_back;
    assert_eq!(mmu.discard(None, 400..700, Discard::Zero, May::NotSleep), Ok(()));
    assert_eq!((mmu.reclaim_stats().given_back, mmu.usage().resident), (before, 0), "the host was asked");
    assert!(mmu.wait_for_background_work(), "somebody is to come for them");
    mmu.background_round().expect("swap works");
    let given = mmu.reclaim_stats().given_back - before;
    assert!(given > 200, "{given} of 298 frames went back");
    audit(&mmu);
}

#[test]
fn a_discarded_page_reads_as_zeros_wherever_it_was() {
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(NoVcpus));
    let mut guest = alone(&mmu);
    for page in 500..520 {
        guest.store(page, 3, 1).expect("a frame");
    }
    guest.leave();
    mmu.page_out(None, &[Gfn(505), Gfn(506)]).expect("swap has room");
    mmu.discard(None, 495..510, Discard::Zero, May::Sleep).expect("nothing holds them");
    mmu.discard(None, 510..515, Discard::Balloon, May::Sleep).expect("nothing holds them");
    assert_eq!(mmu.usage().ballooned, 5);
    for page in 495..520 {
        assert_eq!(guest.load(page, 3), Ok(u64::from(page >= 515)), "page {page}");
    }
    assert_eq!(mmu.usage().ballooned, 0, "a touch takes a page back");
    guest.leave();
    audit(&mmu);
}

#[test]
fn what_the_guest_gives_up_goes_back_to_the_host_where_there_is_no_budget_too() {
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(NoVcpus));
    let mut guest = alone(&mmu);
    (400..700).for_each(|page| guest.store(page, 3, 1).expect("a frame"));
    guest.leave();
    let before = mmu.usage().frames_used;
    mmu.discard(None, 400..700, Discard::Balloon, May::Sleep).expect("nothing holds them");
    let (given, used) = (mmu.reclaim_stats().given_back, mmu.usage().frames_used);
    assert!(given > 200, "{given} of 300 frames went back");
    assert_eq!(u64::from(before - used), given, "and count as given");
    (400..700).for_each(|page| assert_eq!(guest.load(page, 3), Ok(0), "page {page}"));
    guest.leave();
    audit(&mmu);
}

/// A vCPU that has met the closed gate of `page` until it asks to be let through, or is just about to.
fn starving(mmu: &Mmu, page: Gfn, meet: u32) -> Vcpu {
    let vcpu = mmu.soft_vcpu(0, TlbKind::Sticky);
    mmu.buckets().close(page);
    for _ in 0..meet {
        mmu.tlb_enter(&vcpu);
        mmu.leave(&vcpu);
        assert_eq!(mmu.fault(&vcpu, Gva(page.0 << 12), Access::write(false)), Outcome::Gate(page));
    }
    mmu.buckets().open(page);
    vcpu
}

#[test]
fn a_page_that_a_fill_starves_for_is_not_waited_for_where_that_is_not_allowed() {
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(NoVcpus));
    let vcpu = starving(&mmu, Gfn(600), GATE_PATIENCE);
    let discard = |own, pages, may| mmu.discard(own, pages, Discard::Balloon, may);
    let refused = discard(None, 595..605, May::NotSleep);
    assert!(matches!(refused, Err(NotDiscarded::WouldBlock(_))), "{refused:?}");
    assert_eq!(mmu.usage().ballooned, 0, "nothing has changed");
    assert_eq!(discard(None, 601..605, May::NotSleep), Ok(()), "pages with other gates");
    let refused = discard(None, 664..665, May::NotSleep);
    assert!(matches!(refused, Err(NotDiscarded::WouldBlock(_))), "{refused:?}, with the same gate");
    assert_eq!(discard(Some(vcpu.id()), 600..601, May::NotSleep), Ok(()), "it asks itself");
    assert_eq!(mmu.usage().ballooned, 5);
}

/// Counts the kicks of a vCPU that does not heed them.
struct Kicks(Arc<AtomicU64>);

impl Shootdown for Kicks {
    fn kick(&self, _vcpu: u32) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// However many of its pages are asked for by vCPUs that do not come: they may have stopped.
#[test]
fn a_discard_waits_for_starving_fills_once_and_not_for_each_page() {
    let kicks = Arc::new(AtomicU64::new(0));
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(Kicks(kicks.clone())));
    (600..632).for_each(|page| mmu.buckets().starve(Asker::Fill(0), Gfn(page)));
    mmu.coherence().enter_guest(0);
    let discard = |pages| {
        assert_eq!(mmu.discard(None, pages, Discard::Balloon, May::Sleep), Ok(()));
        kicks.swap(0, Ordering::SeqCst)
    };
    let one = discard(600..601);
    assert_eq!((one > 100, discard(600..632)), (true, one), "{one} kicks for the first page");
}

/// A swap device whose reads wait to be let through.
#[derive(Debug)]
struct Held {
    inner: MemorySwap,
    reading: Arc<AtomicU64>,
    go: Arc<AtomicBool>,
}

impl SwapDevice for Held {
    fn slots(&self) -> u32 {
        self.inner.slots()
    }

    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        self.inner.write(first, pages)
    }

    fn read(&self, first: SwapSlot, pages: &mut [u8]) -> io::Result<()> {
        self.reading.fetch_add(1, Ordering::SeqCst);
        while !self.go.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_micros(100));
        }
        self.inner.read(first, pages)
    }

    fn discard(&self, slots: Range<u32>) {
        self.inner.discard(slots);
    }
}

/// However often others who share its gate open that: what counts is the page.
#[test]
fn a_discard_waits_for_a_page_that_is_read_back_slowly() {
    let (reading, go) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let swap = Held { inner: MemorySwap::new(PAGES), reading: reading.clone(), go: go.clone() };
    let mmu = mmu(Box::new(swap), Box::new(NoVcpus));
    let mut guest = alone(&mmu);
    guest.store(600, 0, 7).expect("a frame");
    guest.leave();
    assert_eq!(mmu.page_out(None, &[Gfn(600)]), Ok(1));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| mmu.bring_in(None, Gfn(600)));
        while reading.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        let discard = scope.spawn(|| mmu.discard(None, 600..601, Discard::Zero, May::Sleep));
        let end = Instant::now() + Duration::from_millis(300);
        while Instant::now() < end {
            mmu.buckets().close(Gfn(664));
            mmu.buckets().open(Gfn(664));
            std::thread::yield_now();
        }
        go.store(true, Ordering::SeqCst);
        assert_eq!(reader.join().expect("no panic"), Ok(()));
        assert_eq!(discard.join().expect("no panic"), Ok(()));
    });
    assert_eq!(mmu.p2m().lookup(Gfn(600)), PageState::Zero);
    audit(&mmu);
}

/// What it asked for is there: it needs no second stay in the guest, which may never come.
#[test]
fn a_starving_vcpu_that_refills_its_page_has_it() {
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(NoVcpus));
    let (page, other) = (Gfn(600), Gva(601 << 12));
    let vcpu = starving(&mmu, page, GATE_PATIENCE - 1);
    assert_eq!(mmu.fault(&vcpu, other, Access::read(false)), Outcome::Fixed);
    mmu.buckets().close(page);
    assert_eq!(mmu.fault(&vcpu, Gva(page.0 << 12), Access::write(false)), Outcome::Gate(page));
    mmu.buckets().open(page);
    mmu.tlb_enter(&vcpu);
    assert_eq!(mmu.tlb_refill(&vcpu, Gva(page.0 << 12), Access::write(false)), Refill::Done);
    assert!(mmu.buckets().is_starving(page), "it has not used it yet");
    mmu.leave(&vcpu);
    assert!(!mmu.buckets().is_starving(page));
}

/// A vCPU that was kicked before it ran asks on; one that will not run asks for nothing.
#[test]
fn a_starving_vcpu_that_did_not_run_asks_on_and_one_that_rests_does_not() {
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(NoVcpus));
    let page = Gfn(600);
    let vcpu = starving(&mmu, page, GATE_PATIENCE);
    assert_eq!(mmu.fault(&vcpu, Gva(page.0 << 12), Access::write(false)), Outcome::Fixed);
    for _ in 0..3 {
        mmu.tlb_enter(&vcpu);
        mmu.leave_unrun(&vcpu);
        assert!(mmu.buckets().is_starving(page));
    }
    mmu.rest(&vcpu);
    assert!(!mmu.buckets().is_starving(page));
}

/// Refills are made inside the guest, and are no entries.
#[test]
fn a_starving_vcpu_that_refills_another_page_has_left_for_good_all_the_same() {
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(NoVcpus));
    let (page, other) = (Gfn(600), Gva(601 << 12));
    let vcpu = starving(&mmu, page, GATE_PATIENCE - 1);
    assert_eq!(mmu.fault(&vcpu, other, Access::read(false)), Outcome::Fixed);
    mmu.buckets().close(page);
    assert_eq!(mmu.fault(&vcpu, Gva(page.0 << 12), Access::write(false)), Outcome::Gate(page));
    for left in 0..2 {
        assert!(mmu.buckets().is_starving(page), "after it has left {left} times");
        mmu.tlb_enter(&vcpu);
        assert_eq!(mmu.tlb_refill(&vcpu, other, Access::read(false)), Refill::Done);
        mmu.leave(&vcpu);
    }
    assert!(!mmu.buckets().is_starving(page));
    assert_eq!(mmu.fault(&vcpu, Gva(page.0 << 12), Access::write(false)), Outcome::Gate(page));
    assert!(!mmu.buckets().is_starving(page), "the count has begun anew");
    mmu.buckets().open(page);
}

/// A fault in a range that is invalidated all the time meets at most so many closed gates.
#[test]
fn a_fault_under_continuous_invalidation_gets_through() {
    let kicked = Arc::new(AtomicBool::new(false));
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(Kick(Arc::clone(&kicked))));
    let stop = AtomicBool::new(false);
    let (mut faults, mut rounds) = (0u32, 0u32);
    std::thread::scope(|scope| {
        let invalidator = scope.spawn(|| {
            let mut rounds = 0;
            while !stop.load(Ordering::SeqCst) {
                mmu.discard(None, 600..632, Discard::Zero, May::Sleep).expect("nothing holds them for long");
                rounds += 1;
            }
            rounds
        });
        let _leave = Leave(&mmu, &stop);
        let mut guest = guest(&mmu, &kicked);
        let end = Instant::now() + Duration::from_millis(500);
        while Instant::now() < end {
            guest.store(600 + faults % 32, 0, 1).expect("enough frames");
            faults += 1;
        }
        guest.leave();
        stop.store(true, Ordering::SeqCst);
        rounds = invalidator.join().expect("no panic");
        assert!(guest.gates_max <= u64::from(GATE_PATIENCE) + 2, "{} closed gates in a row", guest.gates_max);
    });
    println!("pressure: {faults} faults through {rounds} invalidations");
    assert!(faults > 100 && rounds > 10, "{faults} faults, {rounds} rounds");
    audit(&mmu);
}

/// Who asks to be let through asks until guest code has run with the page, or has something else to do.
#[test]
fn a_starving_vcpu_asks_until_it_has_run() {
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(NoVcpus));
    let (vcpu, page) = (mmu.soft_vcpu(0, TlbKind::Sticky), Gfn(600));
    let fault = || mmu.fault(&vcpu, Gva(page.0 << 12), Access::write(false));
    let run = || {
        mmu.tlb_enter(&vcpu);
        mmu.leave(&vcpu);
    };
    let starve = || {
        mmu.buckets().close(page);
        for met in 1..=GATE_PATIENCE {
            assert!(!mmu.buckets().is_starving(page), "after {met} closed gates");
            run();
            assert_eq!(fault(), Outcome::Gate(page));
        }
        assert!(mmu.buckets().is_starving(page));
        mmu.buckets().open(page);
    };
    starve();
    run();
    assert_eq!(fault(), Outcome::Fixed);
    assert!(mmu.buckets().is_starving(page), "the page is mapped, and nobody has used it yet");
    run();
    assert!(!mmu.buckets().is_starving(page));

    // It ran twice without a fault: the count begins anew.
    run();
    mmu.zap_frame(page);
    starve();
    run();
    assert!(mmu.buckets().is_starving(page), "its next fault may be the page's");
    run();
    assert!(!mmu.buckets().is_starving(page), "it has gone on to something else");
}

const STEPS_MIN: u64 = 1000;

/// A vCPU, a device, the background thread and an operator who changes the budget, all at once.
#[test]
fn guest_device_background_and_operator_lose_no_word_between_them() {
    let kicked = Arc::new(AtomicBool::new(false));
    let mmu = mmu(Box::new(MemorySwap::new(PAGES)), Box::new(Kick(Arc::clone(&kicked))));
    let (least, end) = (mmu.budget_min(), Instant::now() + seconds(2.0));
    let (device_rounds, stop) = (AtomicU32::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let _leave = Leave(&mmu, &stop);
        scope.spawn(|| {
            while mmu.wait_for_background_work() {
                while mmu.background_round().expect("swap has room") {}
            }
        });
        scope.spawn(|| {
            let mut rng = rng(5);
            while Instant::now() < end {
                mmu.set_budget(least + rng.random_range(0..400)).expect("not under the least");
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        let device = scope.spawn(|| device(&mmu, end, &device_rounds));
        let mut guest = guest(&mmu, &kicked);
        let mut rng = rng(4);
        let mut kept = vec![0u64; PAGES as usize];
        let mut steps = 0u64;
        // On a machine that has no time for it, after the others too.
        while Instant::now() < end || steps <= STEPS_MIN {
            let page = rng.random_range(0..PAGES);
            steps += 1;
            if rng.random_range(0..3) == 0 {
                kept[page as usize] = steps;
                guest.store(page, 1, steps).expect("swap has room");
            } else {
                assert_eq!(
                    guest.load(page, 1),
                    Ok(kept[page as usize]),
                    "page {page:#x} after {steps} steps"
                );
            }
        }
        guest.rest();
        device.join().expect("the device saw no wrong word");
        println!(
            "pressure: {steps} steps, {} device rounds, {:?}",
            device_rounds.load(Ordering::SeqCst),
            mmu.usage()
        );
    });
    audit(&mmu);
    assert!(mmu.records().totals(Cause::Reclaim).pages > 100, "{:?}", mmu.usage());
}

/// Writes and reads words of its own in the pages of the guest, by the window.
fn device(mmu: &Mmu, end: Instant, rounds: &AtomicU32) {
    let (window, mut rng) = (LocalStack::new(Context::Host), rng(6));
    let mut kept = vec![0u64; PAGES as usize];
    while Instant::now() < end {
        let page = rng.random_range(0..PAGES);
        let at = Gfn(page).at(8 * 40);
        let done: Result<(), NotReached> = if rng.random_range(0..2) == 0 {
            kept[page as usize] += 1;
            mmu.write_bytes_sleeping(None, &window, at, &kept[page as usize].to_le_bytes())
        } else {
            let mut word = [0; 8];
            let read = mmu.read_bytes_sleeping(None, &window, at, &mut word);
            assert_eq!(u64::from_le_bytes(word), kept[page as usize], "the device's word in page {page:#x}");
            read
        };
        done.expect("swap has room");
        rounds.fetch_add(1, Ordering::SeqCst);
    }
}
