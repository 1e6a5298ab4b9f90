//! Sessions: rule by rule, by threads that want the same slots and pages, and at random against a flat memory.
//!
//! What a ring of `virtio-queue` makes of them is in `ring`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::RngExt;
use proptest::test_runner::TestRng;
use umbra_mmu::discard::{Discard, NotDiscarded};
use umbra_mmu::dma::{NoSession, PAGES_MAX, Refused, Session};
use umbra_mmu::invalidation::May;
use umbra_mmu::p2m::PageState;
use umbra_mmu::swap::MemorySwap;
use umbra_mmu::window::Intent;
use umbra_mmu::{
    Access, Config, Context, Flush, Gfn, Gpa, Gva, LocalStack, Machine, Mmu, Mode, NoVcpus, Outcome, Vcpu,
    Width,
};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use crate::model::run::{audit, rng, seconds};

/// Pages of the guest.
pub const PAGES: u32 = 600;
pub const LOW_PAGES: u32 = 8;
const SWAP: u32 = 2 * PAGES;

pub fn mmu(slots: u32) -> Mmu {
    let config =
        Config { low_pages: LOW_PAGES, shadow_pages_max: 64, roots_max: 4, ..Config::of_pages(PAGES) };
    let mmu = Mmu::new(Machine::anonymous(1200), config, Box::new(NoVcpus));
    mmu.with_swap(Box::new(MemorySwap::new(SWAP))).with_window_slots(slots)
}

/// Stores as the guest or the loader would, by another way than a session.
pub fn poke(mmu: &Mmu, at: u64, bytes: &[u8]) {
    mmu.write_bytes_sleeping(None, &LocalStack::new(Context::Host), Gpa(at), bytes).expect("memory");
}

pub fn peek(mmu: &Mmu, at: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    mmu.read_bytes_sleeping(None, &LocalStack::new(Context::Host), Gpa(at), &mut bytes).expect("memory");
    bytes
}

pub fn page_out(mmu: &Mmu, pages: impl IntoIterator<Item = u32>) -> u32 {
    let pages: Vec<Gfn> = pages.into_iter().map(Gfn).collect();
    mmu.page_out(None, &pages).expect("swap has room")
}

fn page(number: u32) -> GuestAddress {
    GuestAddress(u64::from(number) << 12)
}

/// A session with this range to write.
fn open(mmu: &Mmu, at: GuestAddress, count: usize) -> Result<Session<'_>, NoSession> {
    Ok(mmu.session(None, |plan| plan.touch(at, count, Permissions::Write).is_ok())?.0)
}

#[test]
fn a_plan_whose_pages_are_here_runs_once_and_one_whose_are_not_runs_again_with_all() {
    let mmu = mmu(64);
    poke(&mmu, 0x10_0ff0, &[7; 0x3020]);
    let mut runs = 0;
    let mut plan = |plan: &Session<'_>| {
        runs += 1;
        let mut bytes = [0; 0x3020];
        plan.read_slice(&mut bytes, GuestAddress(0x10_0ff0)).map(|()| bytes)
    };
    let (session, read) = mmu.session(None, &mut plan).expect("memory");
    assert_eq!((read.expect("at hand"), mmu.window_stats().taken), ([7; 0x3020], 5));
    drop(session);
    assert_eq!(page_out(&mmu, 0x100..0x105), 5);
    let (session, read) = mmu.session(None, &mut plan).expect("memory");
    assert_eq!((read.expect("at hand"), mmu.window_stats().taken), ([7; 0x3020], 5));
    session.write_slice(&[8; 100], GuestAddress(0x10_1fc0)).expect("planned");
    drop(session);
    assert_eq!(runs, 3);
    assert_eq!(page_out(&mmu, 0x100..0x105), 5, "the pages written as well as the others");
    let mut want = vec![7; 0x3020];
    want[0xfd0..0xfd0 + 100].fill(8);
    assert_eq!(peek(&mmu, 0x10_0ff0, 0x3020), want, "planned to be read, and written all the same");
    audit(&mmu);
}

#[test]
fn a_page_of_low_memory_and_one_never_touched_are_pages_like_others() {
    let mmu = mmu(64);
    let session = open(&mmu, page(LOW_PAGES - 1), 0x2000).expect("memory");
    session.write_obj(0x1122_3344_5566_7788u64, GuestAddress(0x7ffc)).expect("over two pages");
    assert_eq!(session.load::<u32>(GuestAddress(0x8000), Ordering::Acquire).expect("aligned"), 0x1122_3344);
    drop(session);
    assert_eq!(page_out(&mmu, [LOW_PAGES - 1, LOW_PAGES]), 1, "low memory stays");
    assert_eq!(peek(&mmu, 0x7ffc, 8), 0x1122_3344_5566_7788u64.to_le_bytes());
    audit(&mmu);
}

