use super::*;
use crate::bucket::Buckets;
use crate::coherence::NoVcpus;
use crate::discard::Discard;
use crate::invalidation::May;
use crate::swap::MemorySwap;
use crate::sync::thread;
use crate::{Config, Context, LocalStack, Machine};

const PAGES: u32 = 600;

fn mmu(slots: u32) -> Mmu {
    let config = Config { low_pages: 8, shadow_pages_max: 64, roots_max: 4, ..Config::of_pages(PAGES) };
    let mmu = Mmu::new(Machine::anonymous(1200), config, Box::new(NoVcpus));
    mmu.with_swap(Box::new(MemorySwap::new(PAGES))).with_window_slots(slots)
}

fn take(mmu: &Mmu, page: u32) -> PersistentMap<'_> {
    mmu.take_page(Gfn(page), Intent::Write, None).expect("memory")
}

fn counts(mmu: &Mmu) -> (u32, u32, u64, u64) {
    let stats = mmu.window_stats();
    (stats.taken, stats.idle, stats.sweeps, stats.swept)
}

#[test]
fn a_slot_is_shared_stays_pinned_when_idle_and_is_found_again() {
    let mmu = mmu(4);
    let first = take(&mmu, 100);
    let second = mmu.try_take_page(Gfn(100), Intent::Read).expect("resident");
    first.store(8, Width::B4, 77);
    assert_eq!((second.load(8, Width::B4), mmu.frames.pins(first.mfn), counts(&mmu)), (77, 1, (1, 0, 0, 0)));
    let mfn = first.mfn;
    drop(first);
    assert_eq!(counts(&mmu), (1, 0, 0, 0));
    drop(second);
    assert_eq!((mmu.frames.pins(mfn), counts(&mmu)), (1, (0, 1, 0, 0)));
    assert_eq!(mmu.audit(), Vec::<String>::new());
    drop(take(&mmu, 100));
    assert_eq!((mmu.frames.pins(mfn), counts(&mmu)), (1, (0, 1, 0, 0)));
}

#[test]
fn idle_slots_go_in_one_sweep_and_taken_ones_never() {
    let mmu = mmu(4);
    let kept = take(&mmu, 100);
    let others = [101, 102, 103].map(|page| mmu.try_take_page(Gfn(page), Intent::Read).expect("memory"));
    assert_eq!(mmu.try_take_page(Gfn(104), Intent::Read).err(), Some(NotTaken::Full));
    drop(others);
    let fifth = mmu.try_take_page(Gfn(104), Intent::Read).expect("a sweep");
    assert_eq!((kept.gfn(), fifth.gfn(), counts(&mmu)), (Gfn(100), Gfn(104), (2, 0, 1, 3)));
    assert_eq!(mmu.try_take_page(Gfn(PAGES), Intent::Read).err(), Some(NotTaken::Device(Gfn(PAGES))));
}

#[test]
fn an_idle_slot_blocks_no_invalidation_and_a_taken_one_does() {
    let mmu = mmu(4);
    drop(take(&mmu, 100));
    assert_eq!(mmu.page_out(None, &[Gfn(100)]), Ok(1));
    assert_eq!(counts(&mmu), (0, 0, 0, 1));
    let map = take(&mmu, 100);
    map.write(0, &[5; 16]);
    assert_eq!(mmu.page_out(None, &[Gfn(100)]), Ok(0));
    assert!(mmu.discard(None, 100..101, Discard::Zero, May::Sleep).is_err());
    drop(map);
    assert_eq!(mmu.page_out(None, &[Gfn(100)]), Ok(1));
    assert_eq!(mmu.try_take_page(Gfn(100), Intent::Read).err(), Some(NotTaken::Need(Gfn(100))));
    let mut back = [0; 16];
    take(&mmu, 100).read(0, &mut back);
    assert_eq!((back, mmu.audit()), ([5; 16], vec![]));
}

#[test]
fn a_mapping_that_is_left_is_found_by_the_audit() {
    let mmu = mmu(4);
    let _map = take(&mmu, 100);
    assert!(mmu.audit().iter().any(|finding| finding.starts_with("INV-WINDOW-1")));
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "INV-POOL-2")]
fn sleeping_for_a_slot_with_one_in_hand_is_caught() {
    let mmu = mmu(4);
    let _first = take(&mmu, 100);
    drop(take(&mmu, 101));
}

#[test]
fn a_mapping_that_was_passed_on_is_not_its_takers_any_more() {
    let mmu = mmu(2);
    let first = take(&mmu, 100).pass_on();
    std::thread::scope(|scope| {
        scope.spawn(move || first.store(0, Width::B8, 9));
        drop(take(&mmu, 101));
    });
    assert_eq!(take(&mmu, 100).load(0, Width::B8), 9);
}