#[test]
fn what_is_no_memory_is_refused_with_its_address_also_where_the_plan_swallows_it() {
    let mmu = mmu(64);
    assert!(mmu.make_device(Gfn(300)));
    let memory = u64::from(PAGES) << 12;
    let cases = [
        (memory - 4, 8, Refused::Device(Gpa(memory))),
        (memory, 1, Refused::Device(Gpa(memory))),
        (0x12a_000, 0x3000, Refused::Device(Gpa(0x12c_000))),
        // Its frame number would be 0 if it were cut off.
        (1 << 44, 4, Refused::Device(Gpa(1 << 44))),
        (u64::MAX - 2, 8, Refused::Wraps { at: Gpa(u64::MAX - 2), count: 8 }),
        (8, usize::MAX, Refused::Wraps { at: Gpa(8), count: u64::MAX }),
    ];
    for (at, count, want) in cases {
        let why = open(&mmu, GuestAddress(at), count).err();
        assert_eq!(why, Some(NoSession::Refused(want)), "{at:#x}");
        mmu.session(None, |plan| {
            let access = Permissions::Read;
            assert!(!plan.check_range(GuestAddress(at), count, access), "{at:#x}");
        })
        .expect("it only asked");
    }
    let session = open(&mmu, page(10), 1).expect("memory");
    let error = session.read_obj::<u32>(GuestAddress(memory)).err();
    assert!(matches!(error, Some(GuestMemoryError::InvalidGuestAddress(at)) if at.0 == memory), "{error:?}");
    let error = session.get_slices(GuestAddress(u64::MAX), 2, Permissions::Read).err();
    assert!(matches!(error, Some(GuestMemoryError::GuestAddressOverflow)), "{error:?}");
    assert_eq!(session.refused(), Some(Refused::Device(Gpa(memory))), "the first");
    assert_eq!(
        session.get_slices(GuestAddress(u64::MAX), 0, Permissions::Read).map(Iterator::count).ok(),
        Some(0)
    );
    drop(session);
    audit(&mmu);
}

#[test]
fn more_pages_than_a_session_may_have_are_refused_with_the_numbers_and_a_large_check_is_not() {
    let all = PAGES_MAX as usize * 4096;
    let (large, small) = (mmu(64), mmu(4));
    assert!(open(&large, page(100), all).is_ok());
    page_out(&large, 100..164);
    let why = open(&large, page(100), all + 1).err();
    let gfn = Gfn(100 + PAGES_MAX);
    assert_eq!(why, Some(NoSession::Refused(Refused::TooMany { gfn, max: PAGES_MAX })));
    let why = open(&small, page(100), 0x4001).err().map(|why| why.to_string());
    assert!(why.is_some_and(|why| why.contains("guest frame 0x68 beside 4 others")));
    let checked = large.session(None, |plan| plan.check_range(page(0), 500 << 12, Permissions::ReadWrite));
    assert!(checked.is_ok_and(|(_, all)| all), "a queue checks its rings, whatever their size");
    audit(&large);
    audit(&small);
}

#[test]
fn a_run_has_the_pages_of_its_plan_and_no_others() {
    let mmu = mmu(64);
    let session = open(&mmu, page(100), 4096).expect("memory");
    session.write_obj(1u8, GuestAddress(0x6_4fff)).expect("planned");
    let error = session.read_obj::<u16>(GuestAddress(0x6_4fff)).err().map(|error| error.to_string());
    assert!(
        error.is_some_and(|why| why.contains("0x65 is not among those that the request was planned with"))
    );
    assert_eq!(session.refused(), Some(Refused::NotPlanned(Gfn(101))));
    drop(session);
    audit(&mmu);
}

#[test]
fn pages_of_a_session_stay_and_go_when_it_has_gone() {
    let mmu = mmu(64);
    let session = open(&mmu, page(100), 0x2000).expect("memory");
    session.write_slice(&[5; 0x2000], page(100)).expect("planned");
    assert_eq!(page_out(&mmu, 100..102), 0);
    let held = mmu.discard(None, 100..101, Discard::Zero, May::Sleep);
    assert!(matches!(held, Err(NotDiscarded::Held { gfn: Gfn(100), .. })), "{held:?}");
    let held = mmu.discard(None, 100..101, Discard::Zero, May::NotSleep);
    assert!(
        matches!(held, Err(NotDiscarded::WouldBlock(_))),
        "a sleeper would have waited for the pin: {held:?}"
    );
    mmu.set_budget(mmu.budget_min()).expect("enough");
    while mmu.background_round().expect("swap has room") {}
    assert_eq!(session.read_obj::<u64>(page(101)).expect("planned"), 0x0505_0505_0505_0505);
    drop(session);
    assert_eq!(page_out(&mmu, 100..102), 2);
    assert_eq!(peek(&mmu, 0x6_4000, 0x2000), [5; 0x2000]);
    assert_eq!(mmu.discard(None, 100..101, Discard::Zero, May::Sleep), Ok(()));
    assert_eq!(peek(&mmu, 0x6_4000, 0x1000), [0; 0x1000]);
    audit(&mmu);
}

#[test]
fn a_session_goes_to_another_thread_and_its_opener_opens_another() {
    let mmu = mmu(64);
    let first = open(&mmu, page(100), 0x2000).expect("memory").pass_on();
    std::thread::scope(|scope| {
        scope.spawn(move || first.write_obj(9u64, page(101)).expect("planned"));
        drop(open(&mmu, page(102), 1).expect("memory"));
    });
    assert_eq!(peek(&mmu, 0x6_5000, 1), [9]);
    audit(&mmu);
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "INV-POOL-2")]
fn a_plan_that_would_sleep_is_caught() {
    let mmu = mmu(64);
    let _ = mmu.session(None, |plan| {
        plan.touch(page(100), 1, Permissions::Read).expect("a frame");
        mmu.bring_in(None, Gfn(101))
    });
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "INV-POOL-2")]
fn a_second_session_of_a_thread_is_caught() {
    let mmu = mmu(64);
    let _first = open(&mmu, page(100), 1);
    let _ = open(&mmu, page(101), 1);
}

/// A guest with two-level paging: a directory in page 1, a table in page 2 that maps the first pages to themselves.
fn paged(mmu: &Mmu) -> Vcpu {
    let mut vcpu = mmu.vcpu(0);
    poke(mmu, 0x1000, &0x2063u32.to_le_bytes());
    for page in 0..8u32 {
        poke(mmu, 0x2000 + u64::from(page) * 4, &(page << 12 | 0x63).to_le_bytes());
    }
    let mode = Mode { paging: true, pse: true, write_protect: true, ..Mode::default() };
    mmu.set_paging(&mut vcpu, mode, 0x1000, Flush::Yes).expect("no PDPTEs");
    for gva in [0x3000, 0x4000, 0x5000] {
        assert_eq!(mmu.fault(&vcpu, Gva(gva), Access::read(false)), Outcome::Fixed);
    }
    vcpu
}

#[test]
fn a_table_that_a_session_writes_loses_the_sptes_of_these_bytes_and_of_no_others() {
    let mmu = mmu(64);
    let vcpu = paged(&mmu);
    let before = mmu.usage().tracked_stores;
    let session = open(&mmu, GuestAddress(0x2000), 0x1000).expect("memory");
    let mut entry = [0; 4];
    session.read_slice(&mut entry, GuestAddress(0x2014)).expect("planned");
    session.write_obj(0x6063u32, GuestAddress(0x2010)).expect("planned");
    assert_eq!(
        (u32::from_le_bytes(entry), mmu.usage().tracked_stores),
        (0x5063, before),
        "told when it goes"
    );
    drop(session);
    assert_eq!(mmu.usage().tracked_stores, before + 1, "and once");
    // The audit would find an spte that the new entry does not justify.
    audit(&mmu);
    let again = [0x3000, 0x4000, 0x5000].map(|gva| mmu.fault(&vcpu, Gva(gva), Access::read(false)));
    assert_eq!(again, [Outcome::Spurious, Outcome::Fixed, Outcome::Spurious]);
    assert_eq!(
        mmu.walk(&vcpu, Gva(0x4000), Access::read(false), umbra_mmu::Touch::Set).map(|t| t.gpa),
        Ok(Gpa(0x6000))
    );
    // A slice that was handed out has been written, for all one knows.
    let session = open(&mmu, GuestAddress(0x2000), 0x1000).expect("memory");
    let slices = session.get_slices(GuestAddress(0x2010), 8, Permissions::Write).map(Iterator::count);
    assert_eq!(slices.ok(), Some(1));
    drop(session);
    let again = [0x3000, 0x4000, 0x5000].map(|gva| mmu.fault(&vcpu, Gva(gva), Access::read(false)));
    assert_eq!(again, [Outcome::Spurious, Outcome::Fixed, Outcome::Fixed]);
    audit(&mmu);
}