#[test]
fn slots_are_kept_for_a_turn_and_its_pages_are_left_alone() {
    let mmu = mmu(3);
    let (first, second) = (take(&mmu, 100).pass_on(), take(&mmu, 101).pass_on());
    let turn = Turn::wait(&mmu, vec![Gfn(100), Gfn(102)]);
    std::thread::scope(|scope| {
        let claimed = scope.spawn(|| turn.claim());
        while mmu.window_stats().waiters == 0 {
            thread::yield_now();
        }
        assert_eq!(
            mmu.try_take_page(Gfn(103), Intent::Read).err(),
            Some(NotTaken::Full),
            "one is free, and kept"
        );
        assert!(mmu.try_take_page(Gfn(100), Intent::Read).is_ok(), "which has a slot");
        drop(second);
        claimed.join().expect("two are free");
    });
    drop(first);
    assert!(mmu.try_take_page(Gfn(101), Intent::Read).is_ok(), "the third is anybody's");
    assert_eq!(mmu.page_out(None, &[Gfn(100), Gfn(101)]), Ok(1), "100 is left to the turn");
    let pages = [100, 102].map(|page| turn.try_take_page(Gfn(page), Intent::Read).expect("claimed"));
    drop(pages);
    drop(turn);
    assert_eq!(mmu.page_out(None, &[Gfn(100)]), Ok(1));
    let stats = mmu.window_stats();
    assert_eq!((stats.taken, stats.waiters, mmu.pool.slots.lock().kept), (0, 0, 0));
    assert_eq!(mmu.audit(), Vec::<String>::new());
}

/// More threads than slots, over fewer frames than pages: each has words of its own, and reclaim takes pages throughout.
#[test]
fn threads_and_reclaim_lose_no_store_and_no_sleeper() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 3000;
    let mmu = mmu(2);
    mmu.set_budget(mmu.budget_min()).expect("enough");
    let mmu = &mmu;
    let worker = &|number: u64| {
        let mut sums = vec![0; PAGES as usize];
        let mut draw = number + 1;
        for _ in 0..ROUNDS {
            draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let page = (draw >> 33) as u32 % PAGES;
            let map = take(mmu, page);
            let old = map.load(8 * number as u32, Width::B8);
            assert_eq!(old, sums[page as usize], "page {page}");
            sums[page as usize] = draw;
            map.store(8 * number as u32, Width::B8, draw);
            thread::yield_now();
        }
        for (page, sum) in sums.iter().enumerate() {
            assert_eq!(take(mmu, page as u32).load(8 * number as u32, Width::B8), *sum, "page {page}");
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS).map(|n| scope.spawn(move || worker(n))).collect();
        while !workers.iter().all(|worker| worker.is_finished()) {
            mmu.background_round().expect("swap works");
            let pages: Vec<Gfn> = (100..164).map(Gfn).collect();
            mmu.page_out(None, &pages).expect("swap works");
        }
    });
    let stats = mmu.window_stats();
    assert!(stats.sweeps > 0 && stats.waits > 0 && stats.taken == 0 && stats.waiters == 0, "{stats:?}");
    assert_eq!(mmu.audit(), Vec::<String>::new());
    let mut word = [0; 8];
    mmu.read_bytes_sleeping(None, &LocalStack::new(Context::Host), Gfn(5).at(0), &mut word).expect("memory");
}

/// The pages of a turn are left alone, and not whatever shares their buckets: its own reclaim must find frames.
#[test]
fn a_turn_is_served_where_all_that_can_go_shares_its_buckets() {
    let mmu = mmu(64);
    mmu.set_budget(mmu.budget_min()).expect("enough");
    let wanted = 500..548;
    let shares = |page: &u32| {
        let asked = Buckets::new(PAGES);
        asked.starve(Asker::Fill(0), Gfn(*page));
        wanted.clone().any(|other| asked.is_starving(Gfn(other)))
    };
    let others: Vec<u32> = (8..500).filter(shares).collect();
    assert!(others.len() as u32 > mmu.budget_min(), "{} pages", others.len());
    for page in others {
        mmu.write_bytes_sleeping(None, &LocalStack::new(Context::Host), Gfn(page).at(0), &[1])
            .expect("swap has room");
    }
    let turn = Turn::wait(&mmu, wanted.clone().map(Gfn).collect());
    turn.claim();
    let take = |page| {
        mmu.bring_in(None, Gfn(page)).expect("there are frames");
        turn.try_take_page(Gfn(page), Intent::Write).expect("claimed").pass_on()
    };
    let held: Vec<_> = wanted.map(take).collect();
    assert_eq!(counts(&mmu).0, 48);
    drop((held, turn));
    assert_eq!(mmu.audit(), Vec::<String>::new());
}