#[test]
fn code_decoded_from_a_page_that_a_session_writes_is_stale_and_from_one_it_reads_is_not() {
    let mmu = mmu(64);
    let vcpu = mmu.soft_vcpu(0, umbra_mmu::TlbKind::Sized);
    let frame = |gva| {
        assert!(!matches!(mmu.fault(&vcpu, gva, Access::execute(false)), Outcome::Guest(_)));
        mmu.tlb_enter(&vcpu);
        let frame = mmu.code_frame(&vcpu, gva, false).expect("mapped");
        mmu.coherence().leave_guest(0);
        frame
    };
    let (read, written) = (frame(Gva(0x20_0000)), frame(Gva(0x20_1000)));
    let mut session = open(&mmu, page(0x200), 0x2000).expect("memory");
    session.read_obj::<u64>(page(0x200)).expect("planned");
    session.write_obj(0x90u8, page(0x201)).expect("planned");
    session.tell();
    assert_eq!(mmu.code_generation(written.mfn), 0, "before the guest is told that it is there");
    let again = frame(Gva(0x20_1000));
    session.write_obj(0x91u8, page(0x201)).expect("planned");
    drop(session);
    assert_eq!(mmu.code_generation(read.mfn), read.generation);
    assert_eq!((again.mfn, mmu.code_generation(again.mfn)), (written.mfn, 0));
    audit(&mmu);
}

/// Adds one to a word of the caller's own in each of these pages: all had the same.
fn add_one(mmu: &Mmu, pages: &[u32], word: u64, want: u64) -> u32 {
    let at = |number: &u32| GuestAddress(page(*number).0 + 8 * word);
    let mut plans = 0;
    let (session, _) = mmu
        .session(None, |plan| {
            plans += 1;
            pages.iter().all(|page| plan.touch(at(page), 8, Permissions::Write).is_ok())
        })
        .expect("swap has room");
    for page in pages {
        assert_eq!(session.read_obj::<u64>(at(page)).expect("planned"), want, "page {page}");
    }
    // Others want its slots meanwhile.
    std::thread::yield_now();
    for page in pages {
        session.write_obj(want + 1, at(page)).expect("planned");
    }
    plans
}

/// Each wants three of four slots, in opposite order; a third takes single pages, and a fourth takes pages away.
#[test]
fn sessions_that_want_the_same_slots_in_opposite_order_all_get_them() {
    const ROUNDS: u64 = 1000;
    let mmu = mmu(4);
    let (began, over) = (Instant::now(), AtomicBool::new(false));
    let worker = |word: u64, pages: [u32; 3]| {
        for round in 0..ROUNDS {
            add_one(&mmu, &pages, word, round);
        }
    };
    std::thread::scope(|scope| {
        let workers = [
            scope.spawn(|| worker(1, [100, 101, 102])),
            scope.spawn(|| worker(2, [102, 101, 100])),
            scope.spawn(|| worker(3, [103, 102, 104])),
        ];
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                let map = mmu.take_page(Gfn(105), Intent::Write, None).expect("memory");
                map.store(0, Width::B8, 1);
                drop(map);
                std::thread::sleep(Duration::from_micros(20));
            }
        });
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                page_out(&mmu, 100..106);
                std::thread::sleep(Duration::from_micros(20));
            }
        });
        let done = workers.map(|worker| worker.join());
        over.store(true, Ordering::SeqCst);
        assert!(done.iter().all(Result::is_ok), "a worker has panicked");
    });
    let stats = mmu.window_stats();
    println!("dma: {:?}, {stats:?}", began.elapsed());
    assert!(stats.waits > 0 && began.elapsed() < Duration::from_secs(60), "{stats:?}");
    for (word, pages) in [(1, 100..103), (2, 100..103), (3, 102..105)] {
        for number in pages {
            assert_eq!(peek(&mmu, page(number).0 + 8 * word, 8), ROUNDS.to_le_bytes());
        }
    }
    audit(&mmu);
}

/// As many pages as a session may have, each wanted again by somebody who only takes them away.
#[test]
fn a_session_whose_pages_are_taken_away_all_the_time_gets_them() {
    let mmu = mmu(64);
    let pages: Vec<u32> = (100..100 + PAGES_MAX).collect();
    let (over, end) = (AtomicBool::new(false), Instant::now() + seconds(0.5));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                page_out(&mmu, pages.iter().copied());
            }
        });
        let worker = scope.spawn(|| {
            let (mut rounds, mut longest, mut most) = (0, Duration::ZERO, 0);
            while Instant::now() < end {
                let began = Instant::now();
                most = most.max(add_one(&mmu, &pages, 0, rounds));
                longest = longest.max(began.elapsed());
                rounds += 1;
            }
            (rounds, longest, most)
        });
        let done = worker.join();
        over.store(true, Ordering::SeqCst);
        let (rounds, longest, most) = done.expect("no wrong word");
        println!("dma: {rounds} sessions, the longest {longest:?}, at most {most} plans");
        assert!(
            rounds > 10 && longest < Duration::from_secs(5),
            "{rounds} sessions, the longest {longest:?}"
        );
        assert!(most <= PAGES_MAX + 1, "{most} plans");
    });
    audit(&mmu);
}

/// A request with parts to read and to write, as a device would have it; some overlap.
fn random_parts(rng: &mut TestRng) -> Vec<(u64, usize, Permissions)> {
    let memory = u64::from(PAGES) << 12;
    (0..rng.random_range(1..6))
        .map(|_| {
            let count = rng.random_range(1..0x4000usize);
            let access = if rng.random_range(0..2) == 0 { Permissions::Read } else { Permissions::Write };
            (rng.random_range(0..memory - count as u64), count, access)
        })
        .collect()
}

/// Requests, and now and then a discard, against plain bytes; meanwhile others take pages and frames away.
#[test]
fn random_requests_under_pressure_do_what_they_do_to_a_flat_memory() {
    let mmu = mmu(64);
    let least = mmu.budget_min();
    mmu.set_budget(least).expect("enough");
    let over = AtomicBool::new(false);
    let requests = std::thread::scope(|scope| {
        scope.spawn(|| {
            while mmu.wait_for_background_work() {
                while mmu.background_round().expect("swap has room") {}
            }
        });
        scope.spawn(|| {
            let mut rng = rng(7);
            while !over.load(Ordering::SeqCst) {
                mmu.set_budget(least + rng.random_range(0..200)).expect("not under the least");
                let first = rng.random_range(0..PAGES - 32);
                page_out(&mmu, first..first + 32);
                std::thread::sleep(Duration::from_micros(50));
            }
        });
        let device = scope.spawn(|| random_requests(&mmu));
        let requests = device.join();
        over.store(true, Ordering::SeqCst);
        mmu.stop_background();
        requests.expect("no difference")
    });
    println!("dma: {requests} requests, {:?}, {:?}", mmu.window_stats(), mmu.usage());
    assert!(requests > 100 && mmu.usage().refaults > 100, "{requests} requests, {:?}", mmu.usage());
    audit(&mmu);
}

fn random_requests(mmu: &Mmu) -> u32 {
    let (mut flat, mut rng) = (vec![0u8; (PAGES as usize) << 12], rng(8));
    let end = Instant::now() + seconds(0.5);
    let mut requests = 0;
    while Instant::now() < end {
        let parts = random_parts(&mut rng);
        let (session, _) = mmu
            .session(None, |plan| {
                parts.iter().all(|(at, count, access)| plan.touch(GuestAddress(*at), *count, *access).is_ok())
            })
            .expect("swap has room");
        for (at, count, access) in parts {
            let (range, at) = (at as usize..at as usize + count, GuestAddress(at));
            if access.has_write() {
                flat[range.clone()].fill(requests as u8);
                session.write_slice(&flat[range], at).expect("planned");
            } else {
                let mut bytes = vec![0; count];
                session.read_slice(&mut bytes, at).expect("planned");
                assert!(bytes == flat[range.clone()], "request {requests} differs in {range:#x?}");
            }
        }
        drop(session);
        if rng.random_range(0..8) == 0 {
            let first = rng.random_range(LOW_PAGES..PAGES - 4);
            mmu.discard(None, first..first + 4, Discard::Zero, May::Sleep)
                .expect("nothing holds them for long");
            flat[(first as usize) << 12..(first as usize + 4) << 12].fill(0);
        }
        requests += 1;
    }
    assert!(peek(mmu, 0, flat.len()) == flat, "at the end");
    requests
}

#[test]
fn a_page_that_the_guest_has_given_up_is_the_sessions_again() {
    let mmu = mmu(64);
    poke(&mmu, 0x6_4000, &[1; 4096]);
    mmu.discard(None, 100..101, Discard::Balloon, May::Sleep).expect("nothing holds it");
    assert_eq!(mmu.p2m().lookup(Gfn(100)), PageState::Ballooned);
    let session = open(&mmu, page(100), 4096).expect("memory");
    assert_eq!(session.read_obj::<u64>(page(100)).expect("planned"), 0);
    drop(session);
    assert_eq!(mmu.usage().ballooned, 0);
    audit(&mmu);
}
